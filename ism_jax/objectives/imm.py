"""Inductive moment matching (IMM; Zhou et al., arXiv 2503.07565).

The paper's time a = 1 - t runs from data to noise; a jump leads from a to s <= a.
Groups of M samples share (s, r, a) with s <= r <= a; y jumps from a and z from r, both
to s:

    f_{s,a}(x) = x + (a - s) s_theta( c_in(a) x, 1 - a, c, a - s )      (Euler-FM)
    y = f_{s,a}(x_a),   z = sg f_{s,r}(x_r),   x_a and x_r of the same data and noise
    L = weight * mean over j, k of [ k(y_j, y_k) + k(z_j, z_k) - 2 k(y_j, z_k) ]
    k(y, z) = exp( - max(|y - z|, 1e-8) / (D (a - s)) )
    weight = 1/2 sigmoid(b - lambda) (2 / (a (1 - a))) (1 - a)^p / ((1 - a)^2 + a^2),
      lambda = 2 ln((1 - a) / a),  b = 4,  p = 1
    a ~ U(0, 0.994),  s ~ U(0, a),
      r = max(s, min(a - 1e-4, eta^-1(eta(a) - 160 / 2^12))),  eta(a) = a / (1 - a)

The paper scales data to a standard deviation sigma_d = 0.5 and noise with it. Here
noise has standard deviation 1, so the formulas hold in units of sigma_d; `data_std` is
that of the data in these units (1 in the paper) and enters only
c_in(a) = 1 / sqrt((1 - a)^2 data_std^2 + a^2). In the paper, training
collapses with M = 1 or 2.

Samplers: 'pushforward' jumps from each time to the next; 'restart' jumps to the data
and adds noise up to the next time. Both apply classifier-free guidance where w > 0: two
network calls per step.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from ism_jax.method import guidance, interpolant
from ism_jax.method.loss_terms import term_metrics
from ism_jax.method.training_batch import Batch
from ism_jax.objectives.base import BaseObjective, option

MAX_NOISE = 0.994  # The largest a.
MIN_NOISE = 1e-6  # The smallest a; at 0 the weight is 0 times infinity.
ETA_STEP = 160 / 2**12
MIN_STEP = 1e-4  # a - r
MIN_NORM = 1e-8
WEIGHT_BIAS = 4.0  # b
WEIGHT_POWER = 1  # p


@dataclasses.dataclass(frozen=True)
class Objective(BaseObjective):
    """Inductive moment matching; see the module."""

    label_dropout: float = option(0.1, 'probability that a label becomes null')
    group_size: int = option(4, 'M, number of samples that share their times')
    data_std: float = option(
        0.5, 'standard deviation of the data if that of the noise is 1'
    )
    sampler: Literal['pushforward', 'restart'] = option(
        'pushforward', "'pushforward' or 'restart', which adds noise between steps"
    )

    def __call__(
        self, apply, params, target_params, batch: Batch, key, *, distance, progress
    ):
        del target_params, progress  # The online network is the teacher.
        key_times, key_label = jax.random.split(key)
        size = self.group_size
        groups = batch.label.shape[0] // size
        high, middle, low = self.sample_times(key_times, groups)
        label = guidance.drop_labels(
            key_label, batch.label, self.label_dropout, self.num_classes
        )

        def jump(start):
            start, end = jnp.repeat(start, size), jnp.repeat(low, size)
            x = interpolant.interpolate(batch.noise, batch.data, 1 - start)
            zeros = jnp.zeros_like(start)
            velocity = self._scaled(apply)(
                params, x, 1 - start, start - end, zeros, label
            )
            end_point = interpolant.step(x, velocity, start - end)
            return end_point.reshape(groups, size, *x.shape[1:])

        y = jump(high)
        z = jax.lax.stop_gradient(jump(middle))
        kernel = lambda first, second: self.kernel(first, second, high - low, distance)
        discrepancy = kernel(y, y) + kernel(z, z) - 2 * kernel(y, z)
        loss = jnp.mean(self.weight(high) * discrepancy)
        values, parts = distance((y - z).reshape(batch.data.shape))
        return loss, term_metrics('moments', loss, parts) | {
            'moments/discrepancy': discrepancy.mean(),
            'moments/error': values.mean(),
        }

    def sample_times(self, key, num: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Random a, r and s, each [num], with s <= r <= a."""
        key_high, key_low = jax.random.split(key)
        high = jax.random.uniform(key_high, (num,), minval=MIN_NOISE, maxval=MAX_NOISE)
        low = high * jax.random.uniform(key_low, (num,))
        eta = high / (1 - high) - ETA_STEP
        middle = jnp.minimum(high - MIN_STEP, eta / (1 + eta))
        return high, jnp.maximum(low, middle), low

    def kernel(self, first, second, width, distance) -> jax.Array:
        """Mean of the Laplace kernel over all pairs of each group, [G].

        Groups are [G, M, H, W, C]; `width` [G] is a - s; the squared norm is D times
        the values of `distance`.
        """
        error = first[:, :, None] - second[:, None]
        shape = error.shape[3:]
        dimension = math.prod(shape)
        square = dimension * distance(error.reshape(-1, *shape))[0]
        # The maximum also keeps the gradient of a sample with itself finite.
        norm = jnp.sqrt(jnp.maximum(square, MIN_NORM**2))
        norm = norm.reshape(first.shape[0], -1)
        return jnp.exp(-norm / (dimension * width[:, None])).mean(1)

    def weight(self, a) -> jax.Array:
        """Weight of the loss at the noise level a, [G]."""
        log_snr = 2 * jnp.log((1 - a) / a)
        slope = 2 / (a * (1 - a))
        shape = (1 - a) ** WEIGHT_POWER / ((1 - a) ** 2 + a**2)
        return 0.5 * jax.nn.sigmoid(WEIGHT_BIAS - log_snr) * slope * shape

    def _scaled(self, apply):
        """The network with inputs scaled to unit standard deviation by c_in."""

        def scaled(params, x, t, *rest):
            scale = jax.lax.rsqrt((t * self.data_std) ** 2 + (1 - t) ** 2)
            return apply(params, scale[:, None, None, None] * x, t, *rest)

        return scaled

    def velocity(self, apply, params, x, t, d, w, label):
        return guidance.optional_guidance(
            self._scaled(apply), params, x, t, d, label, w, self.num_classes
        )

    def step_condition(self, d, w):
        return None  # The input of the network is scaled.

    def network_calls(self, steps, w):
        return 2 * steps if w else steps

    def sample(self, apply, params, noise, label, w, times, steps, key):
        if self.sampler == 'pushforward':
            return super().sample(apply, params, noise, label, w, times, steps, key)

        def jump(x, t):
            velocity = self.velocity(apply, params, x, t, 1 - t, w, label)
            return interpolant.step(x, velocity, 1 - t)

        return self.restart(jump, noise, label, times, steps, key)

    @property
    def start_time(self) -> float:
        return 1 - MAX_NOISE

    @property
    def batch_multiple(self) -> int:
        return self.group_size

    @property
    def guidance_range(self) -> tuple[float, float]:
        return 0.0, math.inf if self.label_dropout else 0.0

    @property
    def model_options(self) -> dict:
        return {'step_embedding': 'size'}

    @property
    def deterministic(self) -> bool:
        return self.sampler == 'pushforward'
