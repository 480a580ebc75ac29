"""The closed-form flow against integration, regression and its own identities."""

from gaussian_flow_map import GaussianFlow
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

NULL = 3
SHAPE = (2, 2, 1)
GUIDANCE = (0.0, 0.5, 3.5)
MEANS = np.random.default_rng(5).normal(size=(NULL, *SHAPE))
FLOW = GaussianFlow(MEANS, class_std=0.4, data_std=1.1)
velocity_of, mean_velocity, flow_map = (
    jax.jit(f) for f in (FLOW.velocity, FLOW.mean_velocity, FLOW.flow_map)
)


def _inputs(size, seed=0):
    """x, t, d, w, label; some have t = 0, t + d = 1 or d = 0."""
    rng = np.random.default_rng(seed)
    x = 1.5 * rng.normal(size=(size, *SHAPE))
    t = rng.uniform(size=size) * (np.arange(size) % 4 > 0)
    d = (1 - t) * rng.uniform(size=size) ** (np.arange(size) % 3 > 0)
    d *= np.arange(size) % 5 > 0
    w = rng.choice(GUIDANCE, size)
    label = jnp.asarray(rng.integers(0, NULL + 1, size))
    return (*(jnp.asarray(a, jnp.float32) for a in (x, t, d, w)), label)


def _posterior_velocity(x, t, w, label):
    """E[x1 | x] - E[x0 | x], guided, for one flattened image, by Bayes' rule."""

    def expected(mean, std):
        precision = 1 / ((1 - t) ** 2 + t**2 * std**2)
        surprise = precision * (x - t * mean)
        return mean + t * std**2 * surprise - (1 - t) * surprise

    null = expected(0.0, FLOW.data_std)
    if label == NULL:
        return null
    return (1 + w) * expected(MEANS[label].ravel(), FLOW.class_std) - w * null


@pytest.mark.parametrize('w', GUIDANCE)
@pytest.mark.parametrize('label', [0, 2, NULL])
def test_flow_map_is_the_integral_of_the_velocity(w, label):
    x, t, d, _, _ = _inputs(24, seed=label)
    size = len(t)
    moved = flow_map(x, t, d, jnp.full(size, w), jnp.full(size, label, jnp.int32))
    for i in range(size):
        begin, end = float(t[i]), float(t[i]) + float(d[i])
        solution = integrate.solve_ivp(
            lambda time, y: _posterior_velocity(y, time, w, label),
            (begin, end),
            np.asarray(x[i], float).ravel(),
            method='DOP853',
            rtol=1e-9,
            atol=1e-10,
        )
        expected = solution.y[:, -1]
        np.testing.assert_allclose(moved[i].ravel(), expected, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize('t', [0.0, 0.3, 0.9])
@pytest.mark.parametrize('known', [True, False])
def test_velocity_is_the_regression_of_data_minus_noise(t, known):
    """Samples of one class, or of classes whose means are themselves normal."""
    size, rng = 400_000, np.random.default_rng(0)
    spread = np.sqrt(FLOW.data_std**2 - FLOW.class_std**2)
    mean = MEANS[1].ravel()[0] if known else spread * rng.normal(size=size)
    noise, data = rng.normal(size=(2, size))
    data = mean + FLOW.class_std * data
    slope, intercept = np.polyfit((1 - t) * noise + t * data, data - noise, 1)

    x = jnp.asarray([-1.0, 2.0])[:, None, None, None] * jnp.ones((2, *SHAPE))
    label = jnp.full(2, 1 if known else NULL)
    velocity = velocity_of(x, jnp.full(2, t), jnp.zeros(2), label)[:, 0, 0, 0]
    regression = slope * np.array([-1.0, 2.0]) + intercept
    np.testing.assert_allclose(velocity, regression, atol=0.015)
    assert np.ptp(velocity) > 0.3


def test_guidance_extrapolates_from_the_velocity_of_the_null_label():
    x, t, _, w, label = _inputs(64)
    zero, null = jnp.zeros_like(w), jnp.full_like(label, NULL)
    conditional, unconditional = (velocity_of(x, t, zero, c) for c in (label, null))
    scale = (1 + w)[:, None, None, None]
    np.testing.assert_allclose(
        velocity_of(x, t, w, label),
        unconditional + scale * (conditional - unconditional),
        atol=1e-5,
    )
    difference = np.abs(conditional - unconditional).max((1, 2, 3))
    np.testing.assert_array_equal(difference == 0, label == NULL)


def test_guidance_has_no_effect_on_the_null_label():
    x, t, d, w, label = _inputs(32)
    null = jnp.full_like(label, NULL)
    for function in (mean_velocity, lambda x, t, d, *a: velocity_of(x, t, *a)):
        np.testing.assert_array_equal(
            function(x, t, d, w, null), function(x, t, d, 0 * w, null)
        )
        guided = function(x, t, d, w + 1, jnp.zeros_like(label))
        plain = function(x, t, d, 0 * w, jnp.zeros_like(label))
        assert (np.abs(guided - plain).max((1, 2, 3)) > 1e-3).all()


def test_two_steps_compose_to_one():
    x, t, d, w, label = _inputs(256)
    first = 0.3 * d
    middle = flow_map(x, t, first, w, label)
    end = flow_map(middle, t + first, d - first, w, label)
    expected = flow_map(x, t, d, w, label)
    np.testing.assert_allclose(end, expected, rtol=1e-5, atol=2e-5)
    wrong = flow_map(middle, t, d - first, w, label)
    assert np.abs(wrong - expected).max() > 0.1


def test_map_carries_noise_to_the_data_of_the_class():
    """x0 + u(x0, 0, 1) = mu + s x0 without guidance."""
    x, _, _, _, label = _inputs(64)
    ones, zeros = jnp.ones(64), jnp.zeros(64)
    moved = x + mean_velocity(x, zeros, ones, zeros, label)
    null = (label == NULL)[:, None, None, None]
    mean = np.concatenate([MEANS, np.zeros((1, *SHAPE))])[label]
    expected = mean + np.where(null, FLOW.data_std, FLOW.class_std) * x
    np.testing.assert_allclose(moved, expected, atol=1e-5)
    guided = x + mean_velocity(x, zeros, ones, 2 * ones, label)
    assert np.abs(guided - moved).max() > 0.1


def test_mean_velocity_is_smooth_at_step_size_zero():
    """d = 0 gives the velocity, and half its total derivative as the slope in d."""
    x, t, _, w, label = _inputs(64)
    t = 0.9 * t
    still = jnp.zeros_like(t)
    velocity = velocity_of(x, t, w, label)
    _, total = jax.jvp(
        lambda x, t: velocity_of(x, t, w, label), (x, t), (velocity, jnp.ones_like(t))
    )
    value, slope = jax.jvp(
        lambda d: mean_velocity(x, t, d, w, label), (still,), (jnp.ones_like(t),)
    )
    np.testing.assert_allclose(value, velocity, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(slope, total / 2, rtol=1e-4, atol=1e-4)
    for d in (1e-7, 1e-4, 1e-3):
        near = mean_velocity(x, t, still + d, w, label)
        second = 400 * d**2  # The next term of the series.
        np.testing.assert_allclose(near, value + d * slope, atol=2e-5 + second)


@pytest.mark.parametrize('transform', [lambda f: f, jax.jit])
def test_meanflow_identity(transform):
    """u = v + d du/dt, the derivative along (v, 1, -1), at every d, 0 included."""
    x, t, d, w, label = _inputs(256)
    assert (d == 0).any() and (t + d == 1).any()

    def sides(x, t, d):
        velocity = velocity_of(x, t, w, label)
        mean, slope = jax.jvp(
            lambda x, t, d: mean_velocity(x, t, d, w, label),
            (x, t, d),
            (velocity, jnp.ones_like(t), -jnp.ones_like(d)),
        )
        return mean, velocity + d[:, None, None, None] * slope, velocity

    mean, identity, velocity = transform(sides)(x, t, d)
    np.testing.assert_allclose(mean, identity, rtol=1e-5, atol=1e-4)
    assert np.abs(mean - velocity).max() > 0.5


def test_gradients_are_finite_everywhere():
    x, t, d, w, label = _inputs(64)
    loss = lambda *args: jnp.sum(mean_velocity(*args, label) ** 2)
    for gradient in jax.grad(loss, argnums=(0, 1, 2, 3))(x, t, d, w):
        assert np.isfinite(gradient).all() and (gradient != 0).any()


def test_samples_have_the_moments_of_their_class():
    label = jnp.repeat(jnp.arange(NULL + 1), 40_000)
    data = FLOW.sample_data(jax.random.key(0), label).reshape(NULL + 1, -1, *SHAPE)
    mean = np.concatenate([MEANS, np.zeros((1, *SHAPE))])
    np.testing.assert_allclose(data.mean(1), mean, atol=0.03)
    std = np.full((NULL + 1, *SHAPE), FLOW.class_std)
    std[NULL] = FLOW.data_std
    np.testing.assert_allclose(data.std(1), std, rtol=0.02)
