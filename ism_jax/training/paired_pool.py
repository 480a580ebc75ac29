"""A pool: K batches on the devices, each sample paired with noise."""

from typing import NamedTuple

import jax
import numpy as np

from ism_jax.method import random_streams
from ism_jax.method.training_batch import Batch
from ism_jax.runtime import sharding


class Pool(NamedTuple):
    """K batches of M samples, paired with noise by number.

    Attributes:
      data: x1, [K, M, H, W, C] float32: images in [-1, 1], or latents.
      labels: [K, M] int32.
      noise_index: [K, M] int32, number of the noise that each sample is paired with.
      number: int32, number of the pool in the run.
    """

    data: jax.Array
    labels: jax.Array
    noise_index: jax.Array
    number: jax.Array


def pool_batch(pool: Pool, step: jax.Array, seed_key: jax.Array) -> Batch:
    """The batch of one step; its noise is generated here, from its numbers."""
    turn = step % pool.labels.shape[0]
    data, labels, index = (
        jax.lax.dynamic_index_in_dim(array, turn, keepdims=False)
        for array in (pool.data, pool.labels, pool.noise_index)
    )
    pool_key = random_streams.stream(seed_key, random_streams.NOISE, pool.number)
    noise = random_streams.sample_noise(pool_key, index, data.shape[1:])
    return Batch(noise, data, labels)


def next_pool(loader, couple, mesh, seed_key) -> tuple[Pool, dict]:
    """The next pool on the devices, paired with noise, and the coupling's report.

    Args:
      loader: iterator of `pool_loader.HostPool`.
      couple: see `coupling.couple_pool`, compiled; None pairs sample i with noise i.
      mesh: the devices.
      seed_key: the run's key.
    """
    host = next(loader)
    data = sharding.shard_pool(host.images, mesh)
    labels = sharding.shard_pool(host.labels, mesh)
    number = sharding.replicate(np.int32(host.number), mesh)
    size = labels.size
    index, report = np.arange(size, dtype=np.int32), {}
    if couple is not None:
        index, report = couple(
            data.reshape(size, *data.shape[2:]),
            labels.reshape(size),
            random_streams.stream(seed_key, random_streams.NOISE, number),
        )
        report = {f'transport/{name}': value for name, value in report.items()}
    index = jax.device_put(
        index.reshape(labels.shape), jax.sharding.NamedSharding(mesh, sharding.POOL)
    )
    return Pool(data, labels, index, number), report
