"""Consistency training (iCT; Song and Dhariwal, arXiv 2310.14189) on the flow path.

A point x_t of the straight path is t (data + sigma noise) with sigma = (1 - t) / t, so
iCT's noise levels are times, t = 1 / (1 + sigma). The consistency function is a jump
to the end of the path at sigma_min, exactly the identity there:

    f(x, t) = x + (t_end - t) s(x, t, c, 0, 0),  t_end = 1 / (1 + sigma_min)

(Euler-FM in IMM's words, arXiv 2503.07565: this network's output is a velocity). Two
neighbours of a discretisation sigma_1 < ... < sigma_N, same data and noise:

    L = E 1 / (sigma_{i+1} - sigma_i) H( f(x_{i+1}, t_{i+1}) - sg f(x_i, t_i) )
    H(e) = sqrt( |e|^2 + c^2 ) - c,  c = 0.00054 sqrt(D)                  (section 3.4)
    sigma_i = (sigma_min^(1/7) + (i-1)/(N-1) (sigma_max^(1/7) - sigma_min^(1/7)))^7
    N(k) = min( s0 2^floor(k / K'), s1 ) + 1,
      K' = floor( K / (log2 floor(s1 / s0) + 1) )                         (section 3.5)
    p(i) ~ erf((ln sigma_{i+1} - P) / (sqrt(2) S)) - erf((ln sigma_i - P) / (sqrt(2) S))
                                                                          (section 3.6)

The teacher is the online network without gradient (section 3.2): no average.

Sampler: one jump; in more steps, noise is added again after each jump, to the time of
the next (Song et al., arXiv 2303.01469, algorithm 1). No guidance.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ism_jax.method import interpolant
from ism_jax.method.training_batch import Batch
from ism_jax.objectives.base import BaseObjective

RHO = 7.0
HUBER = 0.00054  # c / sqrt(D)


@dataclasses.dataclass(frozen=True)
class Objective(BaseObjective):
    """See the module.

    Attributes:
      sigma_min, sigma_max: of the noise levels.
      first_intervals, last_intervals: s0 and s1 of the curriculum.
      log_mean, log_std: P and S of the noise levels' distribution.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    first_intervals: int = 10
    last_intervals: int = 1280
    log_mean: float = -1.1
    log_std: float = 2.0

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f'objective.sigma_min = {self.sigma_min} and sigma_max = '
                f'{self.sigma_max} must be 0 < sigma_min < sigma_max; 0.002 and 80 are '
                'usual'
            )
        if not 1 <= self.first_intervals <= self.last_intervals:
            raise ValueError(
                f'objective.first_intervals = {self.first_intervals} must lie in 1 .. '
                f'last_intervals = {self.last_intervals}'
            )
        if not self.log_std > 0:
            raise ValueError(f'objective.log_std = {self.log_std} must be above 0')

    def __call__(
        self, apply, params, target_params, batch: Batch, key, *, distance, progress
    ):
        del target_params  # iCT's teacher is the network itself.
        intervals = self.num_intervals(progress)
        sigma = self.sigmas(intervals)  # Constant from its last interval on.
        upper, lower = jnp.log(sigma[1:]), jnp.log(sigma[:-1])
        cdf = lambda x: jax.scipy.special.erf(
            (x - self.log_mean) / (math.sqrt(2) * self.log_std)
        )
        inside = jnp.arange(self.last_intervals) < intervals
        density = jnp.where(inside, cdf(upper) - cdf(lower), 0.0)
        index = jax.random.categorical(key, jnp.log(density), shape=batch.label.shape)

        noisy, cleaner = sigma[index + 1], sigma[index]
        jump = lambda params, level: self.jump(
            apply,
            params,
            interpolant.interpolate(batch.noise, batch.data, 1 / (1 + level)),
            1 / (1 + level),
            batch.label,
        )
        error = jump(params, noisy) - jax.lax.stop_gradient(jump(params, cleaner))
        values, parts = distance(error)
        dimension = math.prod(error.shape[1:])
        huber = HUBER * math.sqrt(dimension)
        losses = jnp.sqrt(dimension * values + huber**2) - huber
        loss = jnp.mean(losses / (noisy - cleaner))
        metrics = {f'consistency/{name}': part.mean() for name, part in parts.items()}
        return loss, {
            'consistency/loss': loss,
            'consistency/error': values.mean(),
            'consistency/intervals': intervals,
            **metrics,
        }

    def num_intervals(self, progress) -> jax.Array:
        """N(k) - 1, how many intervals the noise levels are cut into."""
        doublings = math.log2(self.last_intervals // self.first_intervals)
        stage = jnp.floor(progress * (doublings + 1))
        return jnp.minimum(self.first_intervals * 2.0**stage, self.last_intervals)

    def sigmas(self, intervals) -> jax.Array:
        """[last_intervals + 1] noise levels, rising; the last repeats to fill up."""
        place = jnp.minimum(jnp.arange(self.last_intervals + 1.0) / intervals, 1.0)
        low, high = self.sigma_min ** (1 / RHO), self.sigma_max ** (1 / RHO)
        return (low + place * (high - low)) ** RHO

    def jump(self, apply, params, x, t, label) -> jax.Array:
        """The consistency function f; x [B, H, W, C], t and label [B]."""
        zeros = jnp.zeros_like(t)
        rest = 1 / (1 + self.sigma_min) - t
        return interpolant.step(x, apply(params, x, t, zeros, zeros, label), rest)

    def sample(self, apply, params, noise, label, w, times, steps, key):
        del w  # No guidance.

        def body(carry, step):
            x, key = carry
            key, key_noise = jax.random.split(key)
            t, d = (jnp.full(label.shape, value) for value in self.clip_step(*step))
            data = self.jump(apply, params, x, t, label)
            fresh = jax.random.normal(key_noise, x.shape)
            return (interpolant.interpolate(fresh, data, t + d), key), None

        # x_t at the first time, of whose data nothing is known.
        first = (1 - self.start_time) * noise
        return jax.lax.scan(body, (first, key), (times, steps))[0][0]

    @property
    def start_time(self) -> float:
        return 1 / (1 + self.sigma_max)

    @property
    def conditions_on_step(self) -> bool:
        return False

    @property
    def deterministic(self) -> bool:
        return False
