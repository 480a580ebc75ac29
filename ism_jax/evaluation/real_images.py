"""Real images in batches, from any origin, and a hash that identifies them.

    len(images)              number of images
    images.batches(size)     yields uint8 [n, H, W, C] in order, n <= size
    images.digest()          hash of the images, hexadecimal
    images.description       text for the record

A folder and an NPZ file are hashed byte by byte, so that the hash survives a move and
changes with any pixel. A source of `ism_jax.data.sources` is identified by its `repr`,
which is the same for the same data.
"""

from collections.abc import Iterator
from concurrent import futures
import contextlib
import hashlib
import os
from pathlib import Path
import zipfile
import zlib

import numpy as np
from PIL import Image

from ism_jax.data import folder_source, image_crop
from ism_jax.data.source import CorruptImageError, Source
from ism_jax.runtime import checksums, paths

THREADS = 8  # Decoding releases the GIL.


def open_images(origin, *, image_size: int | None = None):
    """Opens real images.

    Args:
      origin: an NPZ file with `arr_0`, uint8 [N, H, W, 3] (ADM's layout); a folder of
        image files, with or without subfolders; or a source of `ism_jax.data.sources`.
      image_size: side to which images of a folder are cropped and resized as in ADM;
        None to keep their size, which must then be one square. Ignored otherwise.

    Raises:
      ValueError: `origin` is none of these, or holds no such images.
    """
    if hasattr(origin, 'image_shape'):
        return SourceImages(origin)
    path = paths.to_path(origin)
    if path.is_dir() and not paths.is_bucket(path):
        return FolderImages(path, image_size)
    if path.is_file() and path.suffix == '.npz':
        return NpzImages(path)
    raise ValueError(
        f'{origin} is neither a folder of images nor an .npz file; give one of these, '
        'or a source of ism_jax.data.sources'
    )


class SourceImages:
    """Images of a source of `ism_jax.data.sources`."""

    def __init__(self, source: Source):
        self._source = source
        self.description = repr(source)

    def __len__(self):
        return len(self._source)

    def digest(self) -> str:
        return hashlib.sha256(self.description.encode()).hexdigest()

    def batches(self, size: int) -> Iterator[np.ndarray]:
        return _read_in_threads(lambda i: self._source[i]['image'], len(self), size)


class FolderImages:
    """Image files below a folder, as RGB, sorted by name.

    Args:
      path: the folder; names that begin with a dot are skipped.
      image_size: see `open_images`.

    Raises:
      ValueError: no images, or no `image_size` although the first is not a square.
    """

    def __init__(self, path, image_size: int | None = None):
        path = Path(path)
        self._files = sorted(
            Path(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if folder_source.is_image(name)
            and not any(
                part.startswith('.') for part in Path(folder).relative_to(path).parts
            )
        )
        if not self._files:
            raise ValueError(
                f'{path} holds no images ({", ".join(folder_source.IMAGE_SUFFIXES)}); '
                'give a folder that does'
            )
        self._resize = image_size is not None
        self._size = image_size if self._resize else self._first_side()
        self.description = f'{len(self)} images of {path}, {self._size}x{self._size}'

    def __len__(self):
        return len(self._files)

    def digest(self) -> str:
        digest = hashlib.sha256(f'{self._size} {self._resize}'.encode())
        with futures.ThreadPoolExecutor(THREADS) as pool:
            for part in pool.map(checksums.sha256, self._files):
                digest.update(bytes.fromhex(part))
        return digest.hexdigest()

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Yields uint8 [n, H, W, 3] in order.

        Raises:
          ValueError: an image has another size.
          CorruptImageError: an image cannot be read.
        """
        return _read_in_threads(self._read_file, len(self), size)

    def _read_file(self, index):
        path = self._files[index]
        with _image(path) as image:
            size = image.size
            cropped = image_crop.center_crop(image, self._size, 3)
        if not self._resize:
            _check_size(path, size, self._size)
        return cropped

    def _first_side(self):
        with _image(self._files[0]) as image:
            size = image.size
        _check_size(self._files[0], size, size[0])
        return size[0]


class NpzImages:
    """`arr_0` of an NPZ file, read in parts and never as a pickle.

    Raises:
      ValueError: no such array, or it is not uint8 [N, H, W, 3].
    """

    def __init__(self, path):
        self._path = paths.to_path(path)
        try:
            with self._array() as file:
                self._shape, fortran, dtype = _read_header(file)
        except (KeyError, OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f'{path} has no readable images arr_0 ({error}): give an NPZ file in '
                "ADM's layout, or download it again"
            ) from error
        rgb = len(self._shape) == 4 and self._shape[-1] == 3
        if fortran or dtype != np.uint8 or not rgb:
            raise ValueError(
                f'{path}: arr_0 is {dtype} {self._shape}, not uint8 [N, H, W, 3] in C '
                "order; give an NPZ file in ADM's layout"
            )
        self.description = f'{len(self)} images of {path}'

    def __len__(self):
        return self._shape[0]

    def digest(self) -> str:
        return checksums.sha256(self._path)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Yields uint8 [n, H, W, 3] in order.

        Raises:
          ValueError: the file is damaged.
        """
        image_bytes = int(np.prod(self._shape[1:]))
        try:
            with self._array() as file:
                _read_header(file)
                for start in range(0, len(self), size):
                    count = min(size, len(self) - start)
                    content = file.read(count * image_bytes)
                    batch = np.frombuffer(content, np.uint8)
                    yield batch.reshape(count, *self._shape[1:])
                # zipfile compares the checksum at the end of the array.
                file.read(1)
        except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(
                f'{self._path} is damaged ({error}); download it again'
            ) from error

    @contextlib.contextmanager
    def _array(self):
        """The open array in the file."""
        with paths.open_file(self._path) as file, zipfile.ZipFile(file) as archive:
            with archive.open('arr_0.npy') as array:
                yield array


def _read_in_threads(read, count, size):
    """Yields stacks of read(0), read(1), ..., read(count - 1)."""
    with futures.ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, count, size):
            yield np.stack(list(pool.map(read, range(start, min(start + size, count)))))


def _read_header(file):
    """Shape, whether in Fortran order, and type of an NPY file."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    return readers[np.lib.format.read_magic(file)](file)


def _check_size(path, size, side) -> None:
    if size != (side, side):
        raise ValueError(
            f'{path} is {size[0]}x{size[1]}, not {side}x{side}: crop and resize all '
            'images to one square size first (image_size does this)'
        )


@contextlib.contextmanager
def _image(path):
    """An open image file; any failure to read it raises a `CorruptImageError`."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow raises many types.
        raise CorruptImageError(
            f'{path} cannot be read as an image ({error}); repair or remove it'
        ) from error
