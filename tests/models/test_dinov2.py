"""DINOv2 against that of transformers."""

from dinov2_files import SIZES, random_tensors, write
import jax
import numpy as np
from PIL import Image
import pytest

from ism_jax.evaluation import feature_network
from ism_jax.interchange import dinov2_weights, named_tensors
from ism_jax.models import dinov2


def _images(height=40, width=60, batch=3):
    # Flat and rough areas, and both ends of the range, where a cubic overshoots.
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, height, width, 3)).astype(np.uint8)
    images[:, : height // 2, : width // 2] = 255
    images[:, height // 2 :, width // 3 : width // 2] = 0
    return images


@pytest.mark.parametrize('gated', [False, True])
def test_agrees_with_transformers(gated, tmp_path, monkeypatch):
    torch = pytest.importorskip('torch', reason='transformers computes with it')
    transformers = pytest.importorskip('transformers', reason='the reference')
    config = dinov2.Config(**SIZES, use_swiglu_ffn=gated)
    tensors = random_tensors(config)
    theirs = transformers.Dinov2Model.from_pretrained(
        write(tmp_path / 'network', config, tensors), attn_implementation='eager'
    ).eval()
    images = _images(dinov2.SIDE, dinov2.SIDE)
    pixels = (images / 255 - dinov2.MEAN) / dinov2.DEVIATION
    with torch.no_grad():
        pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))
        expected = theirs(pixels).last_hidden_state[:, 0].numpy()

    monkeypatch.setattr(dinov2_weights, 'POSITION_OFFSET', 0.0)
    params = dinov2_weights.params_from_tensors(tensors, config)
    ours = dinov2.Dinov2(config).apply({'params': params}, images)['features']
    assert expected.std(axis=0).max() > 0.1  # The images have different features.
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    print(f'DINOv2, features: {error:.1e} of the largest value')
    assert error < 1e-5


def test_a_folder_loads_as_a_feature_network(tmp_path):
    config = dinov2.Config(**SIZES)
    folder = write(tmp_path / 'network', config)
    network = feature_network.load_dinov2(folder, batch_size=3)
    assert network.name == 'dinov2-32x3x4-patch14'
    assert network.distance == 'FD-DINOv2-32x3x4-patch14'  # Never FD-DINOv2 itself.
    images = _images()
    features = network(images)['features']
    assert features.shape == (3, 32) and features.dtype == np.float32
    # The network resizes, and the default positions are the authors'.
    pillow = [Image.fromarray(i).resize((224, 224), Image.BICUBIC) for i in images]
    params = dinov2_weights.params_from_tensors(random_tensors(config), config)
    same = dinov2.Dinov2(config).apply({'params': params}, np.stack(pillow))
    np.testing.assert_allclose(features, same['features'], rtol=1e-2, atol=1e-2)


def test_vit_l14_is_called_fd_dinov2(tmp_path, monkeypatch):
    config = dinov2.Config(1024, 24, 16)
    folder = write(tmp_path / 'large', config, {'x': np.zeros(1, np.float32)})
    monkeypatch.setattr(
        dinov2_weights, 'params_from_tensors', lambda tensors, config: {}
    )
    network = feature_network.load_dinov2(folder)
    assert (network.name, network.distance) == ('dinov2-vitl14', 'FD-DINOv2')
    expected = named_tensors.abstract_params(dinov2.Dinov2(config))
    # facebook/dinov2-large without the mask token, with 16 x 16 instead of 37 x 37
    # positions.
    count = sum(leaf.size for leaf in jax.tree.leaves(expected))
    assert count == 304_368_640 - 1024 - (37**2 - 16**2) * 1024
