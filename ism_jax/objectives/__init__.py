"""Training objectives: one file per method, one signature.

Each module holds a frozen dataclass `Objective`, a subclass of `BaseObjective`. Its
fields with their defaults are the method's options, `config.objective` gives their
values, and `__post_init__` refuses values that could not work. A new method is a new
file here and a config that names it; nothing else changes.
"""

import dataclasses
import importlib
import pkgutil
from typing import Callable, NamedTuple

import jax


class Batch(NamedTuple):
    """One batch of pairs, paired by transport.

    Attributes:
      noise: x0, [B, H, W, C], standard normal.
      data: x1, [B, H, W, C].
      label: [B] int32 class of the data.
    """

    noise: jax.Array
    data: jax.Array
    label: jax.Array


@dataclasses.dataclass(frozen=True)
class BaseObjective:
    """What training needs to know of a method.

    Attributes:
      num_classes: number of classes, and the index of the `null` label.
    """

    num_classes: int

    def __call__(
        self,
        apply: Callable[..., jax.Array],
        params,
        target_params,
        batch: Batch,
        key: jax.Array,
        *,
        distance: Callable[[jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and its parts.

        Args:
          apply: the network, `apply(params, x, t, d, w, label)`.
          params: online parameters, with respect to which the loss is differentiated.
          target_params: parameters that make targets; no gradient flows into them.
          batch: see `Batch`.
          key: used for this call alone.
          distance: error [B, H, W, C] -> values [B] and their parts {name: [B]}.

        Returns:
          The scalar loss and a flat dict of scalars.
        """
        raise TypeError(f'{type(self).__module__} must define __call__')

    def batch_multiple(self) -> int:
        """Batch sizes must be a multiple of this."""
        return 1

    def min_batch(self) -> int:
        """The smallest batch that serves all parts of the method."""
        return 1

    def guidance_limit(self) -> float:
        """The largest guidance strength w that the network learns; 0 for none."""
        return 0.0

    def finest_steps(self) -> int:
        """1 / the finest step size: how many sampling steps make sense at most."""
        return 128


def names() -> list[str]:
    """The methods that can be named in `config.objective.name`."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> type[BaseObjective]:
    """The `Objective` class of a method.

    Raises:
      ValueError: no method of that name.
    """
    if name not in names():
        raise ValueError(
            f'objective.name = {name!r} is unknown; choose one of {", ".join(names())}'
        )
    return importlib.import_module(f'{__name__}.{name}').Objective


def options(name: str) -> dict:
    """The options of a method with their defaults."""
    return {
        field.name: field.default
        for field in dataclasses.fields(load(name))
        if field.name != 'num_classes'
    }


def check_fraction(name: str, value: float) -> None:
    """Raises ValueError unless `value` lies in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f'{name} = {value} must lie in [0, 1)')
