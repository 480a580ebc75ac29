"""Embedded MNIST and the files of Fashion-MNIST."""

import gzip
from pathlib import Path
import struct

import numpy as np
import pytest

from ism_jax.data import array_source, sources


def test_mnist_is_padded_with_black(make_loader):
    source = sources.make_source('mnist', image_size=32, channels=1)
    assert len(source) == 5000 and source.image_shape == (32, 32, 1)
    assert source.num_classes == 10 and source.class_names[7] == '7'
    np.testing.assert_array_equal(np.bincount(source.labels), [500] * 10)
    border = np.ones((32, 32), bool)
    border[2:-2, 2:-2] = False
    assert not source.images[:, border].any() and source.images[:, 2:-2].any()
    record = source[7]
    assert record['image'].dtype == np.uint8 and record['label'].dtype == np.int32
    pool = next(make_loader(source))
    assert pool.images.min() == -1 and pool.images.max() == 1
    unpadded = sources.make_source('mnist', image_size=28, channels=1)
    np.testing.assert_array_equal(unpadded.images, source.images[:, 2:-2, 2:-2])
    assert repr(source) != repr(unpadded)
    small = sources.make_source('mnist', image_size=16, channels=1)
    quarters = [source.images[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    mean = np.mean(quarters, axis=0)  # Of 2x2 pixels of the padded image.
    assert np.abs(small.images - mean).max() <= 0.5


@pytest.mark.parametrize('size', [0, 13, 20, 33, 2000])
def test_sizes_that_do_not_suit_mnist_are_refused(size):
    message = f'image_size = {size} does not suit mnist.*choose 14, 16, 28, 32 .* 1310'
    with pytest.raises(ValueError, match=message):
        sources.make_source('mnist', image_size=size, channels=1)


def test_repr_identifies_the_content():
    def make(images, labels):
        return repr(array_source.ArraySource('x', images, labels, ['a', 'b']))

    images = np.zeros((3, 4, 4, 1), np.uint8)
    first = make(images, np.zeros(3, int))
    assert first == make(images, np.zeros(3, int))
    assert first != make(images, np.ones(3, int))
    images[0, 0, 0] = 1
    assert first != make(images, np.zeros(3, int))


def _write_idx(path, array, compress=True):
    header = struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if compress else content)


@pytest.fixture
def fashion(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    for prefix, part in (('train', images[:3]), ('t10k', images[3:])):
        _write_idx(tmp_path / f'{prefix}-images-idx3-ubyte.gz', part)
    # Decompressed files are read as well.
    labels = np.array([3, 9, 0], np.uint8)
    _write_idx(tmp_path / 'train-labels-idx1-ubyte', labels, compress=False)
    _write_idx(tmp_path / 't10k-labels-idx1-ubyte.gz', np.array([1, 2], np.uint8))
    return tmp_path, images


def _open_fashion(path, **options):
    options = dict(image_size=32, channels=1, data_dir=str(path)) | options
    return sources.make_source('fashion_mnist', **options)


def test_fashion_mnist_files(fashion):
    path, images = fashion
    source, test = _open_fashion(path), _open_fashion(path, split='test')
    assert len(source) == 3 and len(test) == 2 and source.image_shape == (32, 32, 1)
    np.testing.assert_array_equal(source[1]['image'][2:-2, 2:-2, 0], images[1])
    np.testing.assert_array_equal(test[0]['image'][2:-2, 2:-2, 0], images[3])
    assert source[1]['label'] == 9 and source.class_names[9] == 'ankle boot'
    assert test[1]['label'] == 2 and repr(source) != repr(test)


def test_damaged_fashion_mnist_files_are_refused(fashion):
    path, _ = fashion
    file = path / 'train-images-idx3-ubyte.gz'
    content = file.read_bytes()
    for broken in (content[:-20], b'not gzip', gzip.compress(b'nothing'), b''):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match='idx3.*download it again'):
            _open_fashion(path)
    file.write_bytes(content)
    for labels, message in (
        ([3, 10, 0], r'images \(3, 28, 28\), labels \(3,\) up to 10'),
        ([3, 9], r'labels \(2,\) up to 9'),
    ):
        labels = np.array(labels, np.uint8)
        _write_idx(path / 'train-labels-idx1-ubyte', labels, compress=False)
        with pytest.raises(ValueError, match=message):
            _open_fashion(path)
    with pytest.raises(
        ValueError, match=r'none.*`apt-get install dataset-fashion-mnist`.*tfds:'
    ):
        _open_fashion(path / 'none')


@pytest.mark.skipif(
    not Path(array_source.FASHION_MNIST_DIR).is_dir(),
    reason="Debian's package dataset-fashion-mnist is not installed",
)
def test_fashion_mnist_of_debian():
    source = _open_fashion('', split='test')
    np.testing.assert_array_equal(np.bincount(source.labels), [1000] * 10)
