"""Real images from folders and NPZ files, and the messages about their faults."""

import numpy as np
from PIL import Image
import pytest

from ism_jax.data import image_crop
from ism_jax.data.source import CorruptImageError
from ism_jax.evaluation import real_images


def _images(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)


def _read(origin, **options):
    return list(real_images.open_images(origin, **options).batches(5))


def test_folders_are_cropped_as_by_adm(tmp_path):
    image = Image.fromarray(_images(1)[0]).resize((24, 20))
    image.save(tmp_path / 'a.png')
    image.convert('L').save(tmp_path / 'b.JPG')
    (tmp_path / '.hidden').mkdir()
    image.save(tmp_path / '.hidden' / 'c.png')
    (tmp_path / 'notes.txt').write_text('no image')
    images = real_images.open_images(tmp_path, image_size=8)
    assert len(images) == 2 and images.description.endswith('8x8')
    (batch,) = images.batches(5)
    np.testing.assert_array_equal(batch[0], image_crop.center_crop(image, 8, 3))
    assert batch.shape == (2, 8, 8, 3) and not np.ptp(batch[1], axis=-1).any()
    with pytest.raises(ValueError, match='24x20, not 24x24: crop and resize'):
        real_images.open_images(tmp_path)


def test_images_of_an_npz_file_are_read_in_order(tmp_path):
    images = _images(12)
    np.savez_compressed(tmp_path / 'a.npz', arr_0=images, arr_1=np.zeros(12))
    batches = _read(tmp_path / 'a.npz')
    assert [len(batch) for batch in batches] == [5, 5, 2]
    np.testing.assert_array_equal(np.concatenate(batches), images)


def test_images_of_another_size_are_named(tmp_path):
    images = _images(2)
    Image.fromarray(images[0]).save(tmp_path / 'a.png')
    Image.fromarray(images[1][:4, :4]).save(tmp_path / 'b.png')
    with pytest.raises(ValueError, match=r'b.png is 4x4, not 8x8'):
        _read(tmp_path)


def test_corrupt_images_are_named(tmp_path):
    Image.fromarray(_images(1)[0]).save(tmp_path / 'a.png')
    (tmp_path / 'b.png').write_bytes(b'no image')
    with pytest.raises(CorruptImageError, match='b.png cannot be read'):
        _read(tmp_path)


def test_origins_without_images_are_named(tmp_path):
    with pytest.raises(ValueError, match='holds no images'):
        real_images.open_images(tmp_path)
    with pytest.raises(ValueError, match='neither a folder'):
        real_images.open_images(tmp_path / 'nowhere')
