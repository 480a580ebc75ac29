"""Files that grow, on disk and in buckets, where every write replaces the object."""

from typing import BinaryIO

from ism_jax.runtime import paths

# Size in bytes at which a writer begins the next object.
MAX_UPLOAD = 2**18


class BucketFile:
    """A file in memory; `flush` writes all of it to a bucket.

    If that fails, the next time writes it too.

    Args:
      path: the object; what it holds is replaced.
    """

    def __init__(self, path: paths.Path):
        self._path, self._content, self._written = path, bytearray(), 0

    def __len__(self):
        return len(self._content)

    def write(self, data: bytes) -> None:
        """Appends bytes in memory."""
        self._content += data

    def flush(self) -> None:
        """Writes the content to the bucket."""
        paths.put(self._path, bytes(self._content))
        self._written = len(self)

    def close(self) -> None:
        """Writes what is not in the bucket yet."""
        if self._written < len(self):
            self.flush()


def open_to_append(path: paths.Path) -> BinaryIO | BucketFile:
    """A file to append to; in a bucket, a new object."""
    return BucketFile(path) if paths.is_bucket(path) else path.open('ab')


def is_full(file: BinaryIO | BucketFile) -> bool:
    """Whether a file is in a bucket, and so large that the next one should begin."""
    return isinstance(file, BucketFile) and len(file) > MAX_UPLOAD
