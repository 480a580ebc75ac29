"""JAX's cache of compiled programs."""

from pathlib import Path

import jax


def keep_programs() -> None:
    """Keeps compiled programs on disk, so that a resumed run starts at once.

    Only on accelerators, and only if the user's environment sets no cache. A program
    for a CPU fits one kind of CPU, but machines often share a home folder.
    """
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != 'cpu':
        folder = Path('~/.cache/ism_jax/compiled').expanduser()
        jax.config.update('jax_compilation_cache_dir', str(folder))
