"""Compiled functions of images, applied to any number of images."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np


def apply(
    function: Callable[[np.ndarray], Mapping], images: np.ndarray, size: int
) -> dict[str, np.ndarray]:
    """The outputs of `function`, called with batches of exactly `size` images.

    The last batch is padded, so that only one batch size is compiled.

    Args:
      function: images [size, ...] -> arrays [size, ...] by name.
      images: [N, ...], N >= 0.
      size: images per call.
    """
    parts = []
    for start in range(0, max(len(images), 1), size):
        batch = images[start : start + size]
        count = len(batch)
        padding = ((0, size - count), *((0, 0),) * (batch.ndim - 1))
        out = function(np.pad(batch, padding))
        parts.append({name: np.asarray(out[name])[:count] for name in out})
    return concatenate(parts)


def concatenate(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of all parts, joined by name along their first axis."""
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
