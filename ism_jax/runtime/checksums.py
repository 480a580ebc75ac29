"""Checksums: of a single file, and of the files of a checkpoint.

Orbax rarely notices a flipped bit in a checkpoint: of 60 flips in the arrays of a small
run, 56 gave wrong parameters and one an error. So each file is reread after it is
written, and its CRC-32 is kept with the checkpoint.
"""

from collections.abc import Iterator
from concurrent import futures
import hashlib
import json
from pathlib import Path
import zlib

from ism_jax.runtime import files

NAME = 'checksums.json'
_BLOCK = 2**22
_THREADS = 8  # Reading and zlib release the GIL.


def sha256(path) -> str:
    """SHA-256 of the bytes of a file, hexadecimal.

    Raises:
      ValueError: the file is missing.
    """
    if not Path(path).is_file():
        raise ValueError(f'{path} is not a file; give the path of one')
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def write(folder) -> None:
    """Writes the checksums of all files below a folder into it."""
    folder = Path(folder)
    found = dict(_checksums(folder, sorted(_names(folder))))
    files.write_json(folder / NAME, found)


def is_written(folder) -> bool:
    """Whether the folder has checksums."""
    return (Path(folder) / NAME).is_file()


def problems(folder, below: str = '') -> list[str]:
    """Lines that say which files differ from what was written; [] for none.

    Args:
      folder: the argument of `write`.
      below: the only subfolder to check; '' for all files.
    """
    folder = Path(folder)
    try:
        expected = json.loads((folder / NAME).read_text())
        sizes = {name: size for name, (size, _) in expected.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return [f'{folder / NAME} cannot be read ({error})']
    chosen = [n for n in sizes if not below or n.startswith(f'{below}/')]
    lines, whole = [], []
    for name in chosen:
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
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
        lines.append(f'{folder} cannot be read ({error})')
    return lines


def _names(folder: Path) -> Iterator[str]:
    for path in folder.rglob('*'):
        if path.is_file() and path.name != NAME:
            yield path.relative_to(folder).as_posix()


def _checksums(folder: Path, names) -> Iterator[tuple[str, list[int]]]:
    """(name, [size, CRC-32]) of each file."""
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        paths = [folder / name for name in names]
        yield from zip(names, pool.map(_checksum, paths), strict=True)


def _checksum(path) -> list[int]:
    size = value = 0
    with open(path, 'rb') as file:
        while block := file.read(_BLOCK):
            size += len(block)
            value = zlib.crc32(block, value)
    return [size, value]
