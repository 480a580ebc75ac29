"""8-bit images and their values in [-1, 1]: one rule for every score and picture."""

import numpy as np


def to_uint8(images) -> np.ndarray:
    """8-bit values of images: clip(x, -1, 1), then (x + 1) 127.5 rounded half to even.

    -1 is 0 and 1 is 255; `from_uint8` is undone exactly. Every score and every picture
    uses this one rule.

    Args:
      images: floating, in [-1, 1], any shape; uint8 is returned as it is.

    Returns:
      uint8 of the same shape.

    Raises:
      ValueError: a value is NaN, or the type is neither floating nor uint8.
    """
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind in 'biuc':
        raise ValueError(
            f'images of type {images.dtype}: floating in [-1, 1] or uint8 is expected; '
            'cast integers 0 .. 255 to uint8 first'
        )
    values = images.astype(np.float32)  # Also bfloat16, which np.clip may not know.
    missing = np.count_nonzero(np.isnan(values))
    if missing:
        raise ValueError(
            f'images hold {missing} NaN of {values.size} values: the sampler or the '
            'parameters diverged; use np.nan_to_num to look at them nonetheless'
        )
    return np.rint((np.clip(values, -1, 1) + 1) * 127.5).astype(np.uint8)


def from_uint8(images) -> np.ndarray:
    """float32 in [-1, 1] of uint8 images, x / 127.5 - 1.

    Raises:
      ValueError: images are not uint8.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise ValueError(f'images of type {images.dtype}: uint8 is expected')
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)
