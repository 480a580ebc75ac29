"""Self-consistency errors and lags that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.diagnosis import self_consistency


def _exact_velocity(x, t, d, w, label):
    """Mean velocity of dx/dt = x over d: x (e^d - 1) / d."""
    del t, w, label
    return x * (jnp.expm1(d) / d)[:, None, None, None]


@pytest.mark.parametrize('excess', [0.0, 0.25])
def test_the_error_is_the_relative_excess_of_the_full_step(batch, excess):
    x, t, label = batch()
    d = jnp.full_like(t, 0.25)

    def velocity(x, t, d, w, label):
        factor = jnp.where(d > 0.3, 1 + excess, 1.0)[:, None, None, None]
        return factor * _exact_velocity(x, t, d, w, label)

    error = self_consistency.self_consistency_error(velocity, x, t, d, 0 * t, label)
    assert error == pytest.approx(excess / (1 + excess), abs=1e-6)


def test_the_second_half_step_starts_where_the_first_ends(batch):
    x, t, label = batch()
    d = jnp.full_like(t, 0.25)

    def velocity(x, t, d, w, label):  # Of dx/dt = t.
        return (t + 0.5 * d)[:, None, None, None] + 0 * x

    error = self_consistency.self_consistency_error(velocity, x, t, d, 0 * t, label)
    assert error == pytest.approx(0, abs=1e-6)


def test_distance_of_parameters():
    online = {'a': np.full((3,), 2.0), 'b': [np.full((2, 2), -1.0)]}
    target = jax.tree.map(lambda leaf: 1.02 * leaf, online)
    distance = self_consistency.parameter_distance
    assert distance(target, online) == pytest.approx(0.02)
    moved = {'a': online['a'] + np.array([3, 0, 0]), 'b': online['b']}
    assert distance(moved, online) == pytest.approx(3 / 4)


def test_a_consistent_network_whose_target_ema_lags(intrinsic):
    section = self_consistency.diagnose(intrinsic)
    assert section.number.startswith('error 0; target EMA lags by 10%')
    assert section.grade == 'fair' and section.figure


@pytest.mark.parametrize('method', ['flow_matching', 'consistency'])
def test_methods_without_step_sizes_have_only_a_lag(subject, network, method):
    section = self_consistency.diagnose(subject(method, network))
    assert section.grade == 'none' and 'error not applicable' in section.number
    assert method in section.verdict and section.figure
    assert 'lags by 10% in parameters, 10% in outputs' in section.number


@pytest.mark.parametrize(
    'error, lag, grade, words',
    [
        (0.05, 0.05, 'good', 'agree with'),
        (0.2, 0.0, 'fair', 'differ somewhat'),
        (0.05, 0.2, 'fair', 'differ somewhat'),
        (0.4, 0.0, 'poor', 'disagree with'),
        (0.05, 0.4, 'poor', 'target EMA lags far behind'),
    ],
)
def test_verdicts(error, lag, grade, words):
    judged, verdict = self_consistency.judge(error, lag)
    assert judged == grade and words in verdict
