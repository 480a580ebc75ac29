"""Shortcut Models (SM; Frans et al., arXiv 2410.12557), after the official code.

One in `bootstrap_every` samples is bootstrapped; the others train flow matching:

    flow       s(x_t, t, c', 0)  against  x1 - (1 - 1e-5) x0,
                 x_t = (1 - (1 - 1e-5) t) x0 + t x1,  t a multiple of 1/128
    bootstrap  s(x_t, t, c, 2d)  against  clip( g1 / 2 + g2 / 2 ),
                 g1 = G[s'](x_t, t, c, d),  g2 = G[s'](x', t + d, c, d),
                 x' = clip( x_t + d g1 )

with s' the target EMA and, at the levels that `cfg_levels` names, classifier-free
guidance G[s'](c) = s'(null) + (1 + w) (s'(c) - s'(null)); at other levels G[s'] = s'.
Training fixes w. With 'finest', as in the official code, guidance enters once, in steps
of 1/128, and coarser steps inherit it. With 'all' it is applied at every doubling and
compounds to (1 + w) ** log2(N) in a step as long as N finest steps (iSM, arXiv
2510.21250, proposition 1). As in the official code, the null label itself is never
bootstrapped: its long steps are learned only as far as the network generalises.

Sampler: x + 2d s(x, t, c, 2d). The finest step is the instantaneous velocity, which
training does not guide, so the sampler applies classifier-free guidance with the same
w, as the official code does in its evaluation during training.

Differences from the official code: bootstrapped and flow-matching samples are always
different images, and every image of the batch is used. The official target EMA has the
decay 0.999; here it is a config field.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.method import guidance, interpolant, time_grid, training_batch
from ism_jax.method.loss_terms import loss_terms
from ism_jax.method.training_batch import Batch, Inputs
from ism_jax.objectives.base import BaseObjective, option

# Noise that remains at t = 1, as in the official code.
NOISE_FLOOR = 1e-5


@dataclasses.dataclass(frozen=True)
class Objective(BaseObjective):
    """Shortcut Models; see the module."""

    label_dropout: float = option(
        0.1, 'probability that a label becomes null, in flow matching'
    )
    bootstrap_every: int = option(8, 'one in this many samples is bootstrapped')
    bootstrap_weight: float = option(1.0, 'weight of bootstrapped samples')
    base_steps: int = option(128, '1 / the finest step size, a power of two')
    guidance: float = option(0.5, 'guidance scale w in the targets; 0 for none')
    cfg_levels: Literal['finest', 'all'] = option(
        'finest', "step sizes whose targets are guided: 'finest' or 'all'"
    )
    target_clip: float = option(
        4.0, 'midpoints and bootstrap targets are clipped to [-clip, clip]'
    )

    def __call__(
        self, apply, params, target_params, batch: Batch, key, *, distance, progress
    ):
        del progress  # No curriculum.
        key_t, key_label, key_start = jax.random.split(key, 3)
        batch_b, batch_f = training_batch.split(batch, (1, self.bootstrap_every - 1))
        size, repeats = batch.label.shape[0], batch_b.label.shape[0]

        t = jax.random.randint(key_t, batch_f.label.shape, 0, self.base_steps)
        t = t.astype(jnp.float32) / self.base_steps
        zeros = jnp.zeros_like(t)
        label = guidance.drop_labels(
            key_label, batch_f.label, self.label_dropout, self.num_classes
        )
        flow = Inputs(self._interpolate(batch_f, t), t, zeros, zeros, label)
        flow_target = batch_f.data - (1 - NOISE_FLOOR) * batch_f.noise

        # Equal numbers of each step size; the remaining samples step over the whole
        # path.
        levels = time_grid.num_levels(self.base_steps)
        number = np.arange(repeats)
        level = np.where(number < repeats // levels * levels, number % levels, 0)
        steps = 2.0 ** level.astype(np.float32)  # Whole steps on the path: 1 / 2d.
        t = jnp.floor(jax.random.uniform(key_start, (repeats,)) * steps) / steps
        x_t, zeros = self._interpolate(batch_b, t), jnp.zeros_like(t)
        coarse = Inputs(x_t, t, 1 / steps, zeros, batch_b.label)
        bootstrap_target = self.bootstrap_target(
            apply, target_params, x_t, t, 0.5 / steps, batch_b.label
        )

        bootstrap, velocity = training_batch.apply_together(
            apply, params, repeats, coarse, flow
        )
        errors, metrics = loss_terms(
            distance,
            bootstrap=(bootstrap, bootstrap_target),
            velocity=(velocity, flow_target),
        )
        errors['bootstrap'] *= self.bootstrap_weight
        return sum(error.sum() / size for error in errors.values()), metrics

    def bootstrap_target(self, apply, params, x, t, d, label) -> jax.Array:
        """Mean velocity of two steps of size d, the target for one step of size 2d.

        `params` are the target EMA; x is [B, H, W, C], and t, d and label are [B]. d is
        not traced, so that only guided samples run without a label as well.
        """
        guided = np.full(len(d), bool(self.guidance))
        if self.cfg_levels == 'finest':
            guided &= np.asarray(d) < 1.5 / self.base_steps
        guided = np.flatnonzero(guided)
        clip = lambda array: jnp.clip(array, -self.target_clip, self.target_clip)
        embedded = time_grid.embedded_step(d, self.base_steps)
        w = jnp.full(len(x), self.guidance)

        def velocity(x, t):
            return guidance.classifier_free_velocity(
                apply, params, x, t, embedded, label, w, self.num_classes, guided
            )

        first = velocity(x, t)
        second = velocity(clip(interpolant.step(x, first, d)), t + d)
        return clip(0.5 * (first + second))

    def _interpolate(self, batch, t):
        return interpolant.interpolate(batch.noise, batch.data, t) + (
            NOISE_FLOOR * t[:, None, None, None] * batch.noise
        )

    def velocity(self, apply, params, x, t, d, w, label):
        embedded = time_grid.embedded_step(d, self.base_steps)
        plain = lambda: apply(params, x, t, embedded, jnp.zeros_like(w), label)
        if not self.guidance:
            return plain()
        return jax.lax.cond(
            jnp.all(d < 1.5 / self.base_steps),
            lambda: guidance.classifier_free_velocity(
                apply, params, x, t, embedded, label, w, self.num_classes
            ),
            plain,
        )

    def step_condition(self, d, w):
        if self.guidance and d < 1.5 / self.base_steps:
            return None
        return time_grid.embedded_step(d, self.base_steps), 0.0 * w

    def network_calls(self, steps, w):
        return 2 * steps if w and steps == self.base_steps else steps

    @property
    def batch_multiple(self) -> int:
        return self.bootstrap_every

    @property
    def min_batch(self) -> int:
        # Every step size is trained in every batch.
        return time_grid.num_levels(self.base_steps) * self.bootstrap_every

    @property
    def guidance_range(self) -> tuple[float, float]:
        return self.guidance, self.guidance

    @property
    def dyadic(self) -> bool:
        return True

    @property
    def uses_target_ema(self) -> bool:
        return True
