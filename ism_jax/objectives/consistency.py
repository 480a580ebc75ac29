"""Consistency training (iCT; Song and Dhariwal, arXiv 2310.14189) on the flow path.

On the straight path x_t = t (data + sigma noise) with sigma = (1 - t) / t, so iCT's
noise levels correspond to times t = 1 / (1 + sigma). The consistency function jumps to
the end of the path at sigma_min, where it is exactly the identity:

    f(x, t) = x + (t_end - t) s(x, t, c, 0, 0),  t_end = 1 / (1 + sigma_min)

(the network's output is a velocity; IMM, arXiv 2503.07565, calls this Euler-FM). It is
compared at neighbouring levels of a discretisation sigma_1 < ... < sigma_N, with the
same data and noise:

    L = E 1 / (sigma_{i+1} - sigma_i) H( f(x_{i+1}, t_{i+1}) - sg f(x_i, t_i) )
    H(e) = sqrt( |e|^2 + c^2 ) - c,  c = 0.00054 sqrt(D)                  (section 3.4)
    sigma_i = (sigma_min^(1/7) + (i-1)/(N-1) (sigma_max^(1/7) - sigma_min^(1/7)))^7
    N(k) = min( s0 2^floor(k / K'), s1 ) + 1,
      K' = floor( K / (log2 floor(s1 / s0) + 1) )                         (section 3.5)
    p(i) ~ erf((ln sigma_{i+1} - P) / (sqrt(2) S)) - erf((ln sigma_i - P) / (sqrt(2) S))
                                                                          (section 3.6)

The teacher is the online network without gradient, not an EMA (section 3.2).

Sampler: one jump. With more steps, noise is added after each jump, up to the time of
the next (Song et al., arXiv 2303.01469, algorithm 1). No guidance.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ism_jax.method import interpolant
from ism_jax.method.loss_distance import pseudo_huber
from ism_jax.method.loss_terms import term_metrics
from ism_jax.method.training_batch import Batch
from ism_jax.objectives.base import BaseObjective, option

RHO = 7.0  # Exponent of the noise levels.
HUBER = 0.00054  # c / sqrt(D)


@dataclasses.dataclass(frozen=True)
class Objective(BaseObjective):
    """Consistency training; see the module."""

    sigma_min: float = option(0.002, 'lowest noise level')
    sigma_max: float = option(80.0, 'highest noise level')
    first_intervals: int = option(10, 's0, number of noise intervals at the start')
    last_intervals: int = option(1280, 's1, number of noise intervals at the end')
    log_mean: float = option(-1.1, 'P, mean of the logarithm of the noise level')
    log_std: float = option(2.0, 'S, standard deviation of this logarithm')

    def __call__(
        self, apply, params, target_params, batch: Batch, key, *, distance, progress
    ):
        del target_params  # The online network is the teacher.
        intervals = self.num_intervals(progress)
        sigma = self.sigmas(intervals)  # Constant after the last interval in use.
        upper, lower = jnp.log(sigma[1:]), jnp.log(sigma[:-1])
        erf = lambda log_sigma: jax.scipy.special.erf(
            (log_sigma - self.log_mean) / (math.sqrt(2) * self.log_std)
        )
        in_use = jnp.arange(self.last_intervals) < intervals
        density = jnp.where(in_use, erf(upper) - erf(lower), 0.0)
        index = jax.random.choice(
            key, self.last_intervals, batch.label.shape, p=density
        )

        high, low = sigma[index + 1], sigma[index]

        def jump(level):
            t = 1 / (1 + level)
            x_t = interpolant.interpolate(batch.noise, batch.data, t)
            return self.jump(apply, params, x_t, t, batch.label)

        error = jump(high) - jax.lax.stop_gradient(jump(low))
        values, parts = distance(error)
        dimension = math.prod(error.shape[1:])
        huber = HUBER * math.sqrt(dimension)
        losses = pseudo_huber(dimension * values, huber)
        loss = jnp.mean(losses / (high - low))
        return loss, term_metrics('consistency', loss, parts) | {
            'consistency/error': values.mean(),
            'consistency/intervals': intervals,
        }

    def num_intervals(self, progress) -> jax.Array:
        """N(k) - 1, the number of intervals between noise levels."""
        doublings = math.log2(self.last_intervals // self.first_intervals)
        stage = jnp.floor(progress * (doublings + 1))
        return jnp.minimum(self.first_intervals * 2.0**stage, self.last_intervals)

    def sigmas(self, intervals) -> jax.Array:
        """Increasing noise levels, [last_intervals + 1], padded with the last one."""
        position = jnp.minimum(jnp.arange(self.last_intervals + 1.0) / intervals, 1.0)
        low, high = self.sigma_min ** (1 / RHO), self.sigma_max ** (1 / RHO)
        return (low + position * (high - low)) ** RHO

    def jump(self, apply, params, x, t, label) -> jax.Array:
        """The consistency function f, [B, H, W, C]; t and label [B]."""
        rest = 1 / (1 + self.sigma_min) - t
        velocity = self.velocity(apply, params, x, t, None, None, label)
        return interpolant.step(x, velocity, rest)

    def velocity(self, apply, params, x, t, d, w, label):
        del d, w  # The step of a jump ends at the data, and there is no guidance.
        zeros = jnp.zeros_like(t)
        return apply(params, x, t, zeros, zeros, label)

    def sample(self, apply, params, noise, label, w, times, steps, key):
        del w  # No guidance.
        jump = lambda x, t: self.jump(apply, params, x, t, label)
        # x_t at the start time, without the data: its weight is 1 / (1 + sigma_max).
        first = (1 - self.start_time) * noise
        return self.restart(jump, first, label, times, steps, key)

    def step_condition(self, d, w):
        return None  # Each step jumps to the data.

    @property
    def start_time(self) -> float:
        return 1 / (1 + self.sigma_max)

    @property
    def conditions_on_step(self) -> bool:
        return False

    @property
    def deterministic(self) -> bool:
        return False

    @property
    def has_curriculum(self) -> bool:
        return True
