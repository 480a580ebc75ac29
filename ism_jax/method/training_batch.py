"""Parts of a batch that serve different terms of a loss, and one call for them all.

The parts are dealt in a pattern that repeats along the batch, so a batch that is split
over devices is split over the terms on each device alike, and no sample moves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Batch(NamedTuple):
    """One batch of pairs, paired by transport.

    Attributes:
      noise: x0, [B, H, W, C], standard normal.
      data: x1, [B, H, W, C].
      label: [B] int32 class of the data.
    """

    noise: jax.Array
    data: jax.Array
    label: jax.Array


class Inputs(NamedTuple):
    """What the network sees: x [B, H, W, C], the rest [B]."""

    x: jax.Array
    t: jax.Array
    d: jax.Array
    w: jax.Array
    label: jax.Array


def split(batch: NamedTuple, shares: Sequence[int]) -> list[NamedTuple]:
    """Deals the samples to the parts in the ratio of `shares`, whole numbers.

    Args:
      batch: arrays [B, ...]; B a multiple of the sum of the shares.
    """

    def take(array, start, stop):
        pattern = array.reshape(-1, sum(shares), *array.shape[1:])
        return pattern[:, start:stop].reshape(-1, *array.shape[1:])

    ends = [sum(shares[: i + 1]) for i in range(len(shares))]
    return [
        type(batch)(*(take(array, end - share, end) for array in batch))
        for share, end in zip(shares, ends)
    ]


def apply_together(apply, params, patterns: int, *parts: Inputs) -> list[jax.Array]:
    """One call of the network over several parts; one result for each part.

    The parts are woven together in the pattern in which the batch was split, so that
    on many devices each keeps its own samples.
    """
    shares = [part.x.shape[0] // patterns for part in parts]
    if not any(shares):
        return [part.x for part in parts]

    def weave(*arrays):
        shape = arrays[0].shape[1:]
        woven = [a.reshape(patterns, -1, *shape) for a in arrays if a.shape[0]]
        return jnp.concatenate(woven, axis=1).reshape(-1, *shape)

    result = apply(params, *(weave(*arrays) for arrays in zip(*parts)))
    shape = result.shape[1:]
    result = result.reshape(patterns, sum(shares), *shape)
    ends = [sum(shares[:i]) for i in range(len(shares) + 1)]
    return [
        result[:, start:stop].reshape(-1, *shape) for start, stop in zip(ends, ends[1:])
    ]
