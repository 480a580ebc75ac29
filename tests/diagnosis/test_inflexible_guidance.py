"""The response of samples to w."""

import numpy as np
import pytest

from ism_jax.diagnosis import inflexible_guidance
from ism_jax.diagnosis import subject as subjects


def test_response_is_the_distance_that_samples_move(normal):
    start, direction = normal(2, 5, 4, 4, 1)
    direction /= subjects.rms(direction)

    def move(lengths):
        return start + np.reshape(lengths, (-1, 1, 1, 1, 1)) * direction

    distance, monotone = inflexible_guidance.guidance_response(move([0, 1, 3, 2]))
    np.testing.assert_allclose(distance, [0, 1, 3, 2], rtol=1e-5)
    assert monotone == pytest.approx(2 / 3)
    distance, monotone = inflexible_guidance.guidance_response(move([1, 1, 1]))
    assert monotone == 0 and not distance.any()
    agree = inflexible_guidance.displacement_agreement
    assert agree(move([0, 1]), move([0, 2])) == pytest.approx((0.5, 1), rel=1e-4)
    assert agree(move([0, -3]), move([0, 1])) == pytest.approx((3, -1), rel=1e-4)
    assert agree(move([1, 1]), move([0, 1])) == (0, 0)


def test_guidance_fixed_in_training_is_inflexible(baked):
    section = inflexible_guidance.diagnose(baked)
    assert section.grade == 'poor' and 'w = 0.5 is fixed' in section.number


def test_intrinsic_guidance_responds_like_cfg(intrinsic):
    section = inflexible_guidance.diagnose(intrinsic)
    assert section.grade == 'good' and section.number.startswith('100% as far as CFG')


def test_methods_with_and_without_guidance(subject, network):
    section = inflexible_guidance.diagnose(subject('flow_matching', network))
    assert section.grade == 'good', section
    section = inflexible_guidance.diagnose(subject('consistency', network))
    assert section.grade == 'none' and section.number == 'not applicable'


@pytest.mark.parametrize(
    'size, cosine, monotone, grade, words',
    [
        (1.2, 0.9, 1, 'good', 'like CFG'),
        (0.5, 0.9, 1, 'fair', 'less than CFG'),
        (2.0, 0.9, 1, 'fair', 'more than CFG'),
        (0.2, 0.9, 1, 'poor', 'not respond'),
        (0.0, 0.9, 1, 'poor', 'not respond'),
        (1.0, 0.4, 1, 'poor', 'not respond'),
        (1.0, 0.9, 0.7, 'poor', 'not respond'),
    ],
)
def test_verdicts(size, cosine, monotone, grade, words):
    judged, verdict = inflexible_guidance.judge(size, cosine, monotone)
    assert judged == grade and words in verdict
