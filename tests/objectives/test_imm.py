"""Guidance of IMM."""

from ideal_networks import NULL, flow, grid_points, unscaled
import jax.numpy as jnp
import numpy as np

from ism_jax.objectives import imm


def test_imm_guides_its_jumps():
    """Classifier-free guidance of the jump of one step, not of the flow."""
    objective = imm.Objective(NULL)
    network = unscaled(objective)
    x, t, label = grid_points(16)
    d, w = jnp.full_like(t, 0.25), jnp.full_like(t, 1.5)
    zero, null = jnp.zeros_like(w), jnp.full_like(label, NULL)
    jump = lambda c: flow(None, x, t, d, zero, c)
    np.testing.assert_allclose(
        objective.velocity(network, None, x, t, d, w, label),
        2.5 * jump(label) - 1.5 * jump(null),
        atol=1e-5,
    )
