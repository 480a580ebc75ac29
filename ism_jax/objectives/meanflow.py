"""MeanFlow (Geng et al., arXiv 2505.13447): mean velocities by one derivative.

u(x_t, t, d) is the mean velocity from t to t + d. Differentiating d u(x_t, t, d) along
the path with its end t + d held fixed gives the MeanFlow identity (the source's
equation 6; its time runs from data to noise, ours from noise to data):

    u = v + d du/dt,   du/dt = JVP of u along (v, 1, -1) in (x, t, d)
    L = E |e|^2 / sg( |e|^2 + eps )^p,   e = u(x_t, t, d) - sg( v_g + d du/dt )
    v_g = omega v + (1 - omega - kappa) u(x_t, t, 0 | null) + kappa u(x_t, t, 0 | c)

with v = x1 - x0; v_g is also the tangent. The guidance that results has the scale
1 + w = omega / (1 - kappa) and is part of the training. 1 - t and 1 - t - d are two
draws of sigmoid(N(-0.4, 1)), sorted; d = 0 for a share of 0.75. The `null` label keeps
v itself.

Sampler: x_{t+d} = x_t + d u(x_t, t, d).

Differences from the official code: the samples without a step and those without a label
are not taken from the same head of the batch; the derivative is computed only for the
samples that have a step.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ism_jax.method import interpolant, training_batch
from ism_jax.method.training_batch import Batch, Inputs
from ism_jax.objectives.base import BaseObjective, check_fraction


@dataclasses.dataclass(frozen=True)
class Objective(BaseObjective):
    """See the module.

    Attributes:
      label_dropout: probability that a label becomes `null`.
      batch_split: ratio of samples with d = 0 to samples with a step.
      guidance: w of the guidance in the targets; 0 for none.
      guidance_mix: kappa, the share of the network's own conditional velocity.
      guidance_start, guidance_end: times between which guidance acts.
      time_mean, time_std: of the normal whose sigmoid is a noise level 1 - t.
      norm_power, norm_eps: p and eps of the adaptive weight.
    """

    label_dropout: float = 0.1
    batch_split: tuple[int, int] = (3, 1)
    guidance: float = 1.0
    guidance_mix: float = 0.5
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    time_mean: float = -0.4
    time_std: float = 1.0
    norm_power: float = 1.0
    norm_eps: float = 0.01

    def __post_init__(self):
        check_fraction('objective.label_dropout', self.label_dropout)
        check_fraction('objective.guidance_mix', self.guidance_mix)
        split = self.batch_split
        if len(split) != 2 or any(s != int(s) or s < 0 for s in split) or not split[1]:
            raise ValueError(
                f'objective.batch_split = {split} must be two whole numbers: '
                'samples with d = 0 and, at least 1, with a step; (3, 1) is usual'
            )
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f'objective.guidance = {self.guidance} must be at least 0')
        if not 0 <= self.guidance_start <= self.guidance_end <= 1:
            raise ValueError(
                f'objective.guidance_start = {self.guidance_start} and guidance_end = '
                f'{self.guidance_end} must be 0 <= start <= end <= 1'
            )
        for name in ('time_std', 'norm_eps'):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f'objective.{name} = {getattr(self, name)} must be above 0'
                )

    def __call__(
        self, apply, params, target_params, batch: Batch, key, *, distance, progress
    ):
        del target_params  # The teacher is the network itself.
        key_still, key_moving, key_label = jax.random.split(key, 3)
        label = interpolant.drop_labels(
            key_label, batch.label, self.label_dropout, self.num_classes
        )
        batches = training_batch.split(batch._replace(label=label), self.batch_split)
        patterns = batch.label.shape[0] // self.batch_multiple
        (t_still, _), (t_moving, d) = (
            self.sample_steps(k, part.label.shape[0])
            for k, part in zip((key_still, key_moving), batches)
        )
        still, moving = (
            Inputs(
                interpolant.interpolate(part.noise, part.data, t),
                t, d, jnp.zeros_like(t), part.label,
            )
            for part, t, d in zip(
                batches, (t_still, t_moving), (jnp.zeros_like(t_still), d)
            )
        )  # fmt: skip
        teacher = jax.lax.stop_gradient(params)
        velocities = self._guided_velocities(
            apply, teacher, patterns, (still, moving), batches
        )
        targets = (
            velocities[0],
            self.mean_velocity(apply, teacher, moving, velocities[1], progress),
        )
        predictions = training_batch.apply_together(
            apply, params, patterns, still, moving
        )

        loss, metrics = jnp.zeros(()), {}
        for name, prediction, target in zip(
            ('velocity', 'mean_velocity'), predictions, targets, strict=True
        ):
            if not prediction.shape[0]:
                continue
            values, parts = distance(prediction - jax.lax.stop_gradient(target))
            square = math.prod(prediction.shape[1:]) * values
            weight = jax.lax.stop_gradient(square + self.norm_eps) ** self.norm_power
            loss += jnp.sum(square / weight) / batch.label.shape[0]
            metrics[f'{name}/loss'] = values.mean()
            metrics |= {f'{name}/{part}': e.mean() for part, e in parts.items()}
        return loss, metrics

    def sample_steps(self, key, num: int) -> tuple[jax.Array, jax.Array]:
        """Draws t and d, each [num], 0 < t < t + d < 1."""
        normal = jax.random.normal(key, (2, num))
        level = jax.nn.sigmoid(self.time_mean + self.time_std * normal)
        noisier, cleaner = level.max(0), level.min(0)
        return 1 - noisier, noisier - cleaner

    def mean_velocity(self, apply, params, inputs, velocity, progress) -> jax.Array:
        """Target v + d du/dt of the mean velocity over a step.

        Args:
          apply, params: the network and the parameters that make targets.
          inputs: `batch_parts.Inputs`.
          velocity: v at the start of the step, [B, H, W, C]; it is the tangent too.
          progress: of the training; not used here.
        """
        del progress
        x, t, d, w, label = inputs
        _, slope = jax.jvp(
            lambda x, t, d: apply(params, x, t, d, w, label),
            (x, t, d),
            (velocity, jnp.ones_like(t), -jnp.ones_like(d)),
        )
        return interpolant.step(velocity, slope, d)

    def _guided_velocities(self, apply, params, patterns, parts, batches):
        """v_g of each part, [B, H, W, C]; one call of the network for all of them."""
        velocities = [batch.data - batch.noise for batch in batches]
        if not self.guidance:
            return velocities
        now = [part._replace(d=jnp.zeros_like(part.d)) for part in parts]
        null = [
            part._replace(label=jnp.full_like(part.label, self.num_classes))
            for part in now
        ]
        calls = training_batch.apply_together(apply, params, patterns, *now, *null)
        return [
            self.guided_velocity(v, conditional, unconditional, part.t, part.label)
            for v, conditional, unconditional, part in zip(
                velocities, calls[:2], calls[2:], parts, strict=True
            )
        ]

    def guided_velocity(
        self, velocity, conditional, unconditional, t, label
    ) -> jax.Array:
        """v_g, all [B, H, W, C] but t and label [B]."""
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

    def velocity(self, apply, params, x, t, d, w, label):
        return apply(params, x, t, d, jnp.zeros_like(w), label)

    @property
    def batch_multiple(self) -> int:
        return sum(self.batch_split)

    @property
    def guidance_range(self) -> tuple[float, float]:
        return self.guidance, self.guidance

    @property
    def model_options(self) -> dict:
        # With times of 0 to 1000 the sinusoids' derivatives drown all others.
        return {'step_embedding': 'size', 'time_scale': 1.0}
