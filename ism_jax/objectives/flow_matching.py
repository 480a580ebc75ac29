"""Flow matching (Lipman et al., arXiv 2210.02747) on the straight path of SiT.

    L = E distance( s(x_t, t, c', 0, 0) - (x1 - x0) ),  t ~ U(0, 1)

where c' is c, or null with the label-dropout probability.

Sampler: Euler steps of the instantaneous velocity, with classifier-free guidance
s(null) + (1 + w) (s(c) - s(null)) where w > 0: two network calls per step.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ism_jax.method import guidance, interpolant
from ism_jax.method.loss_terms import loss_terms
from ism_jax.method.training_batch import Batch
from ism_jax.objectives.base import BaseObjective, option


@dataclasses.dataclass(frozen=True)
class Objective(BaseObjective):
    """Flow matching; see the module."""

    label_dropout: float = option(0.1, 'probability that a label becomes null')

    def __call__(
        self, apply, params, target_params, batch: Batch, key, *, distance, progress
    ):
        del target_params, progress  # Targets come from the data alone.
        key_t, key_label = jax.random.split(key)
        num = batch.label.shape[0]
        t = jax.random.uniform(key_t, (num,))
        label = guidance.drop_labels(
            key_label, batch.label, self.label_dropout, self.num_classes
        )
        zeros = jnp.zeros((num,))
        x_t = interpolant.interpolate(batch.noise, batch.data, t)
        prediction = apply(params, x_t, t, zeros, zeros, label)
        _, metrics = loss_terms(
            distance, velocity=(prediction, batch.data - batch.noise)
        )
        return metrics['velocity/loss'], metrics

    def velocity(self, apply, params, x, t, d, w, label):
        zeros = jnp.zeros_like(d)  # The network gives instantaneous velocities only.
        return guidance.optional_guidance(
            apply, params, x, t, zeros, label, w, self.num_classes
        )

    def step_condition(self, d, w):
        return None if w else (0.0, 0.0)

    def network_calls(self, steps, w):
        return 2 * steps if w else steps

    @property
    def guidance_range(self) -> tuple[float, float]:
        return 0.0, math.inf if self.label_dropout else 0.0

    @property
    def conditions_on_step(self) -> bool:
        return False
