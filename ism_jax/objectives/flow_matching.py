"""Flow matching (Lipman et al., arXiv 2210.02747) on the straight path of SiT.

L = E distance( s(x_t, t, c', 0, 0) - (x1 - x0) ),  t ~ U(0, 1), where `c'` is `c`, or
`null` with the label-dropout probability.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ism_jax import interpolant
from ism_jax.objectives import BaseObjective, Batch, check_fraction


@dataclasses.dataclass(frozen=True)
class Objective(BaseObjective):
    """See the module.

    Attributes:
      label_dropout: probability that a label becomes `null`.
    """

    label_dropout: float = 0.1

    def __post_init__(self):
        check_fraction('objective.label_dropout', self.label_dropout)

    def __call__(self, apply, params, target_params, batch: Batch, key, *, distance):
        del target_params  # Targets come from the data.
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
