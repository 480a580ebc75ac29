"""The Inception score against torch-fidelity's and cases known in closed form."""

import importlib

import numpy as np
import pytest

from ism_jax.evaluation.inception_score import inception_score


def _logits(count=103, classes=7, scale=3.0):
    rng = np.random.default_rng(0)
    return (scale * rng.normal(size=(count, classes))).astype(np.float32)


@pytest.mark.parametrize('splits, seed', [(10, 2020), (1, None), (4, None), (3, 7)])
def test_agrees_with_torch_fidelity(splits, seed, torch_fidelity):
    import torch

    metric = importlib.import_module('torch_fidelity.metric_isc')
    logits = _logits()
    theirs = metric.isc_features_to_metric(
        torch.from_numpy(logits), splits, shuffle=seed is not None, rng_seed=seed
    )
    expected = list(theirs.values())
    assert expected[0] > 1.5
    np.testing.assert_allclose(
        inception_score(logits, splits=splits, seed=seed), expected, rtol=1e-12
    )


def test_score_is_the_number_of_predicted_classes():
    # The same number of samples of 5 of 9 classes, predicted with certainty.
    certain = 1e4 * np.eye(9, dtype=np.float32)[np.arange(100) % 5]
    mean, deviation = inception_score(certain, splits=4, seed=None)
    assert (mean, deviation) == (pytest.approx(5.0, rel=1e-12), pytest.approx(0.0))
    # All samples are equal.
    np.testing.assert_allclose(inception_score(np.tile(_logits(1), (40, 1)))[0], 1.0)


def test_samples_sorted_by_class_are_shuffled():
    certain = 50 * np.eye(10)[np.arange(1000) // 100]
    assert inception_score(certain, seed=None)[0] == pytest.approx(1.0)
    assert 9.5 < inception_score(certain)[0] < 10
