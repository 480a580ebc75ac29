"""Paths and couplings whose straightness is known."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from ism_jax.diagnosis import curved_trajectories


def test_straight_paths_and_half_circles(normal):
    steps = np.array([0.5, 0.25, 0.125, 0.125])
    t = np.concatenate([[0], np.cumsum(steps)])[:, None, None]
    straight = normal(3, 5)[None] * t + 1
    ratio = curved_trajectories.path_length_ratio
    np.testing.assert_allclose(ratio(straight), 1, rtol=1e-6)
    straightness = curved_trajectories.straightness
    assert straightness(straight, steps) == pytest.approx(0, abs=1e-12)
    assert curved_trajectories.path_profile(straight)[1].max() < 1e-6

    angle = np.linspace(0, np.pi, 2001)[:, None]
    circle = 3 * np.stack([-np.cos(angle), np.sin(angle)], axis=-1)
    steps = np.full(2000, 1 / 2000)
    np.testing.assert_allclose(ratio(circle), np.pi / 2, rtol=1e-6)
    # Speed 3 pi, chord 6, two values: (9 pi^2 - 36) / 2.
    expected = (9 * np.pi**2 - 36) / 2
    assert straightness(circle, steps) == pytest.approx(expected, rel=1e-5)
    along, across = curved_trajectories.path_profile(circle)
    assert along[0] == 0 and along[-1] == pytest.approx(1)
    assert across.max() == pytest.approx(0.5)


def test_trajectory_is_the_path_of_the_sampler(batch):
    def velocity(x, t, d, w, label):  # Mean velocity of dx/dt = x.
        return x * (jnp.expm1(d) / d)[:, None, None, None]

    x, _, label = batch()
    times, steps = np.float32([[0, 0.5, 0.75], [0.5, 0.25, 0.25]])
    path = curved_trajectories.trajectory(
        velocity, x, jnp.zeros(6), label, times, steps
    )
    for point, t in zip(path, [0, 0.5, 0.75, 1], strict=True):
        np.testing.assert_allclose(point, np.exp(t) * x, rtol=1e-5)


def test_the_last_point_of_a_path_is_the_sample(intrinsic):
    path, steps = curved_trajectories.sampling_path(intrinsic, 4, 0.5)
    assert path.shape == (9, 4, 8, 8, 1) and steps.sum() == 1
    np.testing.assert_allclose(path[-1], intrinsic.samples(8, 0.5, 4), rtol=1e-5)


def test_crossing_rate_is_the_share_of_cheaper_swaps(normal):
    noise, data = normal(2, 12, 3)

    def cost(i, j):
        return np.sum((noise[i] - data[j]) ** 2)

    pairs = list(itertools.combinations(range(12), 2))
    better = [cost(i, j) + cost(j, i) < cost(i, i) + cost(j, j) for i, j in pairs]
    found = curved_trajectories.crossing_rate(noise, data)
    assert found == pytest.approx(np.mean(better), abs=0.01)
    assert 0.2 < found < 0.8


def test_crossing_rate_of_known_couplings(normal):
    rate = curved_trajectories.crossing_rate
    assert rate(*normal(2, 4000, 6)) == pytest.approx(0.5, abs=0.02)
    noise, data = normal(2, 300, 6)
    cost = ((noise[:, None] - data[None]) ** 2).sum(-1)
    _, partner = optimize.linear_sum_assignment(cost)
    assert rate(noise, data[partner]) == 0
    line = np.sort(normal(50))[:, None]
    assert rate(line, line[::-1]) == 1
    # Optimal within each class, but the classes are paired far away.
    labels = np.arange(50) % 2
    data = line - 100 * labels[:, None]
    assert rate(line, data, labels=labels) == 0
    assert 0.1 < rate(line, data) < 0.5


def test_too_few_samples_per_class_are_refused():
    pair = np.ones((3, 2))
    with pytest.raises(ValueError, match='raise --samples'):
        curved_trajectories.crossing_rate(pair, pair, labels=[0, 1, 2])


def test_straight_paths_are_good(intrinsic):
    section = curved_trajectories.diagnose(intrinsic)
    assert section.grade == 'good' and section.number.startswith('length 1, S = 0; ')


def test_a_method_that_adds_noise_has_no_paths(subject, network):
    section = curved_trajectories.diagnose(subject('consistency', network))
    assert section.grade == 'none' and 'adds noise' in section.verdict
    assert section.number.startswith('length not applicable; crossing rate')
