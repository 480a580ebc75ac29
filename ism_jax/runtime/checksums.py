"""Checksums: of a single file, and of the files of a checkpoint.

Orbax rarely notices a flipped bit in a checkpoint: of 60 flips in the arrays of a small
run, 56 gave wrong parameters and one an error. So each file is reread after it is
written, and its CRC-32 is kept with the checkpoint.
"""

from collections.abc import Iterator
from concurrent import futures
import hashlib
import json
import zlib

from ism_jax.runtime import files, paths

NAME = 'checksums.json'
_BLOCK = 2**22
_THREADS = 8  # Reading and zlib release the GIL.


def sha256(path) -> str:
    """SHA-256 of the bytes of a file, hexadecimal.

    Raises:
      ValueError: the file is missing.
    """
    path = paths.to_path(path)
    if not path.is_file():
        raise ValueError(f'{path} is not a file; give the path of one')
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def write(folder) -> None:
    """Writes the checksums of all files below a folder into it."""
    folder = paths.to_path(folder)
    names = [name for name in paths.files_below(folder) if name != NAME]
    found = dict(_checksums(folder, sorted(names)))
    files.write_json(folder / NAME, found)


def is_written(folder) -> bool:
    """Whether the folder has checksums."""
    return (paths.to_path(folder) / NAME).is_file()


def problems(folder, below: str = '') -> list[str]:
    """Lines that say which files differ from what was written; [] for none.

    Args:
      folder: the argument of `write`.
      below: the only subfolder to check; '' for all files.
    """
    folder = paths.to_path(folder)
    try:
        expected = json.loads(paths.read_bytes(folder / NAME))
        sizes = {name: size for name, (size, _) in expected.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        paths.raise_if_unreachable(folder, error)
        return [f'{folder / NAME} cannot be read ({error})']
    chosen = [n for n in sizes if not below or n.startswith(f'{below}/')]
    found = paths.files_below(folder)
    lines, whole = [], []
    for name in chosen:
        path = folder / name
        size = found.get(name)
        if size is None:
            lines.append(f'{path} is missing')
        elif size != sizes[name]:
            lines.append(f'{path} has {size} bytes, {sizes[name]} were written')
        else:
            whole.append(name)
    try:
        for name, checksum in _checksums(folder, whole):
            if checksum != expected[name]:
                lines.append(f'{folder / name} differs from what was written')
    except OSError as error:
        paths.raise_if_unreachable(folder, error)
        lines.append(f'{folder} cannot be read ({error})')
    return lines


def _checksums(folder: paths.Path, names) -> Iterator[tuple[str, list[int]]]:
    """(name, [size, CRC-32]) of each file."""
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(_checksum, [folder / name for name in names])
        yield from zip(names, found, strict=True)


def _checksum(path: paths.Path) -> list[int]:
    size = value = 0
    with paths.errors(path), path.open('rb') as file:
        while block := file.read(_BLOCK):
            size += len(block)
            value = zlib.crc32(block, value)
    return [size, value]
