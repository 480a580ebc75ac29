"""Real images by the batch, wherever they are, and what identifies them.

    len(images)              how many
    images.batches(size)     yields uint8 [n, H, W, C] in order, n at most `size`
    images.digest()          hash of what they are, hexadecimal
    images.description       in words

A folder and an NPZ file are hashed byte by byte, so that the hash follows them to
another place and changes with any pixel. A source of `ism_jax.data.sources` is known by
its `repr`, which is made to be the same for the same data.
"""

from collections.abc import Iterator
from concurrent import futures
import hashlib
import os
from pathlib import Path
import zipfile
import zlib

import numpy as np
from PIL import Image

from ism_jax.data import sources

THREADS = 8  # Decoding leaves Python's lock alone.


def open_images(place, *, image_size: int | None = None):
    """Real images from where they are.

    Args:
      place: an NPZ file with `arr_0`, uint8 [N, H, W, 3] (a batch of ADM's); a folder
        of image files, in subfolders or not; or a source of `ism_jax.data.sources`.
      image_size: side that images of a folder are cropped and resized to as in ADM;
        None where they are squares of one size, which is kept.

    Raises:
      ValueError: another place, or one without such images.
    """
    if hasattr(place, 'image_shape'):
        _no_size(image_size, 'a source has its own size')
        return SourceImages(place)
    path = Path(place)
    if path.is_dir():
        return FolderImages(path, image_size)
    if path.is_file() and path.suffix == '.npz':
        _no_size(image_size, 'images of an NPZ file are taken as they are')
        return NpzImages(path)
    raise ValueError(
        f'{place} is neither a folder of images nor an .npz file; give one of these, '
        'or a source of ism_jax.data.sources'
    )


def _no_size(image_size, reason):
    if image_size is not None:
        raise ValueError(f'image_size = {image_size}: {reason}; leave image_size out')


class SourceImages:
    """Images of a source of `ism_jax.data.sources`."""

    def __init__(self, source: sources.Source):
        self._source = source
        self.description = repr(source)

    def __len__(self):
        return len(self._source)

    def digest(self) -> str:
        return hashlib.sha256(self.description.encode()).hexdigest()

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """See the head of this file."""
        return _by_threads(lambda i: self._source[i]['image'], len(self), size)


class FolderImages:
    """Image files below a folder, as RGB, sorted by their names.

    Args:
      path: of the folder; names that begin with a dot are left out.
      image_size: see `open_images`.

    Raises:
      ValueError: no images, or no size although the first is no square.
    """

    def __init__(self, path, image_size: int | None = None):
        path = Path(path)
        self._files = sorted(
            Path(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if name.lower().endswith(sources.IMAGE_SUFFIXES)
            and not any(part.startswith('.') for part in _parts(folder, name, path))
        )
        if not self._files:
            raise ValueError(
                f'{path} holds no images ({", ".join(sources.IMAGE_SUFFIXES)}); give '
                'the folder that does'
            )
        self._resize = image_size is not None
        self._size = image_size if self._resize else self._first_side()
        self.description = f'{len(self)} images of {path}, {self._size}x{self._size}'

    def __len__(self):
        return len(self._files)

    def digest(self) -> str:
        """Hash of the files' bytes in their order, and of the size."""
        digest = hashlib.sha256(f'{self._size} {self._resize}'.encode())
        with futures.ThreadPoolExecutor(THREADS) as pool:
            for part in pool.map(_hash_file, self._files):
                digest.update(part)
        return digest.hexdigest()

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """See the head of this file.

        Raises:
          ValueError: an image of another size.
          CorruptImageError: one that cannot be read.
        """
        return _by_threads(self._read_file, len(self), size)

    def _read_file(self, index):
        path = self._files[index]
        with _opened(path) as image:
            if not self._resize and image.size != (self._size, self._size):
                raise ValueError(
                    f'{path} is {image.size[0]}x{image.size[1]}, others are '
                    f'{self._size}x{self._size}: give image_size, to which all are '
                    'cropped and resized'
                )
            try:
                return sources.center_crop(image, self._size, 3)
            except Exception as error:  # Pillow raises nearly anything.
                raise _corrupt(path, error) from error

    def _first_side(self):
        with _opened(self._files[0]) as image:
            width, height = image.size
        if width != height:
            raise ValueError(
                f'{self._files[0]} is {width}x{height} and no square: give image_size, '
                'to which all are cropped and resized'
            )
        return width


class NpzImages:
    """`arr_0` of an NPZ file, read without loading all of it, and never as a pickle.

    Raises:
      ValueError: no such array, or none of uint8 [N, H, W, 3].
    """

    def __init__(self, path):
        self._path = Path(path)
        try:
            with zipfile.ZipFile(self._path) as archive:
                with archive.open('arr_0.npy') as file:
                    self._shape, fortran, dtype = _read_header(file)
        except (KeyError, OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f'{path} has no readable images arr_0 ({error}): give a batch of '
                "ADM's, or fetch it again"
            ) from error
        rgb = len(self._shape) == 4 and self._shape[-1] == 3
        if fortran or dtype != np.uint8 or not rgb:
            raise ValueError(
                f'{path}: arr_0 is {dtype} {self._shape}, not uint8 [N, H, W, 3] in C '
                "order; give a batch of ADM's"
            )
        self.description = f'{len(self)} images of {path}'

    def __len__(self):
        return self._shape[0]

    def digest(self) -> str:
        return _hash_file(self._path).hex()

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """See the head of this file.

        Raises:
          ValueError: the file is damaged.
        """
        bytes_each = int(np.prod(self._shape[1:]))
        try:
            with zipfile.ZipFile(self._path) as archive:
                with archive.open('arr_0.npy') as file:
                    _read_header(file)
                    for start in range(0, len(self), size):
                        count = min(size, len(self) - start)
                        content = file.read(count * bytes_each)
                        batch = np.frombuffer(content, np.uint8)
                        yield batch.reshape(count, *self._shape[1:])
                    # At the end of the array zipfile compares its checksum.
                    if file.read(1):
                        raise ValueError('arr_0 is longer than its shape')
        except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(
                f'{self._path} is damaged ({error}); fetch it again'
            ) from error


def _by_threads(read, count, size):
    with futures.ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, count, size):
            yield np.stack(list(pool.map(read, range(start, min(start + size, count)))))


def _read_header(file):
    """Shape, whether in Fortran order, and type, of an NPY file."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f'NPY version {version}')


def _hash_file(path) -> bytes:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').digest()


def _parts(folder, name, root):
    return Path(folder, name).relative_to(root).parts


def _opened(path):
    try:
        return Image.open(path)
    except Exception as error:  # Pillow raises nearly anything.
        raise _corrupt(path, error) from error


def _corrupt(path, error):
    return sources.CorruptImageError(
        f'{path} cannot be read as an image ({error}); repair or remove it'
    )
