"""What training and sampling need to know of a method."""

import dataclasses
from typing import Callable

import jax
import jax.numpy as jnp

from ism_jax.method import interpolant, time_grid
from ism_jax.method.training_batch import Batch


@dataclasses.dataclass(frozen=True)
class BaseObjective:
    """What training and sampling need to know of a method.

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
        progress: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and its parts.

        Args:
          apply: the network, `apply(params, x, t, d, w, label)`.
          params: online parameters, with respect to which the loss is differentiated.
          target_params: parameters that make targets; no gradient flows into them.
          batch: see `Batch`.
          key: used for this call alone.
          distance: error [B, H, W, C] -> values [B] and their parts {name: [B]}.
          progress: share of the training that is done, in [0, 1); curricula use it.

        Returns:
          The scalar loss and a flat dict of scalars.
        """
        raise TypeError(f'{type(self).__module__} must define __call__')

    def velocity(self, apply, params, x, t, d, w, label) -> jax.Array:
        """Mean velocity over the step from t to t + d, as the sampler uses it.

        Args:
          apply, params: the network and its parameters, as in training.
          x: [B, H, W, C]; t, d, w, label: [B].
        """
        embedded = time_grid.embedded_step(d, self.base_steps)
        return apply(params, x, t, embedded, w, label)

    def sample(self, apply, params, noise, label, w, times, steps, key) -> jax.Array:
        """From noise to data along a schedule: x_{t+d} = x_t + d velocity(x_t, t, d).

        Args:
          apply, params: the network and its parameters, of the `infer` average.
          noise: x0, [B, H, W, C], standard normal.
          label, w: [B].
          times, steps: [N], of `schedule.times_and_sizes`.
          key: of the samplers that add noise between steps.

        Returns:
          x1, [B, H, W, C], not clipped.
        """
        del key  # The common sampler is deterministic.

        def body(x, step):
            t, d = (jnp.full(label.shape, value) for value in self.clip_step(*step))
            return interpolant.step(
                x, self.velocity(apply, params, x, t, d, w, label), d
            ), None

        return jax.lax.scan(body, noise, (times, steps))[0]

    def clip_step(self, t, d):
        """The step from t to t + d without the part before `start_time`."""
        begin = jnp.maximum(t, self.start_time)
        return begin, t + d - begin

    @property
    def deterministic(self) -> bool:
        """Whether the sampler adds no noise between steps, so that there is a path."""
        return True

    @property
    def guidance_interval(self) -> float:
        """Time before which guidance does not act."""
        return 0.0

    @property
    def start_time(self) -> float:
        """Where the method's time begins; noise is taken for a sample of that time."""
        return 0.0

    @property
    def conditions_on_step(self) -> bool:
        """Whether the network is told the step size; else it knows only velocities."""
        return True

    @property
    def uses_target_ema(self) -> bool:
        """Whether `target_params` make targets; else the network teaches itself."""
        return False

    @property
    def batch_multiple(self) -> int:
        """Batch sizes must be a multiple of this."""
        return 1

    @property
    def min_batch(self) -> int:
        """The smallest batch that serves all parts of the method."""
        return 1

    @property
    def guidance_range(self) -> tuple[float, float]:
        """Lowest and highest guidance strength w that can be asked of the sampler.

        (0, 0) for a method without guidance, (w, w) where w is part of the training.
        """
        return 0.0, 0.0

    @property
    def model_options(self) -> dict[str, object]:
        """Fields of `config.model` that the method needs otherwise than by default."""
        return {}

    @property
    def base_steps(self) -> int:
        """1 / the finest step size: how many sampling steps make sense at most."""
        return 128


def check_fraction(name: str, value: float) -> None:
    """Raises ValueError unless `value` lies in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f'{name} = {value} must lie in [0, 1)')
