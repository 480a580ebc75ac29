"""Improved MeanFlow (iMF; Geng et al., arXiv 2512.02012).

MeanFlow's identity, read as a prediction of the velocity (the paper's equation 8; its
time runs from data to noise and its mean velocity has the opposite sign):

    V = s - sg( d ds/dt ),   ds/dt = JVP of s along (v, 1, -1) in (x, t, d)
    L = E |e|^2 / sg( |e|^2 + eps )^p,   e = V - sg(v_g)

so the regression target v_g does not depend on the step. The direction v is predicted:
with `tangent = 'boundary'` by the network at d = 0; with 'head' by an auxiliary head on
the same trunk, which is trained by the same loss with V replaced by its output.

Guidance is intrinsic. The scale 1 + w is drawn with density (1 + w)^-beta, and guidance
acts in an interval of times with random ends. Scale and interval are inputs:

    v_g = (x1 - x0) + w_t / (1 + w_t) (v(c, w_t) - v(null, 0)),
    w_t = w inside the interval, else 0; v is the direction at the interval [0, 1].

1 - t and 1 - t - d are two sorted draws of sigmoid(N(-0.4, 1)). Half of the samples
have d = 0 and the interval [0, 1]. Dropped labels have the target x1 - x0.

Sampler: x_{t+d} = x_t + d s(x_t, t, c, d, w, interval).

Differences from the official code: samples with d = 0 and samples with the null label
are drawn independently, not both from the start of the batch; the direction of samples
with the null label is v(null, 0); the derivative is computed only for d > 0. The
official network is not conditioned on t.
"""

import dataclasses
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
from ism_jax.method.loss_terms import adaptive_loss, loss_terms
from ism_jax.method.training_batch import Batch, Inputs
from ism_jax.objectives.base import BaseObjective, option


@dataclasses.dataclass(frozen=True)
class Objective(BaseObjective):
    """Improved MeanFlow; see the module."""

    label_dropout: float = option(0.1, 'probability that a label becomes null')
    batch_split: tuple[int, int] = option((1, 1), 'ratio of samples, d = 0 : d > 0')
    tangent: Literal['boundary', 'head'] = option(
        'head', "predicts the direction: 'boundary' (d = 0) or 'head' (auxiliary head)"
    )
    guidance_max: float = option(7.0, 'largest guidance scale w in training')
    guidance_beta: float = option(1.0, 'beta in the density (1 + w)^-beta of w')
    time_mean: float = option(-0.4, 'mean of the normal whose sigmoid is 1 - t')
    time_std: float = option(1.0, 'its standard deviation; see time_mean')
    norm_power: float = option(1.0, 'exponent p of the adaptive weight; 0 for none')
    norm_eps: float = option(0.01, 'eps of the adaptive weight, added to |e|^2')

    def __call__(
        self, apply, params, target_params, batch: Batch, key, *, distance, progress
    ):
        del target_params, progress  # The online network is the teacher.
        key_v, key_u, key_label = jax.random.split(key, 3)
        label = guidance.drop_labels(
            key_label, batch.label, self.label_dropout, self.num_classes
        )
        # Suffix v: samples with d = 0, for the velocity; u: d > 0, the mean velocity.
        batch_v, batch_u = training_batch.split(
            batch._replace(label=label), self.batch_split
        )
        repeats = batch.label.shape[0] // self.batch_multiple
        inputs_v = self._inputs(batch_v, key_v)._replace(
            d=jnp.zeros(batch_v.label.shape),
            interval=_whole_interval(batch_v.label.shape[0]),
        )
        inputs_u = self._inputs(batch_u, key_u)

        teacher = jax.lax.stop_gradient(params)
        (guided_v, _), (guided_u, direction) = self._velocities(
            apply, teacher, repeats, (inputs_v, inputs_u), (batch_v, batch_u)
        )
        target_u = interpolant.step(
            guided_u,
            mean_velocity.derivative(apply, teacher, inputs_u, direction),
            inputs_u.d,
        )
        (mean_v, head_v), (mean_u, head_u) = training_batch.apply_together(
            self._both_heads(apply), params, repeats, inputs_v, inputs_u
        )
        terms = dict(velocity=(mean_v, guided_v), mean_velocity=(mean_u, target_u))
        if self.tangent == 'head':
            terms |= dict(head_v=(head_v, guided_v), head_u=(head_u, guided_u))
        errors, metrics = loss_terms(distance, **terms)
        loss = adaptive_loss(
            errors, batch.data.shape, power=self.norm_power, eps=self.norm_eps
        )
        return loss, metrics

    def _inputs(self, batch: Batch, key) -> Inputs:
        key_t, key_w, key_interval = jax.random.split(key, 3)
        num = batch.label.shape[0]
        t, d = time_grid.sample_steps(key_t, num, self.time_mean, self.time_std)
        x = interpolant.interpolate(batch.noise, batch.data, t)
        w = guidance.power_law_guidance(
            key_w, num, self.guidance_max, self.guidance_beta
        )
        interval = guidance.sample_interval(key_interval, num)
        return Inputs(x, t, d, w, batch.label, interval)

    def _velocities(self, apply, params, repeats, parts, batches):
        """v_g and the direction of each part, both [B, H, W, C], from one call."""
        acting = [
            guidance.interval_guidance(p.w, p.t, p.interval[:, 0], p.interval[:, 1])
            for p in parts
        ]
        conditional = [
            part._replace(
                d=jnp.zeros_like(part.d), w=w, interval=_whole_interval(w.shape[0])
            )
            for part, w in zip(parts, acting, strict=True)
        ]
        unconditional = [
            part._replace(
                w=jnp.zeros_like(part.w),
                label=jnp.full_like(part.label, self.num_classes),
            )
            for part in conditional
        ]
        calls = training_batch.apply_together(
            self._both_heads(apply), params, repeats, *conditional, *unconditional
        )
        calls = [head for _, head in calls]
        results = []
        for batch, w, v_c, v_null in zip(
            batches, acting, calls[:2], calls[2:], strict=True
        ):
            null = batch.label == self.num_classes
            w = jnp.where(null, 0.0, w)
            velocity = batch.data - batch.noise
            guided = guidance.guided_velocity(velocity, v_c, v_null, w / (1 + w))
            results.append((guided, jnp.where(null[:, None, None, None], v_null, v_c)))
        return results

    def _both_heads(self, apply):
        """The network with two outputs: the mean velocity and the direction."""
        if self.tangent == 'head':
            return lambda params, *inputs: apply(params, *inputs, with_velocity=True)

        def twice(params, *inputs):
            velocity = apply(params, *inputs)
            return velocity, velocity

        return twice

    @property
    def has_forward_derivative(self) -> bool:
        return True

    @property
    def batch_multiple(self) -> int:
        return sum(self.batch_split)

    @property
    def guidance_range(self) -> tuple[float, float]:
        return 0.0, self.guidance_max

    @property
    def conditions_on_interval(self) -> bool:
        return True

    @property
    def model_options(self) -> dict:
        # With a scale of 1000 the derivatives of the time embedding would dominate.
        return {
            'step_embedding': 'size',
            'time_scale': 1.0,
            'guidance_embedding': 'ratio',
            'interval_input': True,
            'velocity_head': 1 if self.tangent == 'head' else 0,
        }


def _whole_interval(num: int) -> jax.Array:
    return jnp.tile(jnp.array([[0.0, 1.0]]), (num, 1))
