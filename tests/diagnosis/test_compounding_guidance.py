"""The effective guidance scale of steps, on networks whose scale is known."""

import jax
import numpy as np
import pytest

from ism_jax.diagnosis import compounding_guidance
from ism_jax.diagnosis import subject as subjects


def test_a_step_that_no_scale_explains_is_not_clear(batch, normal, affine_field, null):
    x, t, label = batch()
    steps = jax.jit(
        lambda scale: subjects.cfg_velocity(
            affine_field, x, t, t * 0 + 0.5, label, null, 2, scale
        )
    )
    effective = compounding_guidance.effective_scale
    assert effective(steps(2.0), steps).is_clear()
    assert effective(steps(2.0), steps).scale == pytest.approx(2, rel=2e-3)
    assert not effective(steps(500.0), steps).is_clear()
    away = steps(2.0) + 50 * normal(*x.shape, seed=1)
    assert not effective(away, steps).is_clear()


@pytest.mark.parametrize('velocity', [np.ones(3), np.full(3, np.nan)])
def test_a_network_without_labels_or_finite_values_is_refused(velocity):
    with pytest.raises(ValueError, match='does not depend on the label, or is not fin'):
        compounding_guidance.effective_scale(velocity, lambda scale: np.ones(3))


def test_compounding_of_a_network_is_found(baked):
    scales = compounding_guidance.network_scales(baked, 0.5)
    # The sampler guides the finest step itself.
    expected = {1: 1.5, 2: 1.5, 4: 1.5**2, 8: 1.5**3}
    assert {n: e.scale for n, e in scales.items()} == pytest.approx(expected, rel=5e-3)
    section = compounding_guidance.diagnose(baked, {'SM': scales})
    assert section.grade == 'poor' and 'at N = 8, requested 1.5' in section.number
    assert '2.25 times the requested' in section.verdict


def test_intrinsic_guidance_keeps_its_scale(intrinsic):
    scales = compounding_guidance.network_scales(intrinsic, 1.5)
    assert all(e.scale == pytest.approx(2.5, rel=5e-3) for e in scales.values())
    assert compounding_guidance.diagnose(intrinsic, {'SM': scales}).grade == 'good'


def test_the_scale_counts_guidance_that_the_network_has_already(subject, network):
    """The network adds its own w = 1 to every velocity, and the sampler none."""

    def guided(x, t, d, w, label):
        return network(x, t, d, 1.0 + 0 * w, label)

    meanflow = subject('meanflow', guided, guidance=1.0)
    scales = compounding_guidance.network_scales(meanflow, 1.0)
    assert scales[1].scale == pytest.approx(2, rel=5e-3)


@pytest.mark.parametrize(
    'scales, grade, words',
    [
        ({1: (2.5, 1), 2: (2.4, 1), 4: (2.4, 0.1)}, 'good', 'no guidance scale exp'),
        ({1: (2.5, 1), 2: (1.2, 1)}, 'fair', 'weaker than requested in large steps'),
        ({1: (1.2, 1), 2: (1.2, 1)}, 'fair', 'weaker than requested at every step'),
        ({1: (2.5, 1), 2: (-0.5, 1)}, 'fair', 'weaker than requested in large steps'),
        ({1: (2.5, 0.1), 2: (64, 1)}, 'none', 'train for longer'),
    ],
)
def test_verdicts(scales, grade, words):
    scales = {
        n: compounding_guidance.EffectiveScale(*found) for n, found in scales.items()
    }
    judged = compounding_guidance.judge(scales, 2.5)
    assert judged['grade'] == grade and words in judged['verdict']


@pytest.mark.parametrize(
    'method, reason',
    [
        ('flow_matching', 'is not conditioned on the step size'),
        ('consistency', 'has no guidance'),
    ],
)
def test_methods_without_steps_or_guidance(subject, network, method, reason):
    scales = {n: compounding_guidance.EffectiveScale(1.5, 1) for n in (1, 2, 4)}
    section = compounding_guidance.diagnose(subject(method, network), {'SM': scales})
    assert section.grade == 'none' and section.number == 'not applicable'
    assert section.verdict == f'{method} {reason}' and section.figure
