"""Files that are written completely or not at all, on disk and in buckets."""

from collections.abc import Iterator
import contextlib
import io
import json
import os
import pathlib
import tempfile

import numpy as np

from ism_jax.runtime import paths


def write_bytes(path, data: bytes) -> None:
    """Writes a file, completely or not at all; creates its folder."""
    path = paths.to_path(path)
    if paths.is_bucket(path):
        paths.put(path, data)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path) -> Iterator[pathlib.Path]:
    """Yields a local file to write; it becomes `path` when the `with` block ends."""
    path = paths.to_path(path)
    if paths.is_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = pathlib.Path(folder) / path.name
            yield temporary
            paths.upload(temporary, path)
        return
    paths.make_folder(path.parent)
    # In the same directory, as a rename is atomic only within a file system.
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield temporary
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


@contextlib.contextmanager
def open_npz(path):
    """Yields an NPZ file; reading an array verifies its checksum."""
    with paths.open_file(paths.to_path(path)) as file:
        with np.load(file, allow_pickle=False) as arrays:
            yield arrays
