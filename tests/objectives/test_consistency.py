"""The consistency function of iCT."""

from ideal_networks import FLOW, NULL, curved, grid_points, to_the_end
import jax.numpy as jnp
import numpy as np

from ism_jax.objectives import consistency


def test_consistency_function_is_the_identity_at_the_end():
    objective = consistency.Objective(num_classes=NULL)
    x, _, label = grid_points(8)
    end = jnp.full(8, 1 / (1 + objective.sigma_min), jnp.float32)
    np.testing.assert_array_equal(objective.jump(curved, None, x, end, label), x)
    moved = objective.jump(curved, None, x, end - 0.1, label)
    assert jnp.abs(moved - x).max() > 0.01


def test_consistency_function_is_constant_along_the_flow():
    objective = consistency.Objective(num_classes=NULL)
    network = to_the_end(objective)
    x, t, label = grid_points(64)
    zero = jnp.zeros_like(t)
    values = [
        objective.jump(network, None, FLOW.flow_map(x, t, d, zero, label), t + d, label)
        for d in (0 * t, 0.2 + 0 * t, 0.4 + 0 * t)
    ]
    np.testing.assert_allclose(values[1], values[0], atol=1e-5)
    np.testing.assert_allclose(values[2], values[0], atol=1e-5)
