"""Flow matching (Lipman et al., arXiv 2210.02747) on the straight path of SiT.

L = E distance( s(x_t, t, c', 0, 0) - (x1 - x0) ),  t ~ U(0, 1), where `c'` is `c`, or
`null` with the label-dropout probability.

Sampler: Euler steps of the instantaneous velocity, with classifier-free guidance,
s(null) + (1 + w) (s(c) - s(null)), where w > 0: two network calls a step.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ism_jax.method import guidance, interpolant
from ism_jax.method.training_batch import Batch
from ism_jax.objectives.base import BaseObjective, check_fraction


@dataclasses.dataclass(frozen=True)
class Objective(BaseObjective):
    """See the module.

    Attributes:
      label_dropout: probability that a label becomes `null`.
    """

    label_dropout: float = 0.1

    def __post_init__(self):
        check_fraction('objective.label_dropout', self.label_dropout)

    def __call__(
        self, apply, params, target_params, batch: Batch, key, *, distance, progress
    ):
        del target_params, progress  # Targets come from the data, always the same way.
        key_t, key_label = jax.random.split(key)
        num = batch.label.shape[0]
        t = jax.random.uniform(key_t, (num,))
        label = interpolant.drop_labels(
            key_label, batch.label, self.label_dropout, self.num_classes
        )
        zeros = jnp.zeros((num,))
        x_t = interpolant.interpolate(batch.noise, batch.data, t)
        prediction = apply(params, x_t, t, zeros, zeros, label)
        values, parts = distance(prediction - (batch.data - batch.noise))
        loss = values.mean()
        metrics = {f'velocity/{name}': part.mean() for name, part in parts.items()}
        return loss, {'velocity/loss': loss, **metrics}

    def velocity(self, apply, params, x, t, d, w, label):
        zeros = jnp.zeros_like(d)  # Only the instantaneous velocity is learned.
        return jax.lax.cond(
            jnp.any(w != 0),
            lambda: guidance.classifier_free_velocity(
                apply, params, x, t, zeros, label, w, self.num_classes
            ),
            lambda: apply(params, x, t, zeros, zeros, label),
        )

    @property
    def guidance_range(self) -> tuple[float, float]:
        return 0.0, math.inf if self.label_dropout else 0.0

    @property
    def conditions_on_step(self) -> bool:
        return False
