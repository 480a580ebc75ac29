"""JAX's cache of compiled programs."""

from pathlib import Path

import jax


def keep_programs() -> None:
    """Keeps compiled programs on disk, so that a resumed run starts at once.

    Only on accelerators, and only if the user's environment sets no cache. Programs
    for a CPU fit one kind of CPU, while home folders are often shared.
    """
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != 'cpu':
        folder = Path('~/.cache/ism_jax/compiled').expanduser()
        jax.config.update('jax_compilation_cache_dir', str(folder))
