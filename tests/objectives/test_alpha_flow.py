"""Targets of alpha-Flow between flow matching and MeanFlow."""

from ideal_networks import FLOW, NULL, curved, flow, moving_inputs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.objectives import alpha_flow, meanflow


def test_alpha_flow_between_flow_matching_and_meanflow():
    """Target v at alpha = 1 and MeanFlow's as alpha -> 0, for any tangent."""
    make = lambda alpha, **kw: alpha_flow.Objective(
        num_classes=NULL, guidance=0.0, alpha=alpha, **kw
    )
    inputs = moving_inputs()
    velocity = jax.random.normal(jax.random.key(0), inputs.x.shape)
    prediction = curved(None, *inputs.arguments())
    target = lambda alpha: make(alpha).mean_velocity_target(
        curved, None, inputs, velocity, prediction, 0.0
    )
    np.testing.assert_allclose(target(1.0), velocity, atol=1e-5)
    derivative = meanflow.Objective(num_classes=NULL).mean_velocity_target(
        curved, None, inputs, velocity, None, 0.0
    )
    np.testing.assert_allclose(target(0.0), derivative, atol=1e-6)
    distances = [float(jnp.abs(target(a) - derivative).mean()) for a in (0.1, 0.05)]
    assert 1e-3 < distances[1] and 1.8 < distances[0] / distances[1] < 2.2


def test_alpha_flow_of_the_exact_map():
    """Steps of the network give exact targets; alpha = 1/2 is the shortcut target."""
    inputs = moving_inputs()
    x, t, d, w, label = inputs.arguments()
    exact = flow(None, *inputs.arguments())
    velocity = FLOW.velocity(x, t, w, label)

    def error(alpha, direction, velocity=velocity):
        objective = alpha_flow.Objective(
            num_classes=NULL, guidance=0.0, alpha=alpha, direction=direction
        )
        target = objective.mean_velocity_target(
            flow, None, inputs, velocity, exact, 0.0
        )
        return float(jnp.abs(target - exact).mean())

    for alpha in (0.25, 0.5, 0.75):
        assert error(alpha, 'network', jnp.full_like(velocity, jnp.nan)) < 1e-5
    # With the data's velocity the first step is an Euler step: O(alpha).
    errors = [error(alpha, 'data') for alpha in (0.1, 0.05, 0.025)]
    assert errors[-1] > 1e-3
    ratios = np.divide(errors[:-1], errors[1:])
    assert ((ratios > 1.8) & (ratios < 2.2)).all(), ratios
    assert error(0.0, 'data') < 1e-5


def test_alpha_flow_anneals_from_flow_matching_to_meanflow():
    objective = alpha_flow.Objective(num_classes=NULL, anneal_start=0.2, anneal_end=0.8)
    progress = jnp.linspace(0, 1, 101)
    alpha = jax.vmap(objective.current_alpha)(progress)
    assert (alpha[:20] == 1).all() and (alpha[81:] == 0).all()
    assert alpha[50] == pytest.approx(0.5, abs=1e-4)
    assert (np.diff(alpha) <= 0).all()
    inside = alpha[(alpha > 0) & (alpha < 1)]
    assert inside.min() >= 0.005 and inside.max() <= 0.995 and len(inside) > 20
    assert objective.current_alpha(0.55) == pytest.approx(
        1 - 1 / (1 + np.exp(-25 * (0.35 / 0.6 - 0.5))), rel=1e-5
    )
