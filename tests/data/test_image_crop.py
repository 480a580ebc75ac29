"""The centre crop of ADM."""

import numpy as np
from PIL import Image

from ism_jax.data import image_crop


def test_center_crop_halves_with_block_means():
    array = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    means = array.reshape(16, 4, 16, 4).mean((1, 3))
    crop = image_crop.center_crop(Image.fromarray(array), 16, 1)[..., 0]
    # Two halvings, each rounding after the rows and after the columns. Other filters
    # are off by 20 or more on white noise.
    assert abs(crop - means).max() <= 4 * 0.5


def test_center_crop_keeps_the_middle_of_the_longer_side():
    array = np.zeros((64, 128, 3), np.uint8)
    array[:, 32:96] = 200
    array[:, 96:] = 90
    image = Image.fromarray(array)
    assert (image_crop.center_crop(image, 64, 3) == 200).all()
    upright = image.transpose(Image.Transpose.ROTATE_90)
    assert (image_crop.center_crop(upright, 64, 3) == 200).all()
    # Other sizes are resized by the bicubic filter, up as well as down.
    for size in (100, 50, 33):
        crop = image_crop.center_crop(image, size, 3)
        assert crop.shape == (size, size, 3)
        assert (crop[:, size // 4 : -size // 4] == 200).all()
