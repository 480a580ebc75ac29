"""Improved shortcut models (iSM, arXiv 2510.21250): velocity, guidance, consistency.

    L = a_v L_velocity + a_g L_guidance + a_c L_consistency

    L_velocity     d = 0, w = 0:  s(x_t, t, c', 0, 0)  against  x1 - x0
    L_guidance     d = 0, w > 0:  s(x_t, t, c, 0, w)   against
                     (x1 - x0) + w_t sg( s'(x_t, t, c, 0, 0) - s'(x_t, t, null, 0, 0) )
    L_consistency  d > 0, w >= 0: s(x_t, t, c, 2d, w)  against
                     sg( s'(x_t, t, c, d, w) / 2 + s'(x', t + d, c, d, w) / 2 ),
                     x' = x_t + d s'(x_t, t, c, d, w)

with s the online network, s' the target EMA, and w_t = w where t is within the guidance
interval, else 0. The batch is split among the three terms, so the online network runs
forward and backward once over the batch. The target EMA runs once on all inputs at x_t
and once on the second half-steps.

Choices that the paper leaves open, and deviations from its text:
  * The poster's equation (10) has `t` in the second half-step, where the derivation
    needs `t + d`; we use `t + d`.
  * The poster uses the online network in x'. `midpoint = 'online'` does the same, at
    the cost of one more forward pass; 'target' is the default.
  * Guidance targets use the target EMA, as in the table's "twin EMA" row.
  * Each term is a mean over its own samples, so `batch_split` changes the variance of a
    term and not its weight.
  * t ~ U(0, 1) where d = 0. In self-consistency the step sizes 2d have equal numbers of
    samples, and t is uniform on the multiples of 2d.

Options beyond the paper:
  * `step_draw` trains any t and d, instead of the dyadic ones: with 'ends', t and t + d
    are two random times; with 'uniform', d ~ U(0, 1) and t ~ U(0, 1 - d), so that long
    steps are more frequent. The velocity is then the limit of small steps. The two
    steps of the target may meet anywhere (`bootstrap_split = 'random'`), as flow maps
    compose at any time (Boffi et al., arXiv 2406.07507).
  * `consistency = 'derivative'` has the target s = v + d ds/dt for such steps, where
    v = s'(x_t, t, c, 0, w); 'difference' replaces the Jacobian-vector product by a
    finite difference. See `method.mean_velocity`. The derivative is that of the online
    network, as in MeanFlow; with that of the target EMA, training often diverges. If
    the network has the error e, the target has the error d de/dt, and a network that
    goes the share r of the way to the target has the error (1 - r) e + r d de/dt. This
    is Euler's method, with step r, for a linear flow that carries errors from short
    steps to long ones: it damps them if r is small, and amplifies rough ones if r is
    near 1. A training step is a small r. But if the target lags, the network nearly
    reaches each target before the target moves. The bootstrap averages two outputs, so
    it amplifies nothing at any r.
  * `consistency_huber` is the scale c of a pseudo-Huber loss of the consistency term
    (iCT, arXiv 2310.14189). With e the RMS error of a sample, errors far below c have
    the loss e^2, as without it, and those far above 2 c e. The target has the network's
    own noise in it, so a few samples would dominate the gradient.
  * `guidance_target = 'guided'` has the target
    (x1 - x0) + w_t / (1 + w_t) sg( s'(x_t, t, c, 0, w) - s'(x_t, t, null, 0, 0) ).
    Both targets have the fixed point v(c) + w_t (v(c) - v(null)). This one multiplies
    the teacher's errors by less than 1, the other by w (improved MeanFlow, arXiv
    2512.02012).
  * `interval = 'input'` conditions the network on the interval (improved MeanFlow).
  * `null_share` trains the null label, without guidance, in all terms.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from ism_jax.method import (
    guidance,
    interpolant,
    mean_velocity,
    time_grid,
    training_batch,
)
from ism_jax.method.loss_distance import pseudo_huber
from ism_jax.method.loss_terms import loss_terms
from ism_jax.method.training_batch import Batch, Inputs, apply_together
from ism_jax.objectives.base import BaseObjective, option


@dataclasses.dataclass(frozen=True)
class Objective(BaseObjective):
    """Improved shortcut models; see the module."""

    label_dropout: float = option(
        0.1, 'probability that a label becomes null, in the velocity term'
    )
    # Open in the paper, as is `midpoint`. Frechet distances in 1 / 4 steps of
    # `configs/ablation.py:ism`: (2, 1, 1) 20.6 / 9.6, (1, 1, 2) 23.2 / 10.3,
    # (6, 1, 1) 22.8 / 10.8.
    batch_split: tuple[int, int, int] = option(
        (2, 1, 1), 'ratio of samples, velocity : guidance : consistency'
    )
    loss_weights: tuple[float, float, float] = option(
        (1.0, 1.0, 1.0), 'weights of velocity, guidance and consistency'
    )
    base_steps: int = option(128, '1 / the finest step size, a power of two')
    intrinsic_guidance: bool = option(
        True,
        'condition on w; False keeps w = 0 and gives the guidance share to velocity',
    )
    guidance_max: float = option(3.5, 'largest guidance scale w in training')
    guidance_step: float = option(
        0.25, 'w in training: step, 2 step, ..., guidance_max; also 0 in consistency'
    )
    guidance_interval: float = option(
        0.3, 'time t from which guidance applies; 0 for all times'
    )
    # 'target' 20.6 / 9.6, 'online' 21.0 / 10.4.
    midpoint: Literal['target', 'online'] = option(
        'target', "network of the first half-step: 'target' (EMA) or 'online'"
    )
    consistency: Literal['bootstrap', 'derivative', 'difference'] = option(
        'bootstrap',
        "target of a step: 'bootstrap' (two steps), 'derivative' or 'difference'",
    )
    difference_distance: float = option(
        0.005, "time between the points of consistency = 'difference'; larger in bf16"
    )
    step_draw: Literal['dyadic', 'ends', 'uniform'] = option(
        'dyadic',
        "steps of consistency: 'dyadic', between two random 'ends', or 'uniform' in d",
    )
    bootstrap_split: Literal['half', 'random'] = option(
        'half', "where the two steps of 'bootstrap' meet: in 'half', or at 'random'"
    )
    consistency_huber: float = option(
        0.0,
        'c of the loss 2 c (sqrt(e^2 + c^2) - c) of consistency errors e; 0 for e^2',
    )
    interval: Literal['fixed', 'input'] = option(
        'fixed', "guidance acts from guidance_interval on, or between two 'input' times"
    )
    guidance_target: Literal['unguided', 'guided'] = option(
        'unguided', "teacher of the guidance target: at w = 0, or 'guided' at w"
    )
    guidance_draw: Literal['grid', 'uniform', 'log_uniform'] = option(
        'grid', "w in training: on a 'grid', 'uniform', or 'log_uniform' in 1 + w"
    )
    guidance_power: float = option(
        0.0, 'p in the weight (1 + w)^-p of the errors; 0 for none'
    )
    step_power: float = option(
        0.0, 'p in the weight d^p of consistency errors; 0 for none'
    )
    null_share: float = option(
        0.0, 'probability that a label becomes null, in guidance and consistency'
    )
    time_draw: time_grid.TimeDraw = option(
        'uniform', "t at d = 0 and ends of random steps: 'uniform' or 'logit_normal'"
    )
    time_mean: float = option(0.0, 'mean of the normal whose sigmoid is t')
    time_std: float = option(1.0, 'its standard deviation; see time_mean')

    def __call__(
        self, apply, params, target_params, batch: Batch, key, *, distance, progress
    ):
        del progress  # No curriculum.
        key_v, key_g, key_c = jax.random.split(key, 3)
        batch_v, batch_g, batch_c = training_batch.split(batch, self._shares())
        repeats = batch.label.shape[0] // self.batch_multiple

        velocity = self._velocity_inputs(batch_v, key_v)
        guided = self._guided_inputs(batch_g, key_g)
        coarse, part = self._consistency_inputs(batch_c, key_c)
        # One teacher call for all inputs at x_t, at any step size and guidance.
        conditional, unconditional, first = apply_together(
            apply,
            target_params,
            repeats,
            *self._guidance_pair(guided),
            coarse._replace(d=self._embedded(part)),
        )
        guided_target = guidance.guided_velocity(
            batch_g.data - batch_g.noise,
            conditional,
            unconditional,
            self._acting_guidance(guided),
        )
        consistency_target = self._consistency_target(
            apply, params, target_params, repeats, coarse, part, first
        )
        prediction_v, prediction_g, prediction_c = apply_together(
            apply, params, repeats, velocity, guided, coarse
        )
        errors, metrics = loss_terms(
            distance,
            velocity=(prediction_v, batch_v.data - batch_v.noise),
            guidance=(prediction_g, guided_target),
            consistency=(prediction_c, consistency_target),
        )
        if 'consistency' in errors:
            metrics |= self._per_level(errors['consistency'], coarse.d)
        return self._weighted(errors, guided, coarse), metrics

    def _weighted(self, errors, guided: Inputs, coarse: Inputs) -> jax.Array:
        """The loss: the weighted sum of the terms' weighted means."""
        terms = ('velocity', 'guidance', 'consistency')
        weights = dict(zip(terms, self.loss_weights, strict=True))
        if self.guidance_power:
            for name, inputs in (('guidance', guided), ('consistency', coarse)):
                if name in errors:
                    errors[name] *= (1 + inputs.w) ** -self.guidance_power
        if self.consistency_huber and 'consistency' in errors:
            c = self.consistency_huber
            errors['consistency'] = 2 * c * pseudo_huber(errors['consistency'], c)
        if self.step_power and 'consistency' in errors:
            errors['consistency'] *= coarse.d**self.step_power
        return sum(weights[name] * errors[name].mean() for name in errors)

    def _shares(self) -> tuple[int, int, int]:
        """`batch_split`, with the guidance share moved to velocity if unused."""
        velocity, guided, consistency = self.batch_split
        if self.intrinsic_guidance:
            return velocity, guided, consistency
        return velocity + guided, 0, consistency

    def _velocity_inputs(self, batch: Batch, key) -> Inputs:
        key_t, key_label, key_interval = jax.random.split(key, 3)
        t = self._sample_times(key_t, batch.label.shape[0])
        label = guidance.drop_labels(
            key_label, batch.label, self.label_dropout, self.num_classes
        )
        x = interpolant.interpolate(batch.noise, batch.data, t)
        zeros = jnp.zeros_like(t)
        interval = self._sample_interval(key_interval, t.shape[0])
        return Inputs(x, t, zeros, zeros, label, interval)

    def _guided_inputs(self, batch: Batch, key) -> Inputs:
        key_t, key_w, key_label, key_interval = jax.random.split(key, 4)
        num = batch.label.shape[0]
        t = self._sample_times(key_t, num)
        w = self._sample_guidance(key_w, num, include_zero=False)
        x = interpolant.interpolate(batch.noise, batch.data, t)
        label = self._with_nulls(key_label, batch.label)
        interval = self._sample_interval(key_interval, num)
        return Inputs(x, t, jnp.zeros_like(t), w, label, interval)

    def _consistency_inputs(self, batch: Batch, key) -> tuple[Inputs, jax.Array]:
        """Inputs of a step from t to t + d, and the size of its first part."""
        key_d, key_t, key_w, key_label, key_interval = jax.random.split(key, 5)
        num = batch.label.shape[0]
        if self.dyadic:
            levels = time_grid.num_levels(self.base_steps)
            # Equal numbers of each size; a random offset picks those with one more.
            offset = jax.random.randint(key_d, (), 0, levels)
            steps = 2.0 ** ((jnp.arange(num) + offset) % levels).astype(jnp.float32)
            t = jnp.floor(jax.random.uniform(key_t, (num,)) * steps) / steps
            d = 1 / steps
        elif self.step_draw == 'ends':
            ends = self._sample_times(key_t, 2 * num).reshape(2, num)
            t = ends.min(0)
            d = ends.max(0) - t
        else:
            d = jax.random.uniform(jax.random.fold_in(key_d, 0), (num,))
            t = jax.random.uniform(key_t, (num,)) * (1 - d)
        if self.consistency != 'bootstrap':
            part = jnp.zeros_like(d)
        elif self.bootstrap_split == 'half':
            part = 0.5 * d
        else:
            part = d * jax.random.uniform(jax.random.fold_in(key_d, 1), (num,))
        w = self._sample_guidance(key_w, num, include_zero=True)
        x = interpolant.interpolate(batch.noise, batch.data, t)
        label = self._with_nulls(key_label, batch.label)
        interval = self._sample_interval(key_interval, num)
        return Inputs(x, t, d, w, label, interval), part

    def _sample_times(self, key, num) -> jax.Array:
        return time_grid.sample_times(
            key, num, self.time_draw, self.time_mean, self.time_std
        )

    def _sample_guidance(self, key, num, *, include_zero) -> jax.Array:
        if not self.intrinsic_guidance:
            return jnp.zeros((num,))
        if self.guidance_draw == 'grid':
            values = guidance.guidance_values(
                self.guidance_max, self.guidance_step, include_zero=include_zero
            )
            return guidance.sample_guidance(key, num, values)
        beta = {'uniform': 0.0, 'log_uniform': 1.0}[self.guidance_draw]
        return guidance.power_law_guidance(key, num, self.guidance_max, beta)

    def _sample_interval(self, key, num) -> jax.Array | None:
        if not self.conditions_on_interval:
            return None
        return guidance.sample_interval(key, num)

    def _with_nulls(self, key, label) -> jax.Array:
        if not self.null_share:
            return label
        return guidance.drop_labels(key, label, self.null_share, self.num_classes)

    def _guidance_pair(self, guided: Inputs) -> tuple[Inputs, Inputs]:
        """Conditional and unconditional inputs of the guidance target's teacher."""
        unguided = guided._replace(w=jnp.zeros_like(guided.w))
        null = jnp.full_like(guided.label, self.num_classes)
        conditional = guided if self.guidance_target == 'guided' else unguided
        return conditional, unguided._replace(label=null)

    def _acting_guidance(self, guided: Inputs) -> jax.Array:
        """Factor on the difference of the guidance pair, [B]."""
        start, end = self.guidance_interval, 1.0
        if guided.interval is not None:
            start, end = guided.interval[:, 0], guided.interval[:, 1]
        w = guidance.interval_guidance(guided.w, guided.t, start, end)
        w = jnp.where(guided.label == self.num_classes, 0.0, w)
        return w / (1 + w) if self.guidance_target == 'guided' else w

    def _embedded(self, d) -> jax.Array:
        """The step size that the network is conditioned on."""
        return time_grid.embedded_step(d, self.base_steps) if self.dyadic else d

    def _consistency_target(
        self, apply, params, target_params, repeats, coarse: Inputs, part, first
    ) -> jax.Array:
        """Target over the step of `coarse`.

        Args:
          apply, params, target_params, repeats: see `__call__`.
          coarse: inputs of the step.
          part: size of the first of the two steps of 'bootstrap', else 0, [B].
          first: the teacher's velocity over `part`, [B, H, W, C].
        """
        if self.consistency != 'bootstrap':
            slope = self._derivative(apply, params, repeats, coarse, first)
            return interpolant.step(first, slope, coarse.d)
        move = first
        if self.midpoint == 'online':
            (move,) = apply_together(
                apply, params, repeats, coarse._replace(d=self._embedded(part))
            )
        rest = coarse.d - part
        midpoint = coarse._replace(
            x=interpolant.step(coarse.x, move, part),
            t=coarse.t + part,
            d=self._embedded(rest),
        )
        (second,) = apply_together(apply, target_params, repeats, midpoint)
        share = part / jnp.maximum(coarse.d, jnp.finfo(jnp.float32).tiny)
        share = share[:, None, None, None]
        return share * first + (1 - share) * second

    def _derivative(self, apply, params, repeats, coarse: Inputs, velocity):
        """The derivative of the online network's mean velocity along the path."""
        teacher = jax.lax.stop_gradient(params)
        if self.consistency == 'derivative':
            return mean_velocity.derivative(apply, teacher, coarse, velocity)
        return mean_velocity.difference(
            apply, teacher, repeats, coarse, velocity, self.difference_distance
        )

    def _per_level(self, values, d) -> dict[str, jax.Array]:
        """Mean self-consistency error and number of samples for each step size.

        A random step counts towards the next smaller dyadic size.
        """
        metrics = {}
        for level in range(time_grid.num_levels(self.base_steps)):
            at_level = (d >= 0.5**level) & (d < 2 * 0.5**level)
            count = at_level.sum()
            error = jnp.where(at_level, values, 0.0).sum() / jnp.maximum(count, 1)
            metrics[f'consistency_error/step_1_over_{2**level}'] = error
            metrics[f'consistency_samples/step_1_over_{2**level}'] = count
        return metrics

    @property
    def guidance_range(self) -> tuple[float, float]:
        return 0.0, self.guidance_max if self.intrinsic_guidance else 0.0

    @property
    def conditions_on_interval(self) -> bool:
        return self.intrinsic_guidance and self.interval == 'input'

    @property
    def dyadic(self) -> bool:
        return self.step_draw == 'dyadic'

    @property
    def model_options(self) -> dict:
        options = {'interval_input': True} if self.conditions_on_interval else {}
        if self.dyadic:
            return options
        # With a scale of 1000 the derivatives of the time embedding would dominate.
        return options | {'step_embedding': 'size', 'time_scale': 1.0}

    @property
    def uses_target_ema(self) -> bool:
        return True

    @property
    def has_forward_derivative(self) -> bool:
        return self.consistency == 'derivative'

    @property
    def batch_multiple(self) -> int:
        return sum(self.batch_split)

    @property
    def min_batch(self) -> int:
        # Every step size is trained in every batch. In smaller batches the official
        # shortcut-models code silently gives every sample the size 1.
        consistency = self._shares()[2]
        if not consistency or not self.dyadic:
            return self.batch_multiple
        repeats = math.ceil(time_grid.num_levels(self.base_steps) / consistency)
        return repeats * self.batch_multiple
