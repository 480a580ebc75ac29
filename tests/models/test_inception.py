"""The Inception network of FID against that of torch-fidelity, with random weights."""

import importlib

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from ism_jax.evaluation import feature_network
from ism_jax.interchange import inception_weights
from ism_jax.models import inception
from ism_jax.runtime import checksums

SPATIAL = (17, 17, 7)


@pytest.fixture(scope='module')
def params(inception_tensors):
    return inception_weights.params_from_tensors(inception_tensors)


@pytest.fixture(scope='module')
def apply():
    return jax.jit(lambda params, x: inception.Inception().apply({'params': params}, x))


def _images(side_y=32, side_x=40, batch=2):
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (batch, side_y, side_x, 3)).astype(np.uint8)


def test_agrees_with_torch_fidelity(inception_file, torch_fidelity):
    import torch

    module = importlib.import_module('torch_fidelity.feature_extractor_inceptionv3')
    theirs = module.FeatureExtractorInceptionV3(
        'inception-v3-compat',
        ['2048', 'logits_unbiased'],
        feature_extractor_weights_path=inception_file,
    )
    seen = {}
    theirs.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, inputs, output: seen.update(spatial=output)
    )
    images = _images()
    with torch.no_grad():
        features, logits = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    spatial = seen['spatial'][:, :7].permute(0, 2, 3, 1).reshape(len(images), -1)

    network = feature_network.load_inception(
        inception_file, other_name='random', batch_size=2
    )
    ours = network(images)
    pairs = {'features': features, 'spatial': spatial, 'unbiased_logits': logits}
    for name, value in pairs.items():
        value = value.numpy()
        assert value.std(axis=0).max() > 0.05  # The two images have different features.
        assert ours[name].shape == value.shape and ours[name].dtype == np.float32
        error = np.abs(ours[name] - value).max() / np.abs(value).max()
        print(f'Inception, {name}: {error:.1e} of the largest value')
        assert error < 1e-5


def test_outputs_are_the_documented_layers(params, apply):
    images = _images()
    out = jax.tree.map(np.asarray, apply(params, images))
    assert out['features'].shape == (2, 2048)
    assert out['spatial'].shape == (2, inception.NUM_SPATIAL) == (2, 2023)
    assert out['unbiased_logits'].shape == (2, inception.NUM_LOGITS)
    np.testing.assert_allclose(
        out['unbiased_logits'],
        out['features'] @ params['fc']['kernel'],
        rtol=1e-4,
        atol=1e-4,
    )
    # `spatial` contains only seven channels of the first branch of Mixed_6d.
    changed = jax.tree.map(np.copy, params)
    changed['Mixed_6d']['branch1x1']['conv']['bias'][3] += 1.0
    changed['Mixed_6d']['branch1x1']['conv']['bias'][7] += 1.0
    other = np.asarray(apply(changed, images)['spatial'])
    differs = np.abs(other - out['spatial']).reshape(2, *SPATIAL).max((0, 1, 2)) > 0
    np.testing.assert_array_equal(differs, np.arange(7) == 3)


@pytest.mark.parametrize('height, width', [(32, 40), (299, 299), (400, 320)])
def test_resize_is_that_of_tensorflow_1(height, width):
    image = _images(height, width, batch=1).astype(np.float32)
    ours = np.asarray(inception.resize_as_tensorflow1(image, 299))[0]
    for y, x in [(0, 0), (1, 2), (150, 149), (298, 298), (297, 5)]:
        # Its definition, one pixel at a time.
        down, across = y * height / 299, x * width / 299
        top, left = int(down), int(across)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        down, across = down - top, across - left
        expected = (1 - down) * (
            (1 - across) * image[0, top, left] + across * image[0, top, right]
        ) + down * (
            (1 - across) * image[0, bottom, left] + across * image[0, bottom, right]
        )
        np.testing.assert_allclose(ours[y, x], expected, atol=0.02)
    if height == width == 299:
        np.testing.assert_array_equal(ours, image[0])
    else:
        # Half-pixel centres give other values.
        centred = jax.image.resize(image[0], (299, 299, 3), 'linear', antialias=False)
        assert np.abs(ours - centred).mean() > 5


def test_other_weights_require_a_name(inception_tensors, params, tmp_path, apply):
    path = tmp_path / 'weights.safetensors'
    counter = {'Mixed_5b.branch1x1.bn.num_batches_tracked': np.array(7)}
    safetensors.save_file(inception_tensors | counter, path)
    with pytest.raises(ValueError, match='is not the Inception network that defines'):
        feature_network.load_inception(path)
    network = feature_network.load_inception(path, other_name='mine', batch_size=3)
    assert (network.name, network.distance) == ('mine', 'FD-mine')
    assert network.identity['weights'] == checksums.sha256(path)
    # Three images pad one batch on eight devices, and nine make two batches.
    images = _images(batch=9)
    many = network(images)
    np.testing.assert_allclose(
        network(images[:3])['features'], many['features'][:3], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        many['features'][8:],
        apply(params, images[8:])['features'],
        rtol=1e-4,
        atol=1e-5,
    )
    # A grey channel is repeated; floating images are rounded to 8 bits.
    grey = images[:2, ..., :1]
    shown = network(grey)['features']
    np.testing.assert_array_equal(shown, network(np.tile(grey, 3))['features'])
    np.testing.assert_array_equal(shown, network(grey / 127.5 - 1.0)['features'])
    with pytest.raises(AssertionError, match='decode latents first'):
        network(np.zeros((2, 8, 8, 4)))


def test_distances_of_the_published_file_are_called_fid(
    inception_tensors, tmp_path, monkeypatch
):
    path = tmp_path / 'weights.safetensors'
    safetensors.save_file(inception_tensors, path)
    checksum = checksums.sha256(path)
    monkeypatch.setattr(inception_weights, 'PUBLISHED_SHA256', checksum)
    network = feature_network.load_inception(path)
    assert (network.name, network.distance) == ('inception-2015-12-05', 'FID')


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match='missing.pth is not a file'):
        feature_network.load_inception(tmp_path / 'missing.pth', other_name='mine')
