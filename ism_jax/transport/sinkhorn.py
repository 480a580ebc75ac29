"""Entropic optimal transport plan by Sinkhorn's algorithm."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ott.geometry import geometry
from ott.solvers import linear
from ott.solvers.linear import acceleration

# Over-relaxation. It needs about half as many iterations as 1.0.
MOMENTUM = 1.3
# Iterations between two checks of the error.
INNER_ITERATIONS = 5


class Plan(NamedTuple):
    """The plan between n rows and n columns of equal mass, normalised by row.

    Attributes:
      price: [n], prices of the columns, their negative dual potentials.
      logits: [n, n], (similarity - price) / epsilon.
      probability: [n, n], the softmax of the logits over each row.
      entropy: [n], entropy of each row, in nats.
      converged: whether the marginal error reached the tolerance.
      iterations: number of iterations, int32.
    """

    price: jax.Array
    logits: jax.Array
    probability: jax.Array
    entropy: jax.Array
    converged: jax.Array
    iterations: jax.Array


def solve(
    similarity: jax.Array,
    *,
    epsilon: float | jax.Array,
    max_iterations: int,
    tolerance: float,
) -> Plan:
    """Maximises <P, similarity> + epsilon H(P) over plans P with uniform marginals.

    Args:
      similarity: [n, n] float32.
      epsilon: entropic regularisation, in the units of the similarity.
      max_iterations: upper bound on the iterations.
      tolerance: on the L1 error of marginals that sum to 1.
    """
    with jax.numpy_rank_promotion('allow'):  # OTT relies on it.
        plan = linear.solve(
            geometry.Geometry(cost_matrix=-similarity, epsilon=epsilon),
            threshold=tolerance,
            max_iterations=max_iterations,
            inner_iterations=INNER_ITERATIONS,
            momentum=acceleration.Momentum(value=MOMENTUM),
        )
    # The auction is correct from any price, so potentials that diverged become 0.
    price = jnp.where(jnp.isfinite(plan.g), -plan.g, 0.0)
    logits = (similarity - price[None]) / epsilon
    top = logits.max(1)
    weight = jnp.exp(logits - top[:, None])
    total = weight.sum(1)
    # sum_j p_j log p_j = sum_j p_j (logit_j - top) - log total
    expected = jnp.sum(weight * (logits - top[:, None]), axis=1) / total
    return Plan(
        price=price,
        logits=logits,
        probability=weight / total[:, None],
        entropy=jnp.log(total) - expected,
        converged=jnp.asarray(plan.converged, jnp.float32),
        iterations=jnp.asarray(plan.n_iters, jnp.int32),
    )
