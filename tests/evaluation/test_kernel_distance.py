"""The kernel distance against torch-fidelity's, its definition and an expectation."""

import importlib

import numpy as np
import pytest

from ism_jax.evaluation.kernel_distance import kernel_distance, squared_discrepancy


def _features(count, width=16, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, width)) + shift).astype(np.float32)


def test_agrees_with_torch_fidelity(torch_fidelity):
    import torch

    metric = importlib.import_module('torch_fidelity.metric_kid')
    first, second = _features(150), _features(120, shift=0.4, seed=1)
    theirs = metric.kid_features_to_metric(
        *(torch.from_numpy(f.astype(np.float64)) for f in (first, second)),
        kid_subsets=7,
        kid_subset_size=50,
        rng_seed=3,
        verbose=False,
    )
    expected = list(theirs.values())
    assert expected[0] > 10 * expected[1] / 7**0.5
    ours = kernel_distance(first, second, subsets=7, subset_size=50, seed=3)
    np.testing.assert_allclose(ours, expected, rtol=1e-10)


def test_is_its_definition_term_by_term():
    x, y = _features(6, 3), _features(5, 3, shift=0.5, seed=1)

    def kernel(a, b):
        return (float(a.astype(np.float64) @ b) / 3 + 1) ** 3

    expected = -2 / 30 * sum(kernel(a, b) for a in x for b in y)
    for points in (x, y):
        pairs = [
            kernel(a, b)
            for i, a in enumerate(points)
            for j, b in enumerate(points)
            if i != j
        ]
        expected += np.mean(pairs)
    assert squared_discrepancy(x, y) == pytest.approx(expected, rel=1e-10)


def test_is_unbiased():
    # E k(x, y) of independent features is the same within and between the sets.
    x, y = _features(4000), _features(4000, seed=1)
    mean, deviation = kernel_distance(x, y, subsets=200, subset_size=20)
    assert abs(mean) < 4 * deviation / 200**0.5
    # The biased estimate, with the diagonals, would be off by far more.
    assert 4 * deviation / 200**0.5 < (2.0**3 - 1) / 20
