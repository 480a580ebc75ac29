"""Files that are written whole or not at all."""

import os
import pathlib


def write_bytes(path, data: bytes) -> None:
    """Writes a file, whole or not at all; its directory is made."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory, as a rename is atomic only within a file system.
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
