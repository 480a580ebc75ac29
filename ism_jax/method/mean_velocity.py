"""The derivative along the path of the mean velocity over a step.

Let s(x_t, t, d) be the mean velocity from t to t + d. The step ends at x_t + d s. Along
the path this end is fixed, so d s changes by -v dt as t grows by dt:

    s = v + d ds/dt,   ds/dt along the direction (v, 1, -1) of (x, t, d)

(MeanFlow, arXiv 2505.13447, equation 6; its time runs from data to noise.) No gradient
may flow through this derivative.
"""

import jax
import jax.numpy as jnp

from ism_jax.method import interpolant
from ism_jax.method.training_batch import Inputs, apply_together


def derivative(apply, params, inputs: Inputs, velocity) -> jax.Array:
    """ds/dt by one Jacobian-vector product, [B, H, W, C].

    Args:
      apply, params: the network.
      inputs: x_t, t, d and the other conditions of the step.
      velocity: v at x_t and t, [B, H, W, C].
    """
    x, t, d, *rest = inputs.arguments()
    _, slope = jax.jvp(
        lambda x, t, d: apply(params, x, t, d, *rest),
        (x, t, d),
        (velocity, jnp.ones_like(t), -jnp.ones_like(d)),
    )
    return slope


def difference(
    apply, params, repeats: int, inputs: Inputs, velocity, distance: float
) -> jax.Array:
    """ds/dt by a finite difference, for kernels without forward-mode derivatives.

    The difference is central, truncated at t = 0 and at the end of the step. Its error
    is of order distance^2, or of order distance where it is truncated.

    Args:
      apply, params, inputs, velocity: see `derivative`.
      repeats: see `apply_together`.
      distance: time between x_t and each of the two points.
    """
    back, ahead = jnp.minimum(inputs.t, distance), jnp.minimum(inputs.d, distance)

    def moved(time):
        x = interpolant.step(inputs.x, velocity, time)
        return inputs._replace(x=x, t=inputs.t + time, d=inputs.d - time)

    earlier, later = apply_together(apply, params, repeats, moved(-back), moved(ahead))
    between = jnp.maximum(back + ahead, jnp.finfo(jnp.float32).tiny)
    return (later - earlier) / between[:, None, None, None]
