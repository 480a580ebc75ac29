"""Few-step sampling: from noise to data along a schedule of steps, batch by batch.

Which rule makes a step is the objective's (`objectives.BaseObjective.sample`); the
common one is x_{t+d} = x_t + d s(x_t, t, c, d, w), one network call per step whatever
the guidance (iSM, arXiv 2510.21250, algorithm 2). Knows no data and no metrics.
"""

from collections.abc import Sequence
from typing import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from ism_jax.method import interpolant, time_grid
from ism_jax.objectives.base import BaseObjective
from ism_jax.runtime import distributed

AGAIN = 2**31 - 1  # No sample has this number.


class Sampler:
    """A compiled sampler for one network: labels in, images out, batch by batch.

    Sample number i has the noise `normal(fold_in(key, i))`: it does not depend on the
    batch size, and the same number shows the same noise at every step count. (Noise
    that a sampler adds between steps does depend on the batch size.)

    A batch is divided among the devices of the parameters' mesh. Where that spans
    several processes, all of them must take the batches, and all get whole ones.

    Args:
      objective: what the network was trained with.
      apply: the network.
      image_shape: (H, W, C) of what the network makes.
      batch_size: how many samples are made at once.
      decode: makes images of samples that are latents; None where they are images.
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
        self.base_steps = objective.base_steps

        def run(params, key, numbers, label, w, times, steps):
            noise = interpolant.sample_noise(key, numbers, image_shape)
            # Samplers that add noise again: another stream than the noises' own.
            again = jax.random.fold_in(jax.random.fold_in(key, AGAIN), numbers[0])
            return objective.sample(apply, params, noise, label, w, times, steps, again)

        def run_from(params, noise, label, w, times, steps):
            again = jax.random.key(0)  # Not for samplers that add noise.
            return objective.sample(apply, params, noise, label, w, times, steps, again)

        self._run = jax.jit(run)
        self._run_from = jax.jit(run_from)
        self._decode = decode
        self.deterministic = objective.deterministic

    def shown_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images that are yielded."""
        if self._decode is None:
            return self.image_shape
        latents = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        return jax.eval_shape(self._decode, latents).shape[1:]

    def noise(self, key: jax.Array, numbers: Sequence[int]) -> jax.Array:
        """The noises that samples of these numbers are made of, [N, H, W, C]."""
        return interpolant.sample_noise(key, jnp.asarray(numbers), self.image_shape)

    def states(
        self, params, noise: jax.Array, labels: Sequence[int], *, guidance, schedule
    ):
        """Yields noise, then what is left after each step, [N, H, W, C] as is shown.

        Args:
          params: parameters, of the `infer` average.
          noise: [N, H, W, C], such as `noise` makes.
          labels, guidance, schedule: see `batches`.

        Raises:
          ValueError: the schedule is not one that the network was trained for, or the
            method adds noise between steps.
        """
        yield from map(
            self._shown, self._walk(params, noise, labels, guidance, schedule)
        )

    def ends(self, params, noise, labels, *, guidance, schedule) -> jax.Array:
        """The last of `states`, [N, H, W, C]; nothing before it is decoded."""
        *_, x = self._walk(params, noise, labels, guidance, schedule)
        return self._shown(x)

    def _shown(self, x):
        return x if self._decode is None else self._decode(x)

    def _walk(self, params, noise, labels, guidance, schedule):
        """`states`, as the network sees them."""
        if not self.deterministic:
            raise ValueError(
                'this method adds noise between steps: there is no path to follow'
            )
        times, sizes = time_grid.times_and_sizes(schedule, self.base_steps)
        label = np.asarray(labels, np.int32)
        w = np.full(len(label), guidance, np.float32)
        x = noise
        yield x
        for i in range(len(times)):
            one = slice(i, i + 1)  # A step at a time: one program for all schedules.
            x = self._run_from(params, x, label, w, times[one], sizes[one])
            yield x

    def batches(
        self,
        params,
        key: jax.Array,
        labels: Sequence[int],
        *,
        guidance: float,
        schedule: Sequence[float],
        first: int = 0,
        batch_size: int | None = None,
    ):
        """Yields (images [b, H, W, C], labels [b]), b at most `batch_size`.

        Args:
          params: parameters, of the `infer` average.
          key: of the noise.
          labels: one for each sample.
          guidance: strength w for all samples.
          schedule: step sizes, see `schedule.check_schedule`.
          first: number of the first sample: a part of many samples is made by itself.
          batch_size: another than the sampler's own.

        Raises:
          ValueError: the schedule is not one that the network was trained for.
        """
        times, sizes = time_grid.times_and_sizes(schedule, self.base_steps)
        labels = np.asarray(labels, np.int32)
        batch_size = batch_size or self.batch_size
        split, size = batch_split(params, batch_size)
        for start in range(0, len(labels), batch_size):
            label = labels[start : start + batch_size]
            # The last batch is filled up, so that nothing is compiled for its size.
            numbers = first + start + np.arange(size, dtype=np.int32)
            padded = np.pad(label, (0, size - len(label)))
            w = np.full(size, guidance, np.float32)
            images = self._run(
                params, key, *jax.device_put((numbers, padded, w), split), times, sizes
            )
            images = self._shown(images)
            if not images.is_fully_addressable:
                images = distributed.to_host(images)
            yield images[: len(label)], label


def batch_split(params, batch_size: int):
    """How a batch is divided among the devices of `params`, and its size there."""
    for leaf in jax.tree.leaves(params):
        place = getattr(leaf, 'sharding', None)
        if isinstance(place, NamedSharding):
            size = -(-batch_size // place.mesh.size) * place.mesh.size
            return NamedSharding(place.mesh, P(place.mesh.axis_names)), size
    return None, batch_size
