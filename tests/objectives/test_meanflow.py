"""Targets and guidance of MeanFlow for the exact map."""

from ideal_networks import FLOW, NULL, grid_points, guided, moving_inputs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.objectives import meanflow


@pytest.mark.parametrize('w', [0.0, 1.0])
def test_meanflow_target_of_the_exact_map(w):
    """With the marginal velocity as tangent the target is u itself."""
    objective = meanflow.Objective(num_classes=NULL, guidance=w)
    inputs = moving_inputs()
    apply = guided(w)
    velocity = FLOW.velocity(inputs.x, inputs.t, jnp.full(64, w), inputs.label)
    exact = apply(None, *inputs.arguments())
    target = objective.mean_velocity_target(apply, None, inputs, velocity, None, 0.0)
    np.testing.assert_allclose(target, exact, atol=2e-5)
    assert jnp.abs(exact - velocity).max() > 0.3  # The derivative is needed.
    # A pair's own velocity is another tangent. The target is affine in it, so its
    # average over pairs is the target of the average velocity.
    shift = jax.random.normal(jax.random.key(0), velocity.shape)
    above, below = (
        objective.mean_velocity_target(
            apply, None, inputs, velocity + sign * shift, None, 0.0
        )
        for sign in (1, -1)
    )
    assert jnp.abs(above - below).max() > 0.3
    np.testing.assert_allclose((above + below) / 2, exact, atol=2e-5)


@pytest.mark.parametrize('w, mix', [(0.0, 0.5), (1.0, 0.0), (1.0, 0.5), (2.0, 0.9)])
def test_meanflow_guidance_has_its_fixed_point_at_the_guided_velocity(w, mix):
    """E v_g = v_w where the network's own conditional velocity is v_w."""
    objective = meanflow.Objective(num_classes=NULL, guidance=w, guidance_mix=mix)
    x, t, label = grid_points(64)
    plain, guided, unconditional = (
        FLOW.velocity(x, t, jnp.full(64, scale), c)
        for scale, c in ((0.0, label), (w, label), (0.0, jnp.full_like(label, NULL)))
    )
    mixed = objective.guided_velocity(plain, guided, unconditional, t, label)
    if not w:  # Then the loss leaves the mix out.
        mixed = plain
    np.testing.assert_allclose(mixed, guided, atol=2e-5)
    null = jnp.full_like(label, NULL)
    np.testing.assert_array_equal(
        objective.guided_velocity(plain, guided, unconditional, t, null), plain
    )
