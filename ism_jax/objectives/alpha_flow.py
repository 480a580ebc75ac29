"""alpha-Flow (Zhang et al., arXiv 2510.20771): from flow matching to MeanFlow.

It uses MeanFlow's loss with another target for d > 0. The step from t to t + d is
divided at m = t + alpha d (the paper's time runs the other way):

    target = alpha v' + (1 - alpha) sg u(x_m, m, (1 - alpha) d),  x_m = x_t + alpha d v'

alpha = 1 is trajectory flow matching (target v'). alpha = 1/2 is the shortcut target if
v' = u(x_t, t, d / 2). alpha -> 0 is MeanFlow: (u - target) / alpha tends to
u - v' - d du/dt. Training anneals alpha from 1 to 0; at the fraction
k of the training

    alpha = 1 - sigmoid( gamma ( (k - start) / (end - start) - 1/2 ) ),  gamma = 25,

with values within eta = 0.005 of 0 or 1 rounded to it; alpha = 0 uses MeanFlow's
derivative. The paper's loss is |u - target|^2 / alpha with an adaptive weight. We use
e = u - sg(u) + sg(u - target) / alpha in MeanFlow's loss. Its gradient is the same
without the adaptive weight, and with it tends to MeanFlow's as alpha -> 0. The division
by alpha also enlarges rounding errors, so bfloat16 needs a larger margin eta.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from ism_jax.method import interpolant
from ism_jax.objectives import meanflow
from ism_jax.objectives.base import option

# In bfloat16 the target at a smaller alpha is mostly rounding error.
MIN_BFLOAT16_ALPHA = 0.02


@dataclasses.dataclass(frozen=True)
class Objective(meanflow.Objective):
    """alpha-Flow; see the module."""

    anneal_start: float = option(
        0.0, 'fraction of the training at which annealing starts'
    )
    anneal_end: float = option(1.0, 'fraction of the training at which annealing ends')
    anneal_rate: float = option(25.0, 'gamma, steepness of the annealing')
    alpha_margin: float = option(
        0.005, 'eta, margin within which alpha is rounded to 0 or 1'
    )
    alpha: float = option(-1.0, 'a constant alpha in [0, 1]; -1 to anneal it')
    direction: Literal['data', 'network'] = option(
        'data', "v': velocity of the 'data' (guided as in MeanFlow) or of the 'network'"
    )

    def current_alpha(self, progress) -> jax.Array:
        """The value of alpha at a fraction of the training."""
        if self.alpha != -1:
            return jnp.full((), self.alpha)
        position = (progress - self.anneal_start) / (
            self.anneal_end - self.anneal_start
        )
        alpha = 1 - jax.nn.sigmoid(self.anneal_rate * (position - 0.5))
        alpha = jnp.where(alpha > 1 - self.alpha_margin, 1.0, alpha)
        return jnp.where(alpha < self.alpha_margin, 0.0, alpha)

    def mean_velocity_target(
        self, apply, params, inputs, velocity, prediction, progress
    ) -> jax.Array:
        """The target u - (u - target) / alpha, whose error is the module's e."""
        alpha = self.current_alpha(progress)
        x, t, d, w, label = inputs.arguments()

        def divided_step():
            first = velocity
            if self.direction == 'network':
                first = apply(params, x, t, alpha * d, w, label)
            x_m = interpolant.step(x, first, alpha * d)
            second = apply(params, x_m, t + alpha * d, (1 - alpha) * d, w, label)
            # The teacher is the student without gradient.
            u = jax.lax.stop_gradient(prediction)
            target = alpha * first + (1 - alpha) * second
            return u - (u - target) / alpha

        derivative = super().mean_velocity_target
        return jax.lax.cond(
            alpha > 0,
            divided_step,
            lambda: derivative(apply, params, inputs, velocity, prediction, progress),
        )

    @property
    def has_curriculum(self) -> bool:
        return self.alpha == -1
