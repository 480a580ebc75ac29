"""MeanFlow (Geng et al., arXiv 2505.13447): mean velocities from a derivative.

u(x_t, t, d) is the mean velocity from t to t + d. Differentiating d u(x_t, t, d) along
the path at a fixed end t + d gives the MeanFlow identity (the paper's equation 6; its
time runs from data to noise, ours from noise to data):

    u = v + d du/dt,   du/dt = JVP of u along (v, 1, -1) in (x, t, d)
    L = E |e|^2 / sg( |e|^2 + eps )^p,   e = u(x_t, t, d) - sg( v_g + d du/dt )
    v_g = omega v + (1 - omega - kappa) u(x_t, t, 0 | null) + kappa u(x_t, t, 0 | c)

with v = x1 - x0; v_g is also the tangent, and v_g = v for the null label. Training
fixes the resulting guidance, 1 + w = omega / (1 - kappa). 1 - t and 1 - t - d are two
sorted draws of sigmoid(N(-0.4, 1)), and three quarters of the samples have d = 0.

Sampler: x_{t+d} = x_t + d u(x_t, t, d).

Differences from the official code: samples with d = 0 and samples with the null label
are drawn independently, not both from the start of the batch; the derivative is
computed only for samples with d > 0.
"""

import dataclasses

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
    """MeanFlow; see the module."""

    label_dropout: float = option(0.1, 'probability that a label becomes null')
    batch_split: tuple[int, int] = option((3, 1), 'ratio of samples, d = 0 : d > 0')
    guidance: float = option(1.0, 'guidance scale w in the targets; 0 for none')
    guidance_mix: float = option(
        0.5, "kappa, share of the network's conditional velocity in the targets"
    )
    guidance_start: float = option(0.0, 'time t from which guidance applies')
    guidance_end: float = option(1.0, 'time t until which guidance applies')
    time_mean: float = option(-0.4, 'mean of the normal whose sigmoid is 1 - t')
    time_std: float = option(1.0, 'its standard deviation; see time_mean')
    norm_power: float = option(1.0, 'exponent p of the adaptive weight; 0 for none')
    norm_eps: float = option(0.01, 'eps of the adaptive weight, added to |e|^2')

    def __call__(
        self, apply, params, target_params, batch: Batch, key, *, distance, progress
    ):
        del target_params  # The online network is the teacher.
        # Suffix v: samples with d = 0, for the velocity; u: d > 0, the mean velocity.
        key_v, key_u, key_label = jax.random.split(key, 3)
        label = guidance.drop_labels(
            key_label, batch.label, self.label_dropout, self.num_classes
        )
        batch_v, batch_u = training_batch.split(
            batch._replace(label=label), self.batch_split
        )
        size = batch.label.shape[0]
        repeats = size // self.batch_multiple
        t_v, _ = self.sample_steps(key_v, batch_v.label.shape[0])
        t_u, d_u = self.sample_steps(key_u, batch_u.label.shape[0])
        inputs_v = _inputs(batch_v, t_v, jnp.zeros_like(t_v))
        inputs_u = _inputs(batch_u, t_u, d_u)

        teacher = jax.lax.stop_gradient(params)
        target_v, velocity_u = self._guided_velocities(
            apply, teacher, repeats, (inputs_v, inputs_u), (batch_v, batch_u)
        )
        prediction_v, prediction_u = training_batch.apply_together(
            apply, params, repeats, inputs_v, inputs_u
        )
        target_u = self.mean_velocity_target(
            apply, teacher, inputs_u, velocity_u, prediction_u, progress
        )
        errors, metrics = loss_terms(
            distance,
            velocity=(prediction_v, target_v),
            mean_velocity=(prediction_u, target_u),
        )
        loss = adaptive_loss(
            errors, batch.data.shape, power=self.norm_power, eps=self.norm_eps
        )
        return loss, metrics

    def sample_steps(self, key, num: int) -> tuple[jax.Array, jax.Array]:
        """Random t and d, each [num], with 0 < t <= t + d < 1."""
        return time_grid.sample_steps(key, num, self.time_mean, self.time_std)

    def mean_velocity_target(
        self, apply, params, inputs, velocity, prediction, progress
    ) -> jax.Array:
        """Target v + d du/dt of the mean velocity over a step, [B, H, W, C].

        `params` are those of the teacher; `velocity` is v at the start of the step,
        [B, H, W, C], and also the tangent. The student's `prediction` [B, H, W, C] and
        `progress` are for alpha-Flow.
        """
        del prediction, progress
        slope = mean_velocity.derivative(apply, params, inputs, velocity)
        return interpolant.step(velocity, slope, inputs.d)

    def _guided_velocities(self, apply, params, repeats, parts, batches):
        """v_g of each part, [B, H, W, C], from one call of the network."""
        velocities = [batch.data - batch.noise for batch in batches]
        if not self.guidance:
            return velocities
        labeled = [part._replace(d=jnp.zeros_like(part.d)) for part in parts]
        null = [
            part._replace(label=jnp.full_like(part.label, self.num_classes))
            for part in labeled
        ]
        calls = training_batch.apply_together(apply, params, repeats, *labeled, *null)
        return [
            self.guided_velocity(v, conditional, unconditional, part.t, part.label)
            for v, conditional, unconditional, part in zip(
                velocities, calls[:2], calls[2:], parts, strict=True
            )
        ]

    def guided_velocity(
        self, velocity, conditional, unconditional, t, label
    ) -> jax.Array:
        """v_g; all arrays [B, H, W, C] except t and label [B]."""
        acts = (t >= self.guidance_start) & (t <= self.guidance_end)
        acts &= label != self.num_classes
        omega = (1 + self.guidance) * (1 - self.guidance_mix)
        omega, kappa = (
            jnp.where(acts, value, off)[:, None, None, None]
            for value, off in ((omega, 1.0), (self.guidance_mix, 0.0))
        )
        return (
            omega * velocity + (1 - omega - kappa) * unconditional + kappa * conditional
        )

    def step_condition(self, d, w):
        return d, 0.0 * w  # Guidance is a part of the targets.

    @property
    def has_forward_derivative(self) -> bool:
        return True

    @property
    def batch_multiple(self) -> int:
        return sum(self.batch_split)

    @property
    def guidance_range(self) -> tuple[float, float]:
        return self.guidance, self.guidance

    @property
    def model_options(self) -> dict:
        # With a scale of 1000 the derivatives of the time embedding would dominate.
        return {'step_embedding': 'size', 'time_scale': 1.0}


def _inputs(batch: Batch, t, d) -> Inputs:
    x = interpolant.interpolate(batch.noise, batch.data, t)
    return Inputs(x, t, d, jnp.zeros_like(t), batch.label)
