"""Improved shortcut models in JAX; `ism_jax.load` loads a trained network."""

__all__ = ['load']


def __getattr__(name):
    # Imported on first use: the commands import this package, and few of them sample.
    if name == 'load':
        from ism_jax.generator import load

        return load
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
