"""TFDS data sets: features, splits, labels, preparation."""

import subprocess
import sys

import numpy as np
import pytest
from tfds_files import png, write_small_mnist, write_tfds

from ism_jax.data import sources, tfds_source
from ism_jax.data.source import CorruptImageError


def _tfds(name, root, **options):
    options = dict(image_size=32, channels=1, data_dir=str(root)) | options
    return sources.make_source(f'tfds:{name}', **options)


def test_small_images_are_padded(tmp_path, make_loader):
    write_small_mnist(tmp_path)
    source, test = _tfds('mnist', tmp_path), _tfds('mnist', tmp_path, split='test')
    assert len(source) == len(test) == 10 and source.class_names == tuple('0123456789')
    for index in range(10):
        record = source[index]
        image = record['image']
        assert image.dtype == np.uint8 and record['label'].dtype == np.int32
        # Padded, not scaled, like the other digits.
        expected = np.zeros((32, 32, 1))
        expected[2:-2, 2:-2] = 20 * int(record['label']) + 10
        np.testing.assert_array_equal(image, expected)
    assert test[0]['image'].max() % 20 == 11
    assert repr(source) == repr(_tfds('mnist', tmp_path)) != repr(test)
    pool = next(make_loader(source, batches=1, batch_size=10))
    centre = np.rint((pool.images[0, :, 16, 16, 0] + 1) * 127.5)
    np.testing.assert_array_equal(centre, 20 * pool.labels[0] + 10)
    assert sorted(pool.labels[0]) == list(range(10))


def test_features_are_found_and_large_images_cropped(tmp_path):
    import tensorflow_datasets as tfds

    array = np.zeros((40, 80, 3), np.uint8)
    array[:, 20:60] = (50, 100, 150)
    features = {
        'picture': tfds.features.Image(shape=(None, None, 3)),
        'coarse': tfds.features.ClassLabel(names=['a']),
        'fine': tfds.features.ClassLabel(names=['x', 'y']),
        'id': tfds.features.Text(),
    }
    example = {'picture': png(array), 'coarse': 0, 'fine': 1, 'id': 'n'}
    write_tfds(tmp_path, 'photos', '1.0.0', features, {'train': [example]})
    source = _tfds('photos', tmp_path, channels=3, image_size=20)
    record = source[0]
    assert (record['image'] == (50, 100, 150)).all() and record['label'] == 1
    assert source.class_names == ('x', 'y') and record['image'].shape == (20, 20, 3)


@pytest.mark.parametrize('case', ['no label', 'two images', 'sixteen bits'])
def test_data_sets_without_one_image_and_one_label_are_refused(tmp_path, case):
    import tensorflow_datasets as tfds

    image = tfds.features.Image(shape=(8, 8, 1))
    label = tfds.features.ClassLabel(names=['a'])
    deep = tfds.features.Image(shape=(8, 8, 1), dtype=np.uint16, encoding_format='png')
    features, message = {
        'no label': (
            dict(image=image),
            r"0 features of type ClassLabel among \['image'\]",
        ),
        'two images': (
            dict(left=image, right=image, label=label),
            r"2 features of type Image with 8 bits among \['label', 'left', 'right'\]",
        ),
        'sixteen bits': (
            dict(image=deep, label=label),
            '0 features of type Image with 8 bits',
        ),
    }[case]
    pixels = np.zeros((8, 8), np.uint16 if case == 'sixteen bits' else np.uint8)
    example = {k: 0 if k == 'label' else png(pixels) for k in features}
    write_tfds(tmp_path, 'odd', '1.0.0', features, {'train': [example]})
    with pytest.raises(ValueError, match='tfds:odd.*' + message):
        _tfds('odd', tmp_path)


def test_images_without_a_class_or_damaged_are_named(tmp_path):
    import tensorflow_datasets as tfds

    features = {
        'image': tfds.features.Image(shape=(8, 8, 1)),
        'label': tfds.features.ClassLabel(names=['a']),
    }
    pixels = png(np.zeros((8, 8), np.uint8))
    broken = png(np.random.default_rng(0).integers(0, 255, (8, 8), np.uint8))
    broken.truncate(60)
    examples = [{'image': pixels, 'label': -1}, {'image': broken, 'label': 0}]
    write_tfds(tmp_path, 'odd', '1.0.0', features, {'test': examples})
    source, errors = _tfds('odd', tmp_path, split='test'), []
    for index in range(2):
        with pytest.raises(ValueError, match=r'image \d of TfdsSource.*odd') as caught:
            source[index]
        errors.append(caught.value)
    corrupt, unlabelled = sorted(errors, key=lambda e: 'no class' in str(e))
    assert isinstance(corrupt, CorruptImageError)
    assert 'its label is -1; choose another split' in str(unlabelled)


def test_unknown_names_and_splits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="tfds:cifar1000.*did you mean 'cifar10"):
        _tfds('cifar1000', tmp_path)
    write_small_mnist(tmp_path)
    with pytest.raises(ValueError, match="tfds:mnist has no split 'dev'.*train"):
        _tfds('mnist', tmp_path, split='dev')
    with pytest.raises(ValueError, match=r"tfds:mnist has no split 'train\[:0\]'"):
        _tfds('mnist', tmp_path, split='train[:0]')


def test_first_use_prepares_in_another_process(tmp_path, monkeypatch):
    commands = []

    def run(command):
        commands.append(command)
        failed = len(commands) == 1
        if not failed:
            write_small_mnist(tmp_path)
        return subprocess.CompletedProcess(command, int(failed))

    monkeypatch.setattr(tfds_source.subprocess, 'run', run)
    monkeypatch.setattr(tfds_source.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match='only preparing needs TensorFlow: run `pip'):
        _tfds('mnist', tmp_path)
    monkeypatch.setattr(tfds_source.importlib.util, 'find_spec', lambda name: name)
    with pytest.raises(ValueError, match='could not be prepared.*tfds build.*mnist'):
        _tfds('mnist', tmp_path)
    assert len(_tfds('mnist', tmp_path)) == 10
    assert len(_tfds('mnist', tmp_path)) == 10  # No third command.
    assert len(commands) == 2
    assert commands[0][0] == sys.executable
    assert commands[0][-2:] == ['mnist', str(tmp_path)]
    assert 'download_and_prepare' in commands[0][-3]
