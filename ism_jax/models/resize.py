"""Bicubic resize of 8-bit images as in the imaging library Pillow.

Scores depend on it: with another filter, or without antialiasing, the same images have
different features (Parmar et al., arXiv 2104.11222).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

PILLOW_SHARPNESS = -0.5  # Parameter a of Keys' cubic; PyTorch's is -0.75.
_RADIUS = 2.0  # Radius of the support of Keys' cubic.


def resize_as_pillow(images: jax.Array, side: int) -> jax.Array:
    """Bicubic resize with antialiasing, rounded to 8 bits after each direction.

    Args:
      images: [B, H, W, C], 0 .. 255, uint8 or floating.
      side: side of the output, in pixels.

    Returns:
      [B, side, side, C] float32 of whole numbers 0 .. 255. Rarely, a value halfway
      between two whole numbers is rounded differently from Pillow.
    """

    def rounded(x):
        return jnp.clip(jnp.floor(x + 0.5), 0.0, 255.0)

    x = images.astype(jnp.float32)
    _, height, width, _ = x.shape
    # Pillow's order (Pillow 13 swaps it for images that are taller than wide).
    if width != side:
        weights = pillow_weights(width, side)
        x = rounded(jnp.einsum('ow,bhwc->bhoc', weights, x, precision='highest'))
    if height != side:
        weights = pillow_weights(height, side)
        x = rounded(jnp.einsum('oh,bhwc->bowc', weights, x, precision='highest'))
    return x


@functools.lru_cache
def pillow_weights(size: int, side: int) -> np.ndarray:
    """Weights [side, size] float32 of the input pixels in each output pixel.

    When an image shrinks, the filter is widened by the scale (antialiasing).
    """
    scale = size / side
    width = max(scale, 1.0)
    centers = (np.arange(side) + 0.5) * scale
    pixels = np.arange(size) + 0.5
    distances = (pixels[None] - centers[:, None]) / width
    # Pixels within the support, with the rounding of Pillow.
    first = np.floor(np.maximum(centers - _RADIUS * width + 0.5, 0))
    last = np.floor(np.minimum(centers + _RADIUS * width + 0.5, size))
    index = np.arange(size)[None]
    inside = (index >= first[:, None]) & (index < last[:, None])
    weights = np.where(inside, keys_cubic(distances, PILLOW_SHARPNESS), 0.0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def keys_cubic(x: np.ndarray, sharpness: float) -> np.ndarray:
    """The cubic convolution kernel of Keys 1981; 0 for |x| >= 2."""
    x = np.abs(x)
    a = sharpness
    inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
    outer = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
