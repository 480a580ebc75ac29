"""A training batch, split among the terms of a loss and joined for one network call.

The split is a pattern of `sum(shares)` samples that repeats along the batch. When the
batch is sharded, each device holds every term in the same ratio, and neither splitting
nor joining moves samples between devices.
"""

from collections.abc import Sequence
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Batch(NamedTuple):
    """One batch of (noise, data) pairs.

    Attributes:
      noise: x0, [B, H, W, C], standard normal.
      data: x1, [B, H, W, C].
      label: [B] int32 class of the data.
    """

    noise: jax.Array
    data: jax.Array
    label: jax.Array


class Inputs(NamedTuple):
    """Inputs of the network: x [B, H, W, C]; t, d, w, label [B]; interval [B, 2].

    The guidance interval (start and end time) is for networks that are conditioned on
    it; for others it is None and not passed.
    """

    x: jax.Array
    t: jax.Array
    d: jax.Array
    w: jax.Array
    label: jax.Array
    interval: jax.Array | None = None

    def arguments(self) -> tuple[jax.Array, ...]:
        """The arguments of the network after its parameters."""
        return self[:5] if self.interval is None else tuple(self)


def split(batch: NamedTuple, shares: Sequence[int]) -> list[NamedTuple]:
    """One part of the batch for each share, with sizes in the ratio of the shares.

    Args:
      batch: arrays [B, ...]; B a multiple of the sum of the shares.
      shares: samples of each part in the repeating pattern.
    """

    def take(array, start, stop):
        pattern = array.reshape(-1, sum(shares), *array.shape[1:])
        return pattern[:, start:stop].reshape(-1, *array.shape[1:])

    ends = itertools.accumulate(shares)
    return [
        type(batch)(*(take(array, end - share, end) for array in batch))
        for share, end in zip(shares, ends, strict=True)
    ]


def apply_together(apply, params, repeats: int, *parts: Inputs) -> list:
    """The network's output for each part, [B_part, H, W, C], from one call.

    The parts are interleaved in the pattern of `split`. If the network has several
    outputs, each part gets as many.

    Args:
      apply: the network, `apply(params, x, t, d, w, label)`, with the interval as
        another argument if the parts have one.
      params: its parameters.
      repeats: how often the pattern repeats along the batch.
      *parts: each with a multiple of `repeats` samples.
    """
    shares = [part.x.shape[0] // repeats for part in parts]
    if not any(shares):
        return [part.x for part in parts]

    def interleave(*arrays):
        shape = arrays[0].shape[1:]
        patterns = [a.reshape(repeats, -1, *shape) for a in arrays if a.shape[0]]
        return jnp.concatenate(patterns, axis=1).reshape(-1, *shape)

    joined = jax.tree.map(interleave, *parts)
    outputs = apply(params, *joined.arguments())

    def take(start, stop, array):
        shape = array.shape[1:]
        pattern = array.reshape(repeats, sum(shares), *shape)
        return pattern[:, start:stop].reshape(-1, *shape)

    bounds = itertools.accumulate(shares, initial=0)
    return [
        jax.tree.map(functools.partial(take, start, stop), outputs)
        for start, stop in itertools.pairwise(bounds)
    ]
