"""Label dropout, guidance scales and the two kinds of guided velocities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from ism_jax.method import guidance


def test_labels_are_dropped_at_the_given_rate():
    label = jnp.arange(10_000) % 4
    dropped = guidance.drop_labels(jax.random.key(0), label, 0.1, null=4)
    changed = dropped != label
    assert 0.08 < changed.mean() < 0.12
    assert (dropped[changed] == 4).all()


def test_guidance_scales_are_drawn_uniformly():
    values = guidance.guidance_values(3.5, 0.25, include_zero=False)
    assert len(values) == 14 and values[0] == 0.25 and values[-1] == 3.5
    assert guidance.guidance_values(3.5, 0.25, include_zero=True)[0] == 0
    drawn = guidance.sample_guidance(jax.random.key(0), 7000, values)
    counts = [(drawn == v).sum() for v in values]
    assert min(counts) > 400 and sum(counts) == 7000


def test_guidance_is_zero_before_the_interval():
    w = guidance.interval_guidance(
        jnp.array([2.0, 2.0, 2.0]), jnp.array([0.0, 0.3, 0.9]), 0.3
    )
    np.testing.assert_array_equal(w, [0, 2, 2])
    everywhere = guidance.interval_guidance(jnp.ones(2), jnp.array([0.0, 1.0]), 0.0)
    np.testing.assert_array_equal(everywhere, [1, 1])
    inside = guidance.interval_guidance(
        jnp.ones(3), jnp.array([0.1, 0.5, 0.9]), 0.2, 0.8
    )
    np.testing.assert_array_equal(inside, [0, 1, 0])


@pytest.mark.parametrize('beta', [0.0, 0.5, 1.0, 2.0])
def test_guidance_scales_follow_a_power_law(beta):
    """Against the quantiles of the density (1 + w)^-beta, integrated by SciPy."""
    w = np.sort(guidance.power_law_guidance(jax.random.key(0), 20_000, 7.0, beta))
    assert 0 <= w[0] < 0.01 and 6.9 < w[-1] <= 7
    mass = lambda top: integrate.quad(lambda w: (1 + w) ** -beta, 0, top)[0] / total
    total = integrate.quad(lambda w: (1 + w) ** -beta, 0, 7)[0]
    for top in (0.5, 1.0, 3.0, 6.0):
        assert np.mean(w < top) == pytest.approx(mass(top), abs=0.015)


def test_intervals_begin_in_the_first_half_and_end_in_the_second():
    start, end = guidance.sample_interval(jax.random.key(0), 4000).T
    for values, low in ((start, 0.0), (end, 0.5)):
        assert (
            low <= values.min() < low + 0.01 and low + 0.49 < values.max() <= low + 0.5
        )
        assert values.mean() == pytest.approx(low + 0.25, abs=0.01)


def test_classifier_free_velocity_extrapolates_from_the_null_label():
    """And conditions the network on w = 0."""

    def apply(params, x, t, d, w, label):
        scale = params + t + 2 * d + w + jnp.where(label == 4, -1.0, 0.5 * label)
        return scale[:, None, None, None] * x

    x = jnp.ones((3, 2, 2, 1))
    t, d, w = jnp.array([0.0, 0.5, 0.2]), jnp.full(3, 0.25), jnp.array([0.0, 1.0, 2.5])
    label = jnp.array([0, 1, 3])
    velocity = guidance.classifier_free_velocity(apply, 2.0, x, t, d, label, w, 4)
    conditional, null = 2.0 + t + 2 * d + 0.5 * label, 1.0 + t + 2 * d
    expected = null + (1 + w) * (conditional - null)
    np.testing.assert_allclose(velocity[:, 0, 0, 0], expected, rtol=1e-6)
