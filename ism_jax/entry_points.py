"""The commands as entry points: `ism-train` is `python -m ism_jax.train`."""

import functools
import runpy


def __getattr__(name: str):
    return functools.partial(
        runpy.run_module, f'ism_jax.{name}', run_name='__main__', alter_sys=True
    )
