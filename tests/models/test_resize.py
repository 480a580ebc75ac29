"""The bicubic resize against Pillow's."""

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from ism_jax.models import resize


def _images(height, width):
    # Flat and rough areas, and both ends of the range, where a cubic overshoots.
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1, height, width, 3)).astype(np.uint8)
    images[:, : height // 2, : width // 2] = 255
    images[:, height // 2 :, width // 3 : width // 2] = 0
    return images


@pytest.mark.parametrize(
    'height, width', [(256, 256), (512, 512), (32, 64), (256, 500), (224, 224)]
)
def test_resize_is_that_of_pillow(height, width):
    images = _images(height, width)
    ours = np.asarray(resize.resize_as_pillow(jnp.asarray(images), 224))[0]
    resized = Image.fromarray(images[0]).resize((224, 224), Image.Resampling.BICUBIC)
    difference = np.abs(ours - np.asarray(resized).astype(np.float32))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    assert (ours == np.round(ours)).all() and ours.min() == 0 and ours.max() == 255
