"""Shortcut Models (SM; Frans et al., arXiv 2410.12557), after the official code.

One in `bootstrap_every` samples is bootstrapped, the others are flow matching:

    flow       s(x_t, t, c', 0)  against  x1 - (1 - 1e-5) x0,
                 x_t = (1 - (1 - 1e-5) t) x0 + t x1,  t a multiple of 1/128
    bootstrap  s(x_t, t, c, 2d)  against  clip( g1 / 2 + g2 / 2 ),
                 g1 = G[s'](x_t, t, c, d),  g2 = G[s'](x', t + d, c, d),
                 x' = clip( x_t + d g1 )

with s' the average and, at the levels that `cfg_levels` names, classifier-free guidance
G[s'](c) = s'(null) + (1 + w) (s'(c) - s'(null)); elsewhere G[s'] = s'. The scale 1 + w
is fixed in training. With 'finest', as in the official code, it enters once, in steps
of 1/128, and is passed on. With 'all' it is applied again at every doubling, and grows
to (1 + w) ** log2(N) in a step over N finest ones (iSM, arXiv 2510.21250,
proposition 1: compounding guidance); `null` itself is bootstrapped nowhere, as in the
official code, so its long steps are learned only as far as the network generalises.

Sampler: x + 2d s(x, t, c, 2d); the finest step is an instantaneous velocity, which
training has not guided, so it takes classifier-free guidance with the same scale, as
in the official code's evaluation while training.

Differences from the official code: the bootstrapped samples and those of flow matching
are never the same images, and none is left out. Its average for targets has the decay
0.999; here `config.ema` says.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from ism_jax.method import guidance, interpolant, time_grid, training_batch
from ism_jax.method.training_batch import Batch, Inputs
from ism_jax.objectives.base import BaseObjective, check_fraction

# The path ends at a little noise, as in the official code.
NOISE_FLOOR = 1e-5


@dataclasses.dataclass(frozen=True)
class Objective(BaseObjective):
    """See the module.

    Attributes:
      label_dropout: probability that a label becomes `null`, in flow matching.
      bootstrap_every: one in so many samples is bootstrapped.
      base_steps: 1 / the finest step, a power of two.
      guidance: w = scale - 1 of the guidance in the targets; 0 for none.
      cfg_levels: where it is applied, 'finest' or 'all'.
      target_clip: midpoints and bootstrapped targets are kept in [-clip, clip].
    """

    label_dropout: float = 0.1
    bootstrap_every: int = 8
    base_steps: int = 128
    guidance: float = 0.5
    cfg_levels: Literal['finest', 'all'] = 'finest'
    target_clip: float = 4.0

    def __post_init__(self):
        check_fraction('objective.label_dropout', self.label_dropout)
        time_grid.check_base_steps(self.base_steps, 'objective.base_steps')
        if self.bootstrap_every < 2:
            raise ValueError(
                f'objective.bootstrap_every = {self.bootstrap_every} must be at least '
                '2, so that a share of the batch is left for flow matching; 8 is usual'
            )
        if not self.guidance >= 0:
            raise ValueError(
                f'objective.guidance = {self.guidance} must be at least 0; it is the '
                'scale - 1, 0.5 for a scale of 1.5'
            )
        if self.cfg_levels not in ('finest', 'all'):
            raise ValueError(
                f"objective.cfg_levels = {self.cfg_levels!r} must be 'finest' or 'all'"
            )
        if not self.target_clip > 0:
            raise ValueError(
                f'objective.target_clip = {self.target_clip} must be above 0; 4 is '
                "usual, float('inf') clips nothing"
            )

    def __call__(
        self, apply, params, target_params, batch: Batch, key, *, distance, progress
    ):
        del progress  # No curriculum.
        key_t, key_label, key_start = jax.random.split(key, 3)
        batch_b, batch_f = training_batch.split(batch, (1, self.bootstrap_every - 1))
        patterns = batch_b.label.shape[0]

        t = jax.random.randint(key_t, batch_f.label.shape, 0, self.base_steps)
        t = t.astype(jnp.float32) / self.base_steps
        zeros = jnp.zeros_like(t)
        label = interpolant.drop_labels(
            key_label, batch_f.label, self.label_dropout, self.num_classes
        )
        flow = Inputs(self._interpolate(batch_f, t), t, zeros, zeros, label)
        flow_target = batch_f.data - (1 - NOISE_FLOOR) * batch_f.noise

        # Each size equally often; what is left over are whole paths.
        levels = time_grid.num_levels(self.base_steps)
        number = jnp.arange(patterns)
        even = patterns // levels * levels
        level = jnp.where(number < even, number % levels, 0)
        steps = 2.0 ** level.astype(jnp.float32)  # Whole steps on the path: 1 / 2d.
        t = jnp.floor(jax.random.uniform(key_start, (patterns,)) * steps) / steps
        coarse = Inputs(
            self._interpolate(batch_b, t),
            t,
            1 / steps,
            jnp.zeros_like(t),
            batch_b.label,
        )
        target = self.bootstrap_target(
            apply, target_params, coarse.x, t, 0.5 / steps, batch_b.label
        )

        predictions = training_batch.apply_together(
            apply, params, patterns, coarse, flow
        )
        loss, metrics = jnp.zeros(()), {}
        for name, prediction, target in zip(
            ('bootstrap', 'velocity'), predictions, (target, flow_target), strict=True
        ):
            values, parts = distance(prediction - jax.lax.stop_gradient(target))
            loss += values.sum() / batch.label.shape[0]
            metrics[f'{name}/loss'] = values.mean()
            metrics |= {f'{name}/{part}': e.mean() for part, e in parts.items()}
        return loss, metrics

    def bootstrap_target(self, apply, params, x, t, d, label) -> jax.Array:
        """Mean of two steps of size d, the target of one of size 2d.

        Args:
          apply, params: the network and the average that makes targets.
          x: [B, H, W, C]; t, d, label: [B], `d` the half step.

        Returns:
          [B, H, W, C].
        """
        guided = (d < 1.5 / self.base_steps) | (self.cfg_levels == 'all')
        w = jnp.where(guided, self.guidance, 0.0)
        clip = lambda array: jnp.clip(array, -self.target_clip, self.target_clip)
        first = self._guided(apply, params, x, t, d, w, label)
        midpoint = clip(interpolant.step(x, first, d))
        second = self._guided(apply, params, midpoint, t + d, d, w, label)
        return clip(0.5 * (first + second))

    def _guided(self, apply, params, x, t, d, w, label):
        """A step's velocity with classifier-free guidance of strength w [B]."""
        embedded = time_grid.embedded_step(d, self.base_steps)
        if not self.guidance:
            return apply(params, x, t, embedded, jnp.zeros_like(t), label)
        return guidance.classifier_free_velocity(
            apply, params, x, t, embedded, label, w, self.num_classes
        )

    def _interpolate(self, batch, t):
        return interpolant.interpolate(batch.noise, batch.data, t) + (
            NOISE_FLOOR * t[:, None, None, None] * batch.noise
        )

    def velocity(self, apply, params, x, t, d, w, label):
        plain = super().velocity
        if not self.guidance:
            return plain(apply, params, x, t, d, w, label)
        return jax.lax.cond(
            jnp.all(d < 1.5 / self.base_steps),
            lambda: self._guided(apply, params, x, t, d, w, label),
            lambda: plain(apply, params, x, t, d, jnp.zeros_like(w), label),
        )

    @property
    def batch_multiple(self) -> int:
        return self.bootstrap_every

    @property
    def min_batch(self) -> int:
        """So that every step size is trained in every batch."""
        return time_grid.num_levels(self.base_steps) * self.bootstrap_every

    @property
    def guidance_range(self) -> tuple[float, float]:
        return self.guidance, self.guidance

    @property
    def uses_target_ema(self) -> bool:
        return True
