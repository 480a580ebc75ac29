"""Training objectives: one file per method, one signature.

Each module holds a frozen dataclass `Objective`, a subclass of `BaseObjective`. Its
fields are the method's options, each with a default and a line of help. A method
defines its loss, its sampler if that differs from the common one, and its properties. A
new method is a new file here, plus the checks of its options in
`ism_jax/config_check.py`.
"""

import dataclasses
import importlib
import pkgutil

from ism_jax.objectives.base import BaseObjective


def names() -> list[str]:
    """Names of the methods, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != 'base')


def load(name: str) -> type[BaseObjective]:
    """The `Objective` class of a method.

    Raises:
      ValueError: no method has this name.
    """
    if name not in names():
        raise ValueError(f'objective {name!r} is not one of {", ".join(names())}')
    return importlib.import_module(f'{__name__}.{name}').Objective


def create(name: str, num_classes: int, **options) -> BaseObjective:
    """The objective of a method for `num_classes` classes.

    Args:
      name: one of `names`.
      num_classes: also the index of the null label.
      **options: values that replace the defaults of `options`.
    """
    return load(name)(num_classes=num_classes, **options)


def options(name: str) -> dict[str, object]:
    """The options of a method with their defaults."""
    return {field.name: field.default for field in _option_fields(name)}


def option_help(name: str) -> dict[str, str]:
    """The options of a method with one line of help each."""
    return {
        field.name: field.metadata.get('help', '') for field in _option_fields(name)
    }


def _option_fields(name: str) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(load(name)) if f.name != 'num_classes']
