"""alpha-Flow (Zhang et al., arXiv 2510.20771): from flow matching to MeanFlow.

MeanFlow's loss with another target for samples that have a step. The step from t to
t + d is cut at m = t + alpha d (the source's time runs the other way):

    target = alpha v' + (1 - alpha) sg u(x_m, m, (1 - alpha) d),  x_m = x_t + alpha d v'

alpha = 1 is trajectory flow matching (target v'), alpha = 1/2 with v' the network's own
u(x_t, t, d / 2) is the shortcut target, and alpha -> 0 is MeanFlow: there
(u - target) / alpha tends to u - v' - d du/dt. Training anneals alpha from 1 to 0,

    alpha = 1 - sigmoid( gamma ( (k - start) / (end - start) - 1/2 ) ),  gamma = 25,

with alpha within eta = 0.005 of 0 or 1 set to it; alpha = 0 uses MeanFlow's derivative.
The source's loss is |u - target|^2 / alpha with an adaptive weight. We take
e = u - sg(u) + sg(u - target) / alpha in MeanFlow's loss, whose gradient is the same
without the adaptive weight, and with it tends to MeanFlow's as alpha -> 0.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from ism_jax.method import interpolant
from ism_jax.objectives import meanflow


@dataclasses.dataclass(frozen=True)
class Objective(meanflow.Objective):
    """See the module.

    Attributes:
      anneal_start, anneal_end: shares of the training between which alpha falls.
      anneal_rate: gamma.
      alpha_margin: eta.
      alpha: a constant alpha in place of the annealed one; -1 anneals.
      direction: v', of the 'data' (with MeanFlow's guidance) or of the 'network'.
    """

    anneal_start: float = 0.0
    anneal_end: float = 1.0
    anneal_rate: float = 25.0
    alpha_margin: float = 0.005
    alpha: float = -1.0
    direction: Literal['data', 'network'] = 'data'

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.anneal_start < self.anneal_end <= 1:
            raise ValueError(
                f'objective.anneal_start = {self.anneal_start} and anneal_end = '
                f'{self.anneal_end} must be 0 <= start < end <= 1, shares of the '
                'training'
            )
        if not 0 <= self.alpha_margin < 0.5:
            raise ValueError(
                f'objective.alpha_margin = {self.alpha_margin} must lie in [0, 0.5)'
            )
        if not 0 < self.anneal_rate < math.inf:
            raise ValueError(
                f'objective.anneal_rate = {self.anneal_rate} must be above 0; 25 is '
                'usual'
            )
        if self.alpha != -1 and not 0 <= self.alpha <= 1:
            raise ValueError(
                f'objective.alpha = {self.alpha} must lie in [0, 1], or be -1 for the '
                'annealed one'
            )
        if self.direction not in ('data', 'network'):
            raise ValueError(
                f"objective.direction = {self.direction!r} must be 'data' or 'network'"
            )

    def current_alpha(self, progress) -> jax.Array:
        """alpha at a share of the training."""
        if self.alpha != -1:
            return jnp.full((), self.alpha)
        place = (progress - self.anneal_start) / (self.anneal_end - self.anneal_start)
        alpha = 1 - jax.nn.sigmoid(self.anneal_rate * (place - 0.5))
        alpha = jnp.where(alpha > 1 - self.alpha_margin, 1.0, alpha)
        return jnp.where(alpha < self.alpha_margin, 0.0, alpha)

    def mean_velocity(self, apply, params, inputs, velocity, progress) -> jax.Array:
        """Target of the mean velocity over a step; see `meanflow.Objective`.

        It is u - (u - target) / alpha, so that its error is the module's e.
        """
        alpha = self.current_alpha(progress)
        x, t, d, w, label = inputs

        def cut():
            first = velocity
            if self.direction == 'network':
                first = apply(params, x, t, alpha * d, w, label)
            middle = interpolant.step(x, first, alpha * d)
            rest = (1 - alpha) * d
            second = apply(params, middle, t + alpha * d, rest, w, label)
            own = apply(params, x, t, d, w, label)
            target = alpha * first + (1 - alpha) * second
            return own - (own - target) / alpha

        derivative = super().mean_velocity
        return jax.lax.cond(
            alpha > 0,
            cut,
            lambda: derivative(apply, params, inputs, velocity, progress),
        )
