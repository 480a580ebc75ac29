"""Training objectives: one file per method, one signature.

Each module holds a frozen dataclass `Objective`, a subclass of `BaseObjective`. Its
fields with their defaults are the method's options, `config.objective` gives their
values, and `__post_init__` refuses values that could not work. A method brings its
loss and, where it differs from the common one, its sampler. A new method is a new file
here and a config that names it; nothing else changes.
"""

import dataclasses
import importlib
import pkgutil

from ism_jax.objectives.base import BaseObjective


def names() -> list[str]:
    """The methods that can be named in `config.objective.name`."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != 'base')


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
