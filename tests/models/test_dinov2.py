"""DINOv2 against transformers', and its resize against Pillow's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from safetensors import numpy as safetensors

from ism_jax.evaluation import feature_network
from ism_jax.models import dinov2, named_tensors, resize

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=56)


def _images(height=40, width=60, batch=3):
    # Smooth and rough parts, and both ends of the range, where a cubic overshoots.
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, height, width, 3)).astype(np.uint8)
    images[:, : height // 2, : width // 2] = 255
    images[:, height // 2 :, width // 3 : width // 2] = 0
    return images


def _tensors(config: dinov2.Config, seed=0):
    """A random state_dict by the names of transformers."""
    rng = np.random.default_rng(seed)
    width, mlp = config.hidden_size, config.mlp_width
    gated = config.use_swiglu_ffn
    names = ('weights_in', 'weights_out') if gated else ('fc1', 'fc2')
    patch = (width, 3, config.patch_size, config.patch_size)
    positions = (config.image_size // config.patch_size) ** 2 + 1
    out = {
        'embeddings.cls_token': rng.normal(size=(1, 1, width)),
        'embeddings.mask_token': rng.normal(size=(1, width)),
        'embeddings.position_embeddings': rng.normal(size=(1, positions, width)),
        'embeddings.patch_embeddings.projection.weight': 0.1 * rng.normal(size=patch),
        'embeddings.patch_embeddings.projection.bias': rng.normal(size=width),
        'layernorm.weight': rng.uniform(0.5, 1.5, width),
        'layernorm.bias': rng.normal(size=width),
    }
    for number in range(config.num_hidden_layers):
        layer = f'encoder.layer.{number}'
        for name, shape in (
            ('attention.attention.query', (width, width)),
            ('attention.attention.key', (width, width)),
            ('attention.attention.value', (width, width)),
            ('attention.output.dense', (width, width)),
            (f'mlp.{names[0]}', (mlp * (1 + gated), width)),
            (f'mlp.{names[1]}', (width, mlp)),
        ):
            scale = 2 / shape[1] ** 0.5
            out[f'{layer}.{name}.weight'] = scale * rng.normal(size=shape)
            out[f'{layer}.{name}.bias'] = rng.normal(size=shape[0])
        for name in ('norm1', 'norm2'):
            out[f'{layer}.{name}.weight'] = rng.uniform(0.5, 1.5, width)
            out[f'{layer}.{name}.bias'] = rng.normal(size=width)
        for name in ('layer_scale1', 'layer_scale2'):
            out[f'{layer}.{name}.lambda1'] = rng.uniform(0.5, 1.5, width)
    return {name: tensor.astype(np.float32) for name, tensor in out.items()}


def _write(folder, config: dinov2.Config, tensors=None, **change):
    folder.mkdir(exist_ok=True)
    content = {**vars(config), 'model_type': 'dinov2', 'qkv_bias': True, **change}
    (folder / 'config.json').write_text(json.dumps(content))
    tensors = _tensors(config) if tensors is None else tensors
    safetensors.save_file(tensors, folder / 'model.safetensors')
    return folder


@pytest.mark.parametrize('gated', [False, True])
def test_agrees_with_transformers(gated, tmp_path):
    torch = pytest.importorskip('torch', reason='transformers computes with it')
    transformers = pytest.importorskip('transformers', reason='the other side')
    config = dinov2.Config(**SIZES, use_swiglu_ffn=gated)
    tensors = _tensors(config)
    theirs = transformers.Dinov2Model.from_pretrained(
        _write(tmp_path / 'network', config, tensors), attn_implementation='eager'
    ).eval()
    images = _images(dinov2.SIDE, dinov2.SIDE)
    pixels = (images / 255 - dinov2.MEAN) / dinov2.DEVIATION
    with torch.no_grad():
        pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))
        expected = theirs(pixels).last_hidden_state[:, 0].numpy()

    params = dinov2.params_from_tensors(tensors, config, position_offset=0.0)
    ours = dinov2.Dinov2(config).apply({'params': params}, images)['features']
    assert expected.std(axis=0).max() > 0.1  # The images are told apart.
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    print(f'DINOv2, features: {error:.1e} of the largest')
    assert error < 1e-5


@pytest.mark.parametrize('offset', [dinov2.POSITION_OFFSET, 0.0])
@pytest.mark.parametrize('stored, grid', [(37, 16), (4, 16)])
def test_positions_are_interpolated_as_by_pytorch(stored, grid, offset):
    torch = pytest.importorskip('torch', reason='the other side of the comparison')
    positions = np.random.default_rng(0).normal(size=(1 + stored**2, 5)).astype('f')
    square = torch.from_numpy(positions[1:].reshape(1, stored, stored, 5))
    scale = (grid + offset) / stored  # As the program of DINOv2's authors calls it.
    expected = torch.nn.functional.interpolate(
        square.permute(0, 3, 1, 2), scale_factor=(scale, scale), mode='bicubic'
    )
    expected = expected.permute(0, 2, 3, 1).reshape(grid**2, 5).numpy()
    ours = dinov2.interpolate_positions(positions, grid, offset)
    np.testing.assert_array_equal(ours[0], positions[0])
    np.testing.assert_allclose(ours[1:], expected, atol=2e-5)


def test_the_offset_of_positions_is_seen():
    positions = np.random.default_rng(0).normal(size=(1 + 37**2, 5)).astype('f')
    with_it, without = (
        dinov2.interpolate_positions(positions, 16, o) for o in (0.1, 0.0)
    )
    assert np.abs(with_it - without).max() > 0.1
    np.testing.assert_array_equal(
        dinov2.interpolate_positions(positions, 37, 0.1), positions
    )


@pytest.mark.parametrize(
    'height, width', [(256, 256), (512, 512), (32, 64), (256, 500), (224, 224)]
)
def test_resize_is_pillows(height, width):
    images = _images(height, width, batch=1)
    ours = np.asarray(resize.resize_as_pillow(jnp.asarray(images), 224))[0]
    resized = Image.fromarray(images[0]).resize((224, 224), Image.Resampling.BICUBIC)
    difference = np.abs(ours - np.asarray(resized).astype(np.float32))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    assert (ours == np.round(ours)).all() and ours.min() == 0 and ours.max() == 255


def test_folder_is_a_feature_network(tmp_path):
    config = dinov2.Config(**SIZES)
    folder = _write(tmp_path / 'network', config)
    network = feature_network.load_dinov2(folder, batch_size=3)
    assert network.name == 'dinov2-32x3x4-patch14'
    assert network.distance == 'FD-DINOv2-32x3x4-patch14'  # Never FD-DINOv2 itself.
    images = _images()
    features = network(images)['features']
    assert features.shape == (3, 32) and features.dtype == np.float32
    # The resize is part of the network, and the authors' positions the default.
    pillow = [Image.fromarray(i).resize((224, 224), Image.BICUBIC) for i in images]
    params = dinov2.params_from_tensors(_tensors(config), config)
    same = dinov2.Dinov2(config).apply({'params': params}, np.stack(pillow))
    np.testing.assert_allclose(features, same['features'], rtol=1e-2, atol=1e-2)


def test_vit_l14_is_called_fd_dinov2(tmp_path, monkeypatch):
    config = dinov2.Config(1024, 24, 16)
    folder = _write(tmp_path / 'large', config, {'x': np.zeros(1, np.float32)})
    monkeypatch.setattr(dinov2, 'params_from_tensors', lambda tensors, config: {})
    network = feature_network.load_dinov2(folder)
    assert (network.name, network.distance) == ('dinov2-vitl14', 'FD-DINOv2')
    expected = named_tensors.abstract_params(
        dinov2.Dinov2(config), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)
    )
    # 304.4 million of facebook/dinov2-large, less the mask token and the positions
    # that 16 x 16 patches do not need.
    count = sum(leaf.size for leaf in jax.tree.leaves(expected))
    assert count == 304_368_640 - 1024 - (37**2 - 16**2) * 1024


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(model_type='dinov2_with_registers'), "model_type = 'dinov2_with_reg"),
        (dict(hidden_act='relu'), "hidden_act = 'relu'"),
        (dict(num_attention_heads=5), 'num_attention_heads = 5 does not divide'),
        (dict(patch_size=15), 'patch_size = 15 must divide'),
        (dict(num_hidden_layers=4), 'no tensor encoder.layer.3'),
        (dict(num_hidden_layers=2), 'tensors that DINOv2 .* has not: encoder.layer.2'),
        (dict(mlp_ratio=2), 'blocks/mlp_in/bias of shape'),
    ],
)
def test_other_networks_are_refused(tmp_path, change, message):
    folder = _write(tmp_path / 'network', dinov2.Config(**SIZES), **change)
    with pytest.raises(ValueError, match=message):
        feature_network.load_dinov2(folder)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match='no folder and no hub id'):
        feature_network.load_dinov2(tmp_path / 'nowhere' / 'at' / 'all')
    with pytest.raises(ValueError, match='no config.json of a DINOv2'):
        feature_network.load_dinov2(tmp_path)
    folder = _write(tmp_path / 'network', dinov2.Config(**SIZES))
    (folder / 'model.safetensors').unlink()
    with pytest.raises(ValueError, match='model.safetensors is not a file'):
        feature_network.load_dinov2(folder)
    (folder / 'config.json').write_text('{"hidden_size": 3')
    with pytest.raises(ValueError, match='no config.json of a DINOv2'):
        feature_network.load_dinov2(folder)
