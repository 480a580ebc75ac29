"""Local paths, and files that are written atomically."""

import io
import json
import os
from pathlib import Path
import re

import numpy as np


def local_path(path, name: str) -> Path:
    """The path of a file or folder that a user gave; `~` is expanded.

    Args:
      path: text or path-like.
      name: name of the flag or argument, for the message.

    Raises:
      ValueError: a URL such as gs://bucket/run, which would become a local folder.
    """
    # Path('gs://bucket') is 'gs:/bucket'; the text 'folder:/images' is no URL.
    mark = '://' if isinstance(path, str) else ':/'
    if re.match(r'[A-Za-z][\w+.-]+' + mark, os.fspath(path)):
        raise ValueError(
            f'{name} {path} is a URL, and only local paths work; mount the bucket, or '
            'copy to and from it'
        )
    return Path(path).expanduser()


def write_bytes(path, data: bytes) -> None:
    """Writes a file, completely or not at all; creates its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory, as a rename is atomic only within a file system.
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content, **options) -> None:
    """Writes JSON like `write_bytes`; options are those of `json.dumps`."""
    write_bytes(path, (json.dumps(content, indent=1, **options) + '\n').encode())


def write_npz(path, /, **arrays) -> None:
    """Writes arrays by name like `write_bytes`."""
    out = io.BytesIO()
    np.savez(out, **arrays)
    write_bytes(path, out.getvalue())
