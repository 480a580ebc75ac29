"""Points, velocities and samples that the diagnoses use."""

import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.diagnosis import subject as subjects


def test_steps_start_at_multiples_of_their_size(normal):
    noise, data = normal(2, 200, 2, 2, 1)
    rng = np.random.default_rng(0)
    x, t, d = subjects.step_starts(rng, noise, data, 4, 16, after=0.25, start_time=0.3)
    # The step that ends at 0.25 is left out, the next is cut at 0.3.
    expected = np.where(t < 0.4, [[0.3], [0.2]], [t, 0 * t + 0.25])
    np.testing.assert_allclose([t, d], expected, rtol=1e-6)
    assert set(np.round(np.asarray(t), 6)) == {np.float32(0.3), 0.5, 0.75}
    t = t[:, None, None, None]
    np.testing.assert_allclose(x, (1 - t) * noise + t * data, rtol=1e-5, atol=1e-6)


def test_small_steps_are_not_guided_before_the_interval(batch, affine_field, null):
    x, _, label = batch()
    t, d = jnp.zeros(6), jnp.ones(6)

    def velocity(x, t, d, steps, scale, start=0.0):
        return subjects.cfg_velocity(
            affine_field, x, t, d, label, null, steps, scale, start
        )

    early = velocity(x, t, d / 2, 2, 1.0)
    late = velocity(x + early / 2, t + 0.5, d / 2, 2, 4.0)
    found = velocity(x, t, d, 4, 4.0, start=0.5)
    np.testing.assert_allclose(found, (early + late) / 2, rtol=1e-5, atol=1e-6)
    assert np.abs(found - velocity(x, t, d, 4, 4.0)).max() > 0.1


def test_guidance_of_the_finest_step_is_detected(subject, network):
    def guided(x, t, d, w, label):
        return network(x, t, d, 1 + w, label)

    assert subject('meanflow', guided, guidance=1.0).field_scale() == 2
    # Here the sampler applies guidance, not the network.
    assert subject('shortcut', network, guidance=1.0).field_scale() == 1


def test_samples_start_from_the_sampler_noise(intrinsic):
    samples = intrinsic.samples(4, 0.5, 3)
    _, _, label = intrinsic.pairs(3)
    moved = samples - np.asarray(intrinsic.sampler_noise(3))
    expected = 1.5 * (1 + np.asarray(label))[:, None, None, None] + 0 * moved
    np.testing.assert_allclose(moved, expected, rtol=1e-5)


def test_relative_error_needs_a_nonzero_finite_reference():
    assert subjects.relative_rms(np.array([0, 2.0]), np.array([4.0, 0])) == 0.5
    for reference in (np.zeros(3), np.full(3, np.nan)):
        with pytest.raises(ValueError, match='train for longer'):
            subjects.relative_rms(np.ones(3), reference)
