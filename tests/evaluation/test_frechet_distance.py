"""The Frechet distance against SciPy, torch-fidelity and closed forms."""

import importlib

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from ism_jax.evaluation import frechet_distance


def _statistics(features):
    statistics = frechet_distance.FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics


def _random_covariance(random, size, rank=None, decay=0.0):
    factor = random.standard_normal((size, rank or size))
    factor = factor * np.exp(-decay * np.arange(size))[:, None]
    return factor @ factor.T


def _textbook_distance(mean1, covariance1, mean2, covariance2):
    """Equation 6 of Heusel et al., by SciPy's Schur method."""
    root = scipy.linalg.sqrtm(covariance1 @ covariance2).real
    traces = np.trace(covariance1 + covariance2 - 2 * root)
    return ((mean1 - mean2) ** 2).sum() + traces


@pytest.mark.parametrize('size, decay', [(1, 0.0), (5, 0.0), (64, 0.0), (64, 0.05)])
def test_distance_agrees_with_scipy(size, decay):
    random = np.random.RandomState(size)
    arguments = (
        random.standard_normal(size),
        _random_covariance(random, size, decay=decay),
        random.standard_normal(size),
        _random_covariance(random, size, decay=decay),
    )
    np.testing.assert_allclose(
        frechet_distance.gaussian_distance(*arguments),
        _textbook_distance(*arguments),
        rtol=1e-8,
    )


def test_distance_of_diagonal_gaussians_is_the_distance_of_deviations():
    random = np.random.RandomState(0)
    mean1, mean2 = random.standard_normal((2, 30))
    # Over twelve orders of magnitude, and a few of them 0.
    deviations1, deviations2 = 10.0 ** random.uniform(-6, 0, (2, 30))
    deviations1[:4] = 0
    deviations2[2:6] = 0
    expected = ((mean1 - mean2) ** 2).sum() + ((deviations1 - deviations2) ** 2).sum()
    computed = frechet_distance.gaussian_distance(
        mean1, np.diag(deviations1**2), mean2, np.diag(deviations2**2)
    )
    np.testing.assert_allclose(computed, expected, rtol=1e-12)


def test_distance_of_scaled_covariances():
    covariance = _random_covariance(np.random.RandomState(0), 20)
    computed = frechet_distance.gaussian_distance(
        np.zeros(20), covariance, np.zeros(20), 9 * covariance
    )
    np.testing.assert_allclose(computed, 4 * np.trace(covariance), rtol=1e-10)


@pytest.mark.parametrize('samples', [400, 20])
def test_distance_agrees_with_torch_fidelity(samples, torch_fidelity):
    """Also of fewer samples than features, where the covariances are singular."""
    import torch

    metric = importlib.import_module('torch_fidelity.metric_fid')
    random = np.random.RandomState(samples)
    # Rectified, as features of Inception are.
    features = [
        np.maximum(random.standard_normal((samples, 64)) * width + 0.3, 0)
        for width in (1.0, 1.3)
    ]
    theirs = metric.fid_statistics_to_metric(
        *(metric.fid_features_to_statistics(torch.from_numpy(f)) for f in features),
        verbose=False,
    )
    ours = frechet_distance.frechet_distance(*map(_statistics, features))
    assert ours == pytest.approx(theirs['frechet_inception_distance'], rel=1e-6)


def test_distance_of_few_samples_is_exact():
    """tr (S1 S2)^(1/2) is the sum of singular values of the centred features' product.

    That needs no covariance, so nothing is singular.
    """
    random = np.random.RandomState(1)
    features = [random.standard_normal((20, 300)) + shift for shift in (0.0, 0.1)]
    centred = [f - f.mean(0)[None] for f in features]
    product = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum() / 19
    traces = sum((c**2).sum() / 19 for c in centred)
    means = ((features[0].mean(0) - features[1].mean(0)) ** 2).sum()
    expected = means + traces - 2 * product
    ours = frechet_distance.frechet_distance(*map(_statistics, features))
    assert ours == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('rank', [3, 64])
def test_distance_of_a_gaussian_to_itself_is_zero(rank):
    covariance = _random_covariance(np.random.RandomState(0), 64, rank)
    mean = np.arange(64.0)
    computed = frechet_distance.gaussian_distance(mean, covariance, mean, covariance)
    assert 0 <= computed <= 1e-12 * np.trace(covariance)


def test_distance_of_singular_covariances_is_exact():
    # In rotated axes the deviations are known, and a third of them is 0 in each.
    random = np.random.RandomState(1)
    rotation = np.linalg.qr(random.standard_normal((60, 60)))[0]
    deviations1, deviations2 = random.uniform(0.5, 2, (2, 60))
    deviations1[:20] = 0
    deviations2[10:30] = 0
    covariance1 = (rotation * deviations1[None] ** 2) @ rotation.T
    covariance2 = (rotation * deviations2[None] ** 2) @ rotation.T
    computed = frechet_distance.gaussian_distance(
        np.zeros(60), covariance1, np.zeros(60), covariance2
    )
    expected = ((deviations1 - deviations2) ** 2).sum()
    np.testing.assert_allclose(computed, expected, rtol=1e-10)


def test_distance_of_fewer_samples_than_features():
    # The samples lie in 40 of 64 dimensions, where the covariance of one set is
    # regular: there SciPy's answer can be trusted.
    random = np.random.RandomState(2)
    basis = np.linalg.qr(random.standard_normal((64, 40)))[0]
    few, many = random.standard_normal((10, 40)), random.standard_normal((900, 40)) * 2
    computed = frechet_distance.frechet_distance(
        _statistics(few @ basis.T), _statistics(many @ basis.T)
    )
    covariance1, covariance2 = np.cov(few.T), np.cov(many.T)
    root = scipy.linalg.sqrtm(covariance2).real
    values = np.linalg.eigvalsh(root @ covariance1 @ root)[-9:]  # The rest is 0.
    expected = (
        ((few.mean(0) - many.mean(0)) ** 2).sum()
        + np.trace(covariance1)
        + np.trace(covariance2)
        - 2 * np.sqrt(values).sum()
    )
    np.testing.assert_allclose(computed, expected, rtol=1e-10)


def test_distance_is_symmetric():
    random = np.random.RandomState(3)
    first = _statistics(random.standard_normal((20, 8)))
    second = _statistics(3 * random.standard_normal((5, 8)) + 1)
    forth = frechet_distance.frechet_distance(first, second)
    assert forth > 1
    np.testing.assert_allclose(
        forth, frechet_distance.frechet_distance(second, first), rtol=1e-12
    )


def test_statistics_do_not_depend_on_the_batches():
    # The mean is 1e6 deviations away: raw float64 second moments would keep 4 digits.
    features = np.random.RandomState(0).standard_normal((100, 7)) + 1e6
    statistics = frechet_distance.FeatureStatistics(7)
    for batch in np.split(features, [1, 1, 40, 97]):
        statistics.update(batch)
    assert statistics.count == 100
    np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(statistics.covariance(), np.cov(features.T), atol=1e-8)


def test_statistics_of_float32_features_are_float64():
    features = np.random.RandomState(0).standard_normal((50, 3)).astype(np.float32)
    statistics = _statistics(jnp.asarray(features))
    assert statistics.scatter.dtype == statistics.mean.dtype == np.float64
    expected = np.cov(features.T.astype(np.float64))
    np.testing.assert_allclose(statistics.covariance(), expected, rtol=1e-12)


def test_update_takes_an_empty_batch():
    statistics = frechet_distance.FeatureStatistics(2)
    statistics.update(np.zeros((0, 2)))
    assert statistics.count == 0 and not statistics.mean.any()


def test_a_covariance_with_negative_eigenvalues_is_refused():
    mean, bad = np.zeros(2), np.diag([1, -0.1])
    with pytest.raises(ValueError, match='eigenvalue -0.1 .* semi-definite'):
        frechet_distance.gaussian_distance(mean, np.eye(2), mean, bad)
    # As float32 rounds a singular covariance.
    rounded = np.diag([1, -1e-7])
    assert frechet_distance.gaussian_distance(mean, rounded, mean, rounded) < 1e-12
