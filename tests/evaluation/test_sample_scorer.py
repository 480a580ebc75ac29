"""Scores of samples by a small classifier, with a stand-in for the classifier."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from ism_jax.data import array_source, pixels
from ism_jax.evaluation import classifier, frechet_distance, sample_scorer
from ism_jax.objectives import ism
from ism_jax.sampling import sampler as sampler_lib


def two_pixels(images):
    """Features: the first two pixels. Class: the brighter one."""
    assert images.dtype == np.float32
    features = np.reshape(images, (len(images), -1))[:, :2]
    return {'features': features, 'logits': features}


def two_pixel_images(number, seed=0):
    values = np.random.RandomState(seed).uniform(-1, 1, (number, 1, 2, 1))
    return values.astype(np.float32)


def brighter(images):
    return images.reshape(len(images), 2).argmax(axis=1)


@pytest.fixture
def real():
    return pixels.to_uint8(two_pixel_images(50))


@pytest.fixture
def make_scorer(real, monkeypatch):
    monkeypatch.setattr(classifier, 'load_or_train', lambda *_, **__: two_pixels)
    source = array_source.ArraySource('pixels', real, brighter(real), ['left', 'right'])

    def apply(params, x, t, d, w, label):
        # Straight to two pixels; the pixel of the label is brighter.
        target = jnp.where(jnp.arange(2)[None] == label[:, None], 0.5, -0.5)
        return (target[:, None, :, None] + params * w[:, None, None, None] - x) / (
            1 - t[:, None, None, None]
        )

    sampler = sampler_lib.Sampler(
        ism.Objective(num_classes=2), apply, (1, 2, 1), batch_size=8
    )
    options = dict(cache_dir=None, seed=0, log=lambda line: None)
    return lambda samples: sample_scorer.SampleScorer(
        source, sampler, samples=samples, **options
    )


@pytest.fixture
def scorer(make_scorer):
    return make_scorer(50)


def _textbook_distance(features1, features2):
    """Equation 6 of Heusel et al., by SciPy's Schur method."""
    covariance1, covariance2 = np.cov(features1.T), np.cov(features2.T)
    root = scipy.linalg.sqrtm(covariance1 @ covariance2).real
    means = ((features1.mean(0) - features2.mean(0)) ** 2).sum()
    return means + np.trace(covariance1 + covariance2 - 2 * root)


def _rounded(images):
    images = pixels.to_float(pixels.to_uint8(images))
    return images.reshape(-1, 2).astype(np.float64)


def test_scores_are_of_all_batches_together(scorer, real):
    samples = two_pixel_images(30, seed=1) / 2
    labels = brighter(samples)
    labels[:3] = 1 - labels[:3]
    result = scorer.score(
        (samples[i : i + 8], labels[i : i + 8]) for i in range(0, 30, 8)
    )
    assert set(result) == {'fd', 'accuracy', 'samples'}
    assert result['samples'] == 30 and result['accuracy'] == 0.9

    order = np.random.default_rng(0).permutation(50)
    reference = real[order][classifier.split(50)[0]]
    expected = _textbook_distance(_rounded(samples), _rounded(reference))
    np.testing.assert_allclose(result['fd'], expected, rtol=1e-6)
    # The distance of samples that were not rounded differs.
    not_rounded = _textbook_distance(samples.reshape(30, 2), _rounded(reference))
    assert abs(not_rounded - expected) > 1e-5 * expected


def test_distance_of_real_images_to_themselves_is_zero(real):
    statistics = sample_scorer.feature_statistics(two_pixels, real, batch_size=7)
    whole = sample_scorer.feature_statistics(two_pixels, real)
    distance = frechet_distance.frechet_distance(statistics, whole)
    assert distance == pytest.approx(0, abs=1e-12)


def test_floor_is_of_the_held_out_images(scorer):
    assert scorer.floor['samples'] == 5 and scorer.floor['accuracy'] == 1
    assert scorer.reference.startswith("45 real images of ArraySource('pixels'")


@pytest.mark.parametrize('samples, floor', [(2, 2), (5, 5), (14, 14), (100, 14)])
def test_floor_has_as_many_images_as_there_are_samples(
    make_scorer, monkeypatch, samples, floor
):
    """A tenth of the 40 images that may be read is held out; 10 images are left."""
    monkeypatch.setattr(sample_scorer, 'MAX_REAL_IMAGES', 40)
    scorer = make_scorer(samples)
    assert scorer.floor['samples'] == floor
    assert scorer.reference.startswith('36 real images')


def test_a_diverged_model_gets_a_nan_and_a_warning(scorer):
    samples = two_pixel_images(10)
    labels = brighter(samples)
    samples[3, 0, 0] = np.nan
    with pytest.warns(UserWarning, match='1 of 10 samples'):
        result = scorer.score([(samples, labels)])
    assert math.isnan(result['fd'])
    assert (result['accuracy'], result['samples']) == (0.9, 10)
    with pytest.warns(UserWarning, match='10 of 10 samples'):
        result = scorer.score([(samples * np.nan, labels)])
    assert result['accuracy'] == 0


def test_too_few_real_images_are_refused(real):
    source = array_source.ArraySource('few', real[:19], np.zeros(19, int), ['only'])
    with pytest.raises(ValueError, match='has 19 images, but scores need at least 20'):
        sample_scorer.SampleScorer(source, None, cache_dir=None, seed=0, samples=9)


def test_settings_are_scored_and_replace_their_earlier_records(scorer, tmp_path):
    lines = []

    def score(steps, params):
        return sample_scorer.score_settings(
            scorer, params, trained_steps=7, steps=steps, guidance=(0.0, 1.0),
            samples=12, workdir=tmp_path, log=lines.append,
        )  # fmt: skip

    first = score((1, 2), 0.0)
    assert [(r['steps'], r['guidance']) for r in first] == [
        (1, 0.0), (1, 1.0), (2, 0.0), (2, 1.0),
    ]  # fmt: skip
    assert all(r['accuracy'] == 1 and r['trained_steps'] == 7 for r in first)
    assert '12 samples per setting, against 45 real images' in lines[-1]
    second = score((1,), 0.1)
    found = json.loads((tmp_path / 'scores.json').read_text())
    assert found == first[2:] + second
