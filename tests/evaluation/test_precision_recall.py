"""Precision and recall against brute force in float64 and torch-fidelity's."""

import importlib

import numpy as np
import pytest
from sklearn import neighbors

from ism_jax.evaluation.precision_recall import precision_recall


def _features(count, width=12, shift=0.0, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(count, width)) + shift).astype(np.float32)


def _sets():
    # Samples that miss half of the real images and are too wide.
    real = np.concatenate([_features(100), _features(100, shift=1.2, seed=1)])
    return _features(150, scale=1.1, seed=2), real


def _by_scikit_learn(samples, real, k):
    """Both fractions, by exact trees in float64."""

    def share(points, members):
        members, points = members.astype(np.float64), points.astype(np.float64)
        tree = neighbors.NearestNeighbors(n_neighbors=k + 1, algorithm='kd_tree')
        radii = tree.fit(members).kneighbors(members)[0][:, -1]
        distances = np.stack(
            [np.linalg.norm(p[None] - members, axis=1) for p in points]
        )
        return (distances <= radii[None]).any(axis=1).mean()

    return share(samples, real), share(real, samples)


@pytest.mark.parametrize('k, block_size', [(3, 64), (3, 4096), (1, 50), (10, 37)])
def test_agrees_with_scikit_learn(k, block_size):
    samples, real = _sets()
    expected = _by_scikit_learn(samples, real, k)
    assert all(0.05 < share < 0.95 for share in expected)
    assert expected[0] != expected[1]
    ours = precision_recall(samples, real, neighbours=k, block_size=block_size)
    assert ours == pytest.approx(expected, abs=1e-12)


def test_agrees_with_torch_fidelity(torch_fidelity):
    import torch

    metric = importlib.import_module('torch_fidelity.metric_prc')
    samples, real = _sets()
    theirs = metric.calculate_precision_recall_full(
        torch.from_numpy(samples), torch.from_numpy(real)
    )
    assert precision_recall(samples, real) == pytest.approx(theirs, abs=1e-6)


def test_a_large_common_mean_costs_no_digits():
    samples, real = _sets()
    # Whole numbers are added without rounding to multiples of 2^-13.
    samples, real = (np.round(f * 2**10) / 2**10 for f in (samples, real))
    moved = precision_recall(samples + 1000, real + 1000, block_size=64)
    assert moved == precision_recall(samples, real, block_size=64)
    assert moved == pytest.approx(_by_scikit_learn(samples, real, 3), abs=1e-12)


def test_features_as_wide_as_inceptions_lose_nothing():
    # Rectified, with a mean, and far from their neighbours as in high dimensions.
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(40, 2048))
    samples, real = (
        np.maximum(rng.normal(size=(400, 40)) * width @ basis + 8, 0).astype('f')
        for width in (1.1, 1.0)
    )
    expected = _by_scikit_learn(samples, real, 3)
    assert all(0.05 < share < 0.95 for share in expected)
    ours = precision_recall(samples, real, block_size=128)
    assert ours == pytest.approx(expected, abs=1e-12)


def test_extreme_cases():
    real = _features(60)
    assert precision_recall(real, real) == (1.0, 1.0)
    far = real + 100
    assert precision_recall(far, real) == (0.0, 0.0)
    # One good sample, repeated: precise, with almost no recall.
    collapsed = np.repeat(real[:1], 60, axis=0)
    precision, recall = precision_recall(collapsed, real)
    assert precision == 1.0 and recall <= 1 / 60
