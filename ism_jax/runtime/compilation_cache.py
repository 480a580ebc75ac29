"""JAX's cache of compiled programs."""

from pathlib import Path

import jax


def keep_programs() -> None:
    """Keeps compiled programs on disk, so that a resumed run starts at once.

    On accelerators, and where the user's environment does not decide. Programs for a
    CPU are for one kind of CPU, while home folders are often shared.
    """
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != 'cpu':
        folder = Path('~/.cache/ism_jax/compiled').expanduser()
        jax.config.update('jax_compilation_cache_dir', str(folder))
