"""Few-step sampling: labels in, images out, batch by batch.

The objective defines a sampling step (`objectives.BaseObjective.sample`). The common
rule is x_{t+d} = x_t + d s(x_t, t, c, d, w): one network call per step at any guidance
scale w (iSM, arXiv 2510.21250, algorithm 2).
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from ism_jax.method import random_streams, time_grid
from ism_jax.objectives.base import BaseObjective
from ism_jax.runtime import distributed

# Folded into the key for the noise between steps; no sample has this index.
STEP_NOISE = 2**31 - 1
# Schedules are padded to a multiple of this, so that one program takes them all.
PADDED_STEPS = 128


class Sampler:
    """A compiled sampler of one network.

    Sample i starts from the noise `normal(fold_in(key, i))`, at any batch size and any
    number of steps. (Noise that a method adds between steps depends on the batch size.)

    A batch is divided among the devices of the parameters' mesh. If the mesh spans
    several processes, all of them must draw the batches, and each gets whole ones.

    Args:
      objective: the objective that the network was trained with.
      apply: the network, (params, x, t, d, w, label) -> velocity.
      image_shape: (H, W, C) of the network's output, which may be a latent.
      batch_size: samples per batch.
      decode: maps latents to images; None if the network's outputs are images.

    Attributes:
      image_shape, batch_size: see above.
      schedule: see `BaseObjective.schedule`.
      deterministic: whether the method adds no noise between steps, so that
        `trajectory` and `final` work.
    """

    def __init__(
        self,
        objective: BaseObjective,
        apply: Callable[..., jax.Array],
        image_shape: tuple[int, int, int],
        *,
        batch_size: int,
        decode: Callable[[jax.Array], jax.Array] | None = None,
    ):
        self.image_shape = image_shape
        self.batch_size = batch_size
        self.schedule = objective.schedule
        self.deterministic = objective.deterministic
        self._interval = objective.default_interval

        def sample_from(params, noise, label, w, interval, times, steps, key):
            network = objective.at_interval(apply, interval)
            return objective.sample(network, params, noise, label, w, times, steps, key)

        def sample(params, key, indices, *conditions_and_schedule):
            noise = random_streams.sample_noise(key, indices, image_shape)
            step_key = jax.random.fold_in(
                jax.random.fold_in(key, STEP_NOISE), indices[0]
            )
            return sample_from(params, noise, *conditions_and_schedule, step_key)

        self._sample = jax.jit(sample)
        self._sample_from = jax.jit(sample_from)
        self._decode = (lambda x: x) if decode is None else decode

    def output_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the decoded images."""
        latents = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        return jax.eval_shape(self._decode, latents).shape[1:]

    def noise(self, key: jax.Array, indices: Sequence[int]) -> jax.Array:
        """The noise that the samples of these indices start from, [N, H, W, C]."""
        return random_streams.sample_noise(key, jnp.asarray(indices), self.image_shape)

    def trajectory(
        self,
        params,
        noise: jax.Array,
        labels: Sequence[int],
        *,
        guidance: float,
        schedule: int | Sequence[float],
        interval: tuple[float, float] | None = None,
    ) -> Iterator[jax.Array]:
        """Yields the decoded state x_t before the first and after each step.

        Args:
          params: inference EMA parameters.
          noise: x_0, [N, H, W, C], for example from `noise`.
          labels: N class labels.
          guidance: guidance scale w.
          schedule: number of steps, or step sizes.
          interval: start and end time of guidance, for a network that is conditioned
            on them; None for the method's default.

        Yields:
          [N, H, W, C], not clipped.

        Raises:
          ValueError: the network was not trained for the schedule, or the method adds
            noise between steps.
        """
        for x in self._states(params, noise, labels, guidance, schedule, interval):
            yield self._decode(x)

    def final(
        self,
        params,
        noise: jax.Array,
        labels: Sequence[int],
        *,
        guidance: float,
        schedule: int | Sequence[float],
        interval: tuple[float, float] | None = None,
    ) -> jax.Array:
        """The last state of `trajectory`, [N, H, W, C]; only this one is decoded."""
        *_, x = self._states(params, noise, labels, guidance, schedule, interval)
        return self._decode(x)

    def _states(self, params, noise, labels, guidance, schedule, interval):
        """Yields the states of `trajectory` before decoding."""
        if not self.deterministic:
            raise ValueError(
                'this method adds noise between steps, so its samples have no single '
                'trajectory'
            )
        times, sizes = time_grid.times_and_sizes(self.schedule(schedule))
        label = np.asarray(labels, np.int32)
        w = np.full(len(label), guidance, np.float32)
        interval = np.asarray(interval or self._interval, np.float32)
        x, unused_key = noise, jax.random.key(0)  # Deterministic methods draw nothing.
        yield x
        for i in range(len(times)):
            # One step per call, so that all schedules share one program.
            step = slice(i, i + 1)
            x = self._sample_from(
                params, x, label, w, interval, times[step], sizes[step], unused_key
            )
            yield x

    def batches(
        self,
        params,
        key: jax.Array,
        labels: Sequence[int],
        *,
        guidance: float,
        schedule: int | Sequence[float],
        interval: tuple[float, float] | None = None,
        first: int = 0,
        batch_size: int | None = None,
    ) -> Iterator[tuple[jax.Array, np.ndarray]]:
        """Yields one sample for each label, batch by batch.

        Args:
          params: inference EMA parameters.
          key: key of the noise.
          labels: N class labels.
          guidance: guidance scale w of all samples.
          schedule, interval: see `trajectory`.
          first: index of the first sample, to draw a slice of a larger set.
          batch_size: replaces the sampler's batch size.

        Yields:
          Images [b, H, W, C], not clipped, and their labels [b], b <= batch size.

        Raises:
          ValueError: the network was not trained for the schedule.
        """
        times, sizes = time_grid.times_and_sizes(self.schedule(schedule))
        padding = 0, -len(times) % PADDED_STEPS
        times, sizes = np.pad(times, padding), np.pad(sizes, padding)
        labels = np.asarray(labels, np.int32)
        interval = np.asarray(interval or self._interval, np.float32)
        batch_size = batch_size or self.batch_size
        sharding, padded_size = batch_sharding(params, batch_size)
        for start in range(0, len(labels), batch_size):
            label = labels[start : start + batch_size]
            # The last batch is padded, so that only one size is compiled.
            indices = first + start + np.arange(padded_size, dtype=np.int32)
            padded = np.pad(label, (0, padded_size - len(label)))
            w = np.full(padded_size, guidance, np.float32)
            inputs = jax.device_put((indices, padded, w), sharding)
            samples = self._sample(params, key, *inputs, interval, times, sizes)
            images = self._decode(samples)
            if not images.is_fully_addressable:
                images = distributed.to_host(images)
            yield images[: len(label)], label

    def lower(self, params, schedule: int | Sequence[float]) -> jax.stages.Lowered:
        """The program of `batches` before decoding, for shapes of the parameters."""
        times, sizes = time_grid.times_and_sizes(self.schedule(schedule))
        sharding, size = batch_sharding(params, self.batch_size)

        def batch(dtype):
            return jax.ShapeDtypeStruct((size,), dtype, sharding=sharding)

        key = jax.eval_shape(lambda: jax.random.key(0))
        inputs = batch(jnp.int32), batch(jnp.int32), batch(jnp.float32)
        interval = np.asarray(self._interval, np.float32)
        # With a constant schedule, so that the program's cost is known.
        sample = jax.jit(lambda *inputs: self._sample(*inputs, times, sizes))
        return sample.lower(params, key, *inputs, interval)


def batch_sharding(params, batch_size: int) -> tuple[NamedSharding | None, int]:
    """The sharding of a batch over the mesh of `params`, and its padded size.

    The size is rounded up to a multiple of the mesh size. Without a mesh: (None, size).
    """
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, 'sharding', None)
        if isinstance(sharding, NamedSharding):
            mesh = sharding.mesh
            padded_size = -(-batch_size // mesh.size) * mesh.size
            return NamedSharding(mesh, P(mesh.axis_names)), padded_size
    return None, batch_size
