"""The trained network that is diagnosed, with the pairs that it was trained on."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.method import interpolant, time_grid
from ism_jax.objectives.base import BaseObjective
from ism_jax.sampling.sampler import Sampler

# The paper's largest w, used where the method sets no limit.
MAX_GUIDANCE = 3.5
# For measurements on few samples of many steps.
NUM_SAMPLES = 64


class Subject(NamedTuple):
    """A trained network with pairs of noise and data.

    Attributes:
      method: name of the objective.
      objective: the objective.
      sampler: few-step sampler of the network.
      parameter_sets: 'online', 'target' (if there is a target EMA) and 'infer' (the
        inference EMA) -> parameters.
      apply: (params, x, t, d, w, label) -> mean velocity over a step, compiled.
      noise, data: pairs as in training, [n, H, W, C].
      label: [n].
      pool_size: number of pairs in a pool; the first `pool_size` rows are one pool.
      coupling: description of how the pairs were made.
      seed: seed of every random choice.
    """

    method: str
    objective: BaseObjective
    sampler: Sampler
    parameter_sets: Mapping[str, Any]
    apply: Callable[..., jax.Array]
    noise: np.ndarray
    data: np.ndarray
    label: np.ndarray
    pool_size: int
    coupling: str
    seed: int

    @property
    def guidance_range(self) -> tuple[float, float]:
        """Lowest and highest w to measure."""
        low, high = self.objective.guidance_range
        return low, min(high, max(low, MAX_GUIDANCE))

    def pairs(self, num: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Noise, data and labels of the first `num` pairs."""
        return tuple(jnp.asarray(x[:num]) for x in (self.noise, self.data, self.label))

    def step_starts(self, rng, num: int, steps: int, after: float = 0.0):
        """See `step_starts`, for the first `num` pairs."""
        noise, data, _ = self.pairs(num)
        base_steps, start_time = self.objective.base_steps, self.objective.start_time
        return step_starts(rng, noise, data, steps, base_steps, after, start_time)

    def velocity(self, x, t, d, w, label) -> jax.Array:
        """Mean velocity over a step, of the inference EMA."""
        return self.apply(self.parameter_sets['infer'], x, t, d, w, label)

    def field(self, x, t, label, w: float = 0.0) -> jax.Array:
        """Velocity of the finest step, as an instantaneous velocity."""
        d = jnp.full_like(t, 1 / self.objective.base_steps)
        return self.velocity(x, t, d, jnp.full_like(t, w), label)

    def field_scale(self) -> float:
        """Scale g of the guidance already in `field`: 1, or 1 + w where w is fixed."""
        low, high = self.objective.guidance_range
        if low != high or not low:
            return 1.0
        noise, _, label = self.pairs(4)
        t = jnp.full(label.shape, 0.5)
        at_low, at_zero = (
            np.asarray(self.field(noise, t, label, w)) for w in (low, 0.0)
        )
        # They differ if the sampler, not the network, applies guidance.
        return 1 + low if np.array_equal(at_low, at_zero) else 1.0

    def cfg_velocity(self, x, t, d, label, steps, scale) -> jax.Array:
        """See `cfg_velocity`, with `field`; `scale` is relative to `field_scale`."""
        null, start = self.objective.num_classes, self.objective.guidance_interval
        return cfg_velocity(self.field, x, t, d, label, null, steps, scale, start)

    def sampler_noise(self, num: int) -> jax.Array:
        """The noise that `samples` starts from, [num, H, W, C]."""
        return self.sampler.noise(jax.random.key(self.seed), np.arange(num))

    def samples(self, steps: int, w: float, num: int) -> np.ndarray:
        """Samples with the labels of the data, [num, H, W, C]; the noise is fixed."""
        key, label = jax.random.key(self.seed), self.label[:num]
        batches = self.sampler.batches(
            self.parameter_sets['infer'], key, label, guidance=w, schedule=steps
        )
        return np.concatenate([np.asarray(images) for images, _ in batches])


def step_sizes(base_steps: int) -> list[int]:
    """N = 1, 2, 4, ..., base_steps: step sizes in units of the finest step."""
    return [2**level for level in range(time_grid.num_levels(base_steps) + 1)]


def step_starts(rng, noise, data, steps, base_steps, after=0.0, start_time=0.0):
    """Points on straight paths at which steps as long as N finest steps start.

    Start times are uniform on the multiples of N finest steps, for steps that end
    later than `after`. A step is cut to its part after `start_time`, where the method's
    time begins.

    Returns:
      x [B, H, W, C], t [B] and the step size d [B].
    """
    size = steps / base_steps
    starts = np.arange(base_steps // steps) * size
    start = rng.choice(starts[starts + size > after], len(noise)).astype(np.float32)
    t = jnp.maximum(start, start_time)
    return interpolant.interpolate(noise, data, t), t, start + size - t


def cfg_velocity(field, x, t, d, label, null, steps, scale, guidance_start=0.0):
    """Mean velocity over d of Euler steps with classifier-free guidance (CFG).

    The velocity is v(null) + g (v(label) - v(null)) with the scale g, and g = 1 before
    `guidance_start`. The number of steps and the scale may be traced.
    """
    null_label = jnp.full_like(label, null)
    small = d / steps

    def body(number, carry):
        x, total = carry
        now = t + number * small
        unconditional = field(x, now, null_label)
        g = jnp.where(now >= guidance_start, scale, 1.0)[:, None, None, None]
        guided = unconditional + g * (field(x, now, label) - unconditional)
        return interpolant.step(x, guided, small), total + guided

    _, total = jax.lax.fori_loop(0, steps, body, (x, jnp.zeros_like(x)))
    return total / steps


def rms(array) -> float:
    """Root mean square over all elements."""
    return float(np.sqrt(np.mean(np.square(np.asarray(array, np.float64)))))


def relative_rms(error, reference) -> float:
    """RMS of `error` relative to that of `reference`.

    Raises:
      ValueError: the reference is zero or not finite.
    """
    size = rms(reference)
    if not 0 < size < np.inf:
        raise ValueError(
            f'the RMS of the reference is {size}, as for an untrained or diverged '
            'network; choose another checkpoint or train for longer'
        )
    return rms(error) / size
