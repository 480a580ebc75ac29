"""Improved shortcut models (iSM, arXiv 2510.21250): velocity, guidance, consistency.

    L = a_v L_velocity + a_g L_guidance + a_c L_consistency

    L_velocity     d = 0, w = 0:  s(x_t, t, c', 0, 0)  against  x1 - x0
    L_guidance     d = 0, w > 0:  s(x_t, t, c, 0, w)   against
                     (x1 - x0) + w_t sg( s'(x_t, t, c, 0, 0) - s'(x_t, t, null, 0, 0) )
    L_consistency  d > 0, w >= 0: s(x_t, t, c, 2d, w)  against
                     sg( s'(x_t, t, c, d, w) / 2 + s'(x', t + d, c, d, w) / 2 ),
                     x' = x_t + d s'(x_t, t, c, d, w)

with s the online network and s' the target average. Each sample of a batch serves one
of the three terms, so the online network runs forward and backward once over the
batch; the target network runs once for everything that starts at x_t and once more
for the second half-steps.

Choices that the paper leaves open, or prints otherwise:
  * The poster's equation (10) shows `t` in the second half-step, where the derivation
    needs `t + d`; we use `t + d`.
  * It shows the online network in x'; `midpoint = 'online'` does that, at the price
    of one more forward pass. 'target' is the default.
  * Guidance targets come from the target average, as in the table's "twin EMA" row.
  * `batch_split` gives each term its share of the batch; each term is a mean over its
    samples, so the shares change the variance of a term and not its weight.
  * t ~ U(0, 1) where d = 0. In self-consistency the step sizes 2d are dealt in equal
    numbers and t is uniform on the multiples of 2d.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from ism_jax.method import guidance, interpolant, time_grid, training_batch
from ism_jax.method.training_batch import Batch, Inputs, apply_together
from ism_jax.objectives.base import BaseObjective, check_fraction

PARTS = ('velocity', 'guidance', 'consistency')


@dataclasses.dataclass(frozen=True)
class Objective(BaseObjective):
    """See the module.

    Attributes:
      label_dropout: probability that a label becomes `null`, in the velocity term.
      batch_split: ratio velocity : guidance : consistency of a batch, whole numbers.
      loss_weights: (a_v, a_g, a_c).
      base_steps: 1 / the finest step, a power of two.
      intrinsic_guidance: False gives the guidance term's share to the velocity term
        and keeps w = 0 everywhere.
      guidance_max, guidance_step: w is drawn from {step, 2 step, ..., max}, and 0 too
        in self-consistency.
      guidance_interval: guidance acts from this time on; 0 switches the interval off.
      midpoint: which network moves to x', 'target' or 'online'.
    """

    label_dropout: float = 0.1
    # Open in the paper, as is `midpoint`; figures as in `ism_jax.config.default`:
    # (1, 1, 2) 23.2 / 10.3, (6, 1, 1) 22.8 / 10.8.
    batch_split: tuple[int, int, int] = (2, 1, 1)
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    base_steps: int = 128
    intrinsic_guidance: bool = True
    guidance_max: float = 3.5
    guidance_step: float = 0.25
    guidance_interval: float = 0.3
    midpoint: Literal['target', 'online'] = 'target'  # 'online' 21.0 / 10.4.

    def __post_init__(self):
        check_fraction('objective.label_dropout', self.label_dropout)
        check_fraction('objective.guidance_interval', self.guidance_interval)
        time_grid.check_base_steps(self.base_steps, 'objective.base_steps')
        _check_triple('objective.batch_split', self.batch_split)
        _check_triple('objective.loss_weights', self.loss_weights)
        if any(share != int(share) for share in self.batch_split):
            raise ValueError(
                f'objective.batch_split = {self.batch_split} must be whole numbers, '
                'such as (2, 1, 1) for a half and two quarters'
            )
        if self.midpoint not in ('target', 'online'):
            raise ValueError(
                f"objective.midpoint = {self.midpoint!r} must be 'target' or 'online'"
            )
        count = self.guidance_max / self.guidance_step if self.guidance_step > 0 else 0
        if count < 1 or abs(count - round(count)) > 1e-6:
            raise ValueError(
                f'objective.guidance_max = {self.guidance_max} must be a positive '
                f'multiple of objective.guidance_step = {self.guidance_step}'
            )

    def __call__(
        self, apply, params, target_params, batch: Batch, key, *, distance, progress
    ):
        del progress  # No curriculum.
        key_v, key_g, key_c = jax.random.split(key, 3)
        batch_v, batch_g, batch_c = training_batch.split(batch, self._shares())
        patterns = batch.label.shape[0] // self.batch_multiple

        # The finest steps are `d = 0` calls: one teacher batch holds all that start
        # at x_t, whatever their step size and guidance.
        velocity = self._velocity_inputs(batch_v, key_v)
        guided = self._guided_inputs(batch_g, key_g)
        coarse, d = self._consistency_inputs(batch_c, key_c)
        fine = coarse._replace(d=time_grid.embedded_step(d, self.base_steps))
        unlabeled = guided._replace(label=jnp.full_like(guided.label, self.num_classes))
        conditional, unconditional, first = apply_together(
            apply,
            target_params,
            patterns,
            guided._replace(w=jnp.zeros_like(guided.w)),
            unlabeled._replace(w=jnp.zeros_like(guided.w)),
            fine,
        )
        midpoint = first
        if self.midpoint == 'online':
            (midpoint,) = apply_together(apply, params, patterns, fine)
        second_inputs = fine._replace(
            x=interpolant.step(fine.x, midpoint, d), t=fine.t + d
        )
        (second,) = apply_together(apply, target_params, patterns, second_inputs)

        targets = (
            batch_v.data - batch_v.noise,
            guidance.guided_velocity(
                batch_g.data - batch_g.noise,
                conditional,
                unconditional,
                guidance.interval_guidance(guided.w, guided.t, self.guidance_interval),
            ),
            0.5 * (first + second),
        )
        predictions = apply_together(apply, params, patterns, velocity, guided, coarse)

        loss, metrics = jnp.zeros(()), {}
        for name, weight, prediction, target in zip(
            PARTS, self.loss_weights, predictions, targets, strict=True
        ):
            if not prediction.shape[0]:
                continue
            values, parts = distance(prediction - jax.lax.stop_gradient(target))
            loss += weight * values.mean()
            metrics[f'{name}/loss'] = values.mean()
            metrics |= {f'{name}/{part}': e.mean() for part, e in parts.items()}
            if name == 'consistency':
                metrics |= self._per_level(values, coarse.d)
        return loss, metrics

    def _shares(self) -> tuple[int, int, int]:
        velocity, guided, consistency = self.batch_split
        if self.intrinsic_guidance:
            return velocity, guided, consistency
        return velocity + guided, 0, consistency

    def _velocity_inputs(self, batch: Batch, key) -> Inputs:
        key_t, key_label = jax.random.split(key)
        t = jax.random.uniform(key_t, batch.label.shape)
        label = interpolant.drop_labels(
            key_label, batch.label, self.label_dropout, self.num_classes
        )
        x = interpolant.interpolate(batch.noise, batch.data, t)
        return Inputs(x, t, jnp.zeros_like(t), jnp.zeros_like(t), label)

    def _guided_inputs(self, batch: Batch, key) -> Inputs:
        key_t, key_w = jax.random.split(key)
        t = jax.random.uniform(key_t, batch.label.shape)
        w = self._sample_guidance(key_w, t.shape[0], include_zero=False)
        x = interpolant.interpolate(batch.noise, batch.data, t)
        return Inputs(x, t, jnp.zeros_like(t), w, batch.label)

    def _consistency_inputs(self, batch: Batch, key) -> tuple[Inputs, jax.Array]:
        """Inputs of the whole step 2d, and the half step d [B]."""
        key_level, key_t, key_w = jax.random.split(key, 3)
        num = batch.label.shape[0]
        levels = time_grid.num_levels(self.base_steps)
        # Each size equally often, and whose turn it is to get one more at random.
        level = (
            jnp.arange(num) + jax.random.randint(key_level, (), 0, levels)
        ) % levels
        steps = 2.0 ** level.astype(jnp.float32)  # Whole steps on the path: 1 / 2d.
        t = jnp.floor(jax.random.uniform(key_t, (num,)) * steps) / steps
        w = self._sample_guidance(key_w, num, include_zero=True)
        x = interpolant.interpolate(batch.noise, batch.data, t)
        return Inputs(x, t, 1 / steps, w, batch.label), 0.5 / steps

    def _sample_guidance(self, key, num, *, include_zero):
        if not self.intrinsic_guidance:
            return jnp.zeros((num,))
        values = guidance.guidance_values(
            self.guidance_max, self.guidance_step, include_zero=include_zero
        )
        return guidance.sample_guidance(key, num, values)

    def _per_level(self, values, whole_step) -> dict[str, jax.Array]:
        """Mean self-consistency error and number of samples of each step size."""
        metrics = {}
        for level in range(time_grid.num_levels(self.base_steps)):
            chosen = whole_step == 0.5**level
            count = chosen.sum()
            error = jnp.where(chosen, values, 0.0).sum() / jnp.maximum(count, 1)
            metrics[f'consistency_error/step_1_over_{2**level}'] = error
            metrics[f'consistency_samples/step_1_over_{2**level}'] = count
        return metrics

    @property
    def guidance_range(self) -> tuple[float, float]:
        return 0.0, self.guidance_max if self.intrinsic_guidance else 0.0

    @property
    def uses_target_ema(self) -> bool:
        return True

    @property
    def batch_multiple(self) -> int:
        """Batch sizes must be a multiple of this, so that the split is exact."""
        return sum(self.batch_split)

    @property
    def min_batch(self) -> int:
        """Smallest batch in which self-consistency sees every step size.

        With fewer samples some sizes would never be trained in a step; official
        shortcut-models code then silently gives every sample the size 1.
        """
        consistency = self._shares()[2]
        if not consistency:
            return self.batch_multiple
        patterns = math.ceil(time_grid.num_levels(self.base_steps) / consistency)
        return patterns * self.batch_multiple


def _check_triple(name: str, values) -> None:
    if len(values) != 3 or min(values) < 0 or not 0 < sum(values) < math.inf:
        raise ValueError(
            f'{name} = {values} must be three numbers of at least 0, not all 0: '
            'velocity, guidance, consistency'
        )
