"""Bicubic resize of 8-bit images, as the imaging library Pillow does it.

Scores depend on it: with another filter, or without smoothing before shrinking, the
same images have other features (Parmar et al., arXiv 2104.11222).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

PILLOW_SHARPNESS = -0.5  # The parameter a of Keys' cubic; PyTorch has -0.75.
_REACH = 2.0  # Where Keys' cubic ends.


def resize_as_pillow(images: jax.Array, side: int) -> jax.Array:
    """Bicubic resize with smoothing, rounded to 8 bits after each direction.

    Args:
      images: [B, H, W, C], 0 .. 255, uint8 or floating.
      side: of the result.

    Returns:
      [B, side, side, C] float32, whole numbers 0 .. 255. A value may differ from
      Pillow's by 1, rarely, where it lies between two whole numbers.
    """

    def rounded(x):
        return jnp.clip(jnp.floor(x + 0.5), 0.0, 255.0)

    x = images.astype(jnp.float32)
    _, height, width, _ = x.shape
    # Pillow's order, but for images that are higher than wide by Pillow 13.
    if width != side:
        weights = pillow_weights(width, side)
        x = rounded(jnp.einsum('ow,bhwc->bhoc', weights, x, precision='highest'))
    if height != side:
        weights = pillow_weights(height, side)
        x = rounded(jnp.einsum('oh,bhwc->bowc', weights, x, precision='highest'))
    return x


@functools.lru_cache
def pillow_weights(size: int, side: int) -> np.ndarray:
    """[side, size] float32: what each pixel of the result takes of each of the image.

    Where the image is shrunk the filter is as much wider, which smooths.
    """
    scale = size / side
    width = max(scale, 1.0)
    centers = (np.arange(side) + 0.5) * scale
    places = np.arange(size) + 0.5
    distances = (places[None] - centers[:, None]) / width
    # Only pixels whose centres are within reach, rounded as there, and no others.
    first = np.floor(np.maximum(centers - _REACH * width + 0.5, 0))
    last = np.floor(np.minimum(centers + _REACH * width + 0.5, size))
    numbers = np.arange(size)
    inside = (numbers[None] >= first[:, None]) & (numbers[None] < last[:, None])
    weights = np.where(inside, keys_cubic(distances, PILLOW_SHARPNESS), 0.0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def keys_cubic(x: np.ndarray, sharpness: float) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981), 0 from |x| = 2 on."""
    x = np.abs(x)
    a = sharpness
    inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
    outer = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
