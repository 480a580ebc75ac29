"""Files that grow, on disk and in buckets, where every write replaces the object."""

import io
from typing import BinaryIO

from ism_jax.runtime import paths

# Size in bytes at which a writer begins the next object.
MAX_UPLOAD = 2**18


class BucketFile(io.BytesIO):
    """A file in memory; `flush` and `close` write all of it to a bucket.

    If that fails, the next time writes it too.

    Args:
      path: the object; what it holds is replaced.
    """

    def __init__(self, path: paths.Path):
        super().__init__()
        self._path = path

    def flush(self) -> None:
        """Writes the content to the bucket."""
        paths.put(self._path, self.getvalue())


def open_to_append(path: paths.Path) -> BinaryIO:
    """A file to append to; in a bucket, a new object."""
    return BucketFile(path) if paths.is_bucket(path) else path.open('ab')


def is_full(file: BinaryIO) -> bool:
    """Whether a file is in a bucket, and so large that the next one should begin."""
    return isinstance(file, BucketFile) and file.tell() > MAX_UPLOAD
