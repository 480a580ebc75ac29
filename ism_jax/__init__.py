"""Improved shortcut models in JAX; `ism_jax.load` gives a trained network to call."""

__all__ = ['load']


def __getattr__(name):
    # The commands import this package and not what it takes to sample.
    if name == 'load':
        from ism_jax.generator import load

        return load
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
