"""The derivative of the mean velocity, on a flow known in closed form."""

from ideal_networks import FLOW, expand, flow, moving_inputs
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.method import interpolant, mean_velocity


def _exact():
    """Inputs, velocity and mean velocity at the exact map."""
    inputs = moving_inputs()
    velocity = FLOW.velocity(inputs.x, inputs.t, inputs.w, inputs.label)
    return inputs, velocity, flow(None, *inputs.arguments())


def test_the_derivative_satisfies_the_identity():
    inputs, velocity, mean = _exact()
    slope = mean_velocity.derivative(flow, None, inputs, velocity)
    target = interpolant.step(velocity, slope, inputs.d)
    np.testing.assert_allclose(target, mean, atol=2e-5)
    assert jnp.abs(mean - velocity).max() > 0.3


def test_the_difference_converges_to_the_derivative_in_second_order():
    inputs, velocity, _ = _exact()
    inputs = inputs._replace(t=inputs.t + 0.1)  # Away from the ends.
    inputs = inputs._replace(d=jnp.clip(inputs.d, 0.1, 0.3))
    slope = mean_velocity.derivative(flow, None, inputs, velocity)

    def error(distance):
        found = mean_velocity.difference(flow, None, 1, inputs, velocity, distance)
        return float(jnp.abs(found - slope).max())

    assert error(0.1) < 0.5 and 3.5 < error(0.1) / error(0.05) < 4.5
    assert error(0.005) < 5e-3


@pytest.mark.parametrize('t, d', [(0.0, 0.4), (0.4, 0.0), (0.0, 0.0), (0.6, 0.4)])
def test_the_difference_stays_inside_the_step(t, d):
    """The network is called only where 0 <= t and t + d has not moved."""
    inputs, velocity, _ = _exact()
    inputs = inputs._replace(t=jnp.full_like(inputs.t, t), d=jnp.full_like(inputs.d, d))
    calls = []

    def apply(params, x, t, d, w, label):
        calls.append((t, d))
        return x * expand(1 + t + d**2)

    slope = mean_velocity.difference(apply, None, 1, inputs, velocity, 0.005)
    ((times, sizes),) = calls
    assert (times >= 0).all() and (sizes >= 0).all()
    np.testing.assert_allclose(times + sizes, t + d, atol=1e-6)
    expected = velocity * (1 + t + d**2) + inputs.x * (1 - 2 * d)
    tolerance = 0.0 if t == d == 0 else 0.05
    if t == d == 0:  # No points between which a difference could be taken.
        expected = 0 * expected
    np.testing.assert_allclose(slope, expected, atol=tolerance)
