"""Few-step samplers: from noise to data along a schedule of steps.

x_{t+d} = x_t + d s(x_t, t, c, d, w), one network call per step whatever the guidance
(iSM, arXiv 2510.21250, algorithm 2). Knows no data and no metrics.
"""

from collections.abc import Sequence
from typing import Callable

import jax
import jax.numpy as jnp

from ism_jax import interpolant
from ism_jax import schedule as schedules


def sample(
    apply: Callable[..., jax.Array],
    params,
    noise: jax.Array,
    label: jax.Array,
    w: jax.Array,
    times: jax.Array,
    steps: jax.Array,
    embedded_steps: jax.Array,
) -> jax.Array:
    """Runs the sampler; jit it once, it compiles once for each number of steps.

    Args:
      apply: the network, `apply(params, x, t, d, w, label)`.
      params: parameters, of the `infer` average.
      noise: x0, [B, H, W, C], standard normal.
      label: [B] int32.
      w: [B] guidance strength.
      times, steps, embedded_steps: [N], of `schedule.times_and_sizes`.

    Returns:
      x1, [B, H, W, C], not clipped.
    """
    batch = label.shape[0]

    def body(x, step):
        t, d, embedded = (jnp.full((batch,), value) for value in step)
        return interpolant.step(x, apply(params, x, t, embedded, w, label), d), None

    x, _ = jax.lax.scan(body, noise, (times, steps, embedded_steps))
    return x


class Sampler:
    """A compiled sampler for one network: labels in, images out, batch by batch.

    Sample number i has the noise `normal(fold_in(key, i))`: it does not depend on the
    batch size, and the same number shows the same noise at every step count.

    Args:
      apply: the network.
      image_shape: (H, W, C).
      batch_size: how many samples are made at once.
      base_steps: of the training.
    """

    def __init__(
        self,
        apply: Callable[..., jax.Array],
        image_shape: tuple[int, int, int],
        *,
        batch_size: int,
        base_steps: int,
    ):
        self.image_shape = image_shape
        self.batch_size = batch_size
        self.base_steps = base_steps

        def run(params, key, numbers, label, w, times, steps, embedded_steps):
            noise = interpolant.sample_noise(key, numbers, image_shape)
            return sample(apply, params, noise, label, w, times, steps, embedded_steps)

        self._run = jax.jit(run)

    def batches(
        self,
        params,
        key: jax.Array,
        labels: Sequence[int],
        *,
        guidance: float,
        schedule: Sequence[float],
    ):
        """Yields (images [b, H, W, C], labels [b]), b at most `batch_size`.

        Args:
          params: parameters, of the `infer` average.
          key: of the noise.
          labels: one for each sample.
          guidance: strength w for all samples.
          schedule: step sizes, see `schedule.check_schedule`.

        Raises:
          ValueError: the schedule is not one that the network was trained for.
        """
        arrays = schedules.times_and_sizes(schedule, self.base_steps)
        labels = jnp.asarray(labels, jnp.int32)
        for start in range(0, len(labels), self.batch_size):
            label = labels[start : start + self.batch_size]
            kept = len(label)
            # The last batch is filled up, so that nothing is compiled for its size.
            padding = self.batch_size - kept
            images = self._run(
                params,
                key,
                start + jnp.arange(self.batch_size),
                jnp.pad(label, (0, padding)),
                jnp.full((self.batch_size,), guidance, jnp.float32),
                *arrays,
            )
            yield images[:kept], label
