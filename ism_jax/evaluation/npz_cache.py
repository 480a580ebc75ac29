"""Cached results in NPZ files: a bad file or a read-only folder is never fatal."""

from collections.abc import Mapping
import warnings

import numpy as np

from ism_jax.runtime import files, paths


def write(path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays and the key that identifies them; warns if it cannot.

    Args:
      path: the file.
      key: hash of everything that the arrays depend on.
      arrays: arrays by name; 'key' is reserved.
    """
    try:
        files.write_npz(path, key=np.array(key), **arrays)
    except OSError as error:
        warnings.warn(
            f'{path} cannot be written ({error}) and will be recomputed next time; '
            'choose a writable folder',
            stacklevel=3,
        )


def read(path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None if it is missing, damaged or has another key.

    Warns in the last two cases.
    """
    if not paths.to_path(path).exists():
        return None
    try:
        # Reading a zip archive verifies the checksum of every array.
        with files.open_npz(path) as file:
            arrays = {name: file[name] for name in file.files}
        found = str(arrays.pop('key'))
        problem = '' if found == key else f'its key is {found}'
    # Damaged bytes surface as many kinds of error: zip, zlib, header, key, value.
    except Exception as error:  # pylint: disable=broad-exception-caught
        problem = f'{type(error).__name__}: {error}'
    if problem:
        warnings.warn(
            f'{path} cannot be used ({problem}): recomputing and replacing it',
            stacklevel=3,
        )
        return None
    return arrays
