"""8-bit images and their values in [-1, 1]: one rule for every score and picture."""

import numpy as np


def to_uint8(images) -> np.ndarray:
    """Converts images to 8 bits: clip(x, -1, 1), (x + 1) 127.5, rounded half to even.

    -1 becomes 0 and 1 becomes 255. It inverts `to_float` exactly.

    Args:
      images: floating in [-1, 1], any shape; uint8 is returned unchanged.

    Returns:
      uint8 of the same shape.

    Raises:
      ValueError: a value is NaN.
    """
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    # bfloat16 has kind 'V'.
    assert images.dtype.kind not in 'biuc', f'{images.dtype} is not floating or uint8'
    values = images.astype(np.float32)  # np.clip may not support bfloat16.
    num_nan = np.count_nonzero(np.isnan(values))
    if num_nan:
        raise ValueError(
            f'{num_nan} of {values.size} image values are NaN: the model diverged. '
            'Use an earlier checkpoint, or apply np.nan_to_num to inspect the images'
        )
    return np.rint((np.clip(values, -1, 1) + 1) * 127.5).astype(np.uint8)


def to_float(images) -> np.ndarray:
    """float32 in [-1, 1]: x / 127.5 - 1 of uint8; floating values are unchanged."""
    images = np.asarray(images)
    if images.dtype != np.uint8:
        return images.astype(np.float32, copy=False)
    values = images / np.float32(127.5)
    values -= 1
    return values
