"""Weights of DINOv2: interpolated positions, and the messages for other files."""

from dinov2_files import SIZES, write
import numpy as np
import pytest

from ism_jax.evaluation import feature_network
from ism_jax.interchange import dinov2_weights
from ism_jax.models import dinov2


@pytest.mark.parametrize('offset', [dinov2_weights.POSITION_OFFSET, 0.0])
@pytest.mark.parametrize('stored, grid', [(37, 16), (4, 16)])
def test_positions_are_interpolated_as_in_pytorch(stored, grid, offset):
    torch = pytest.importorskip('torch', reason='the reference')
    positions = np.random.default_rng(0).normal(size=(1 + stored**2, 5)).astype('f')
    square = torch.from_numpy(positions[1:].reshape(1, stored, stored, 5))
    scale = (grid + offset) / stored  # As in the code of DINOv2's authors.
    expected = torch.nn.functional.interpolate(
        square.permute(0, 3, 1, 2), scale_factor=(scale, scale), mode='bicubic'
    )
    expected = expected.permute(0, 2, 3, 1).reshape(grid**2, 5).numpy()
    ours = dinov2_weights.interpolate_positions(positions, grid, offset)
    np.testing.assert_array_equal(ours[0], positions[0])
    np.testing.assert_allclose(ours[1:], expected, atol=2e-5)


def test_the_offset_changes_the_positions():
    positions = np.random.default_rng(0).normal(size=(1 + 37**2, 5)).astype('f')
    with_it, without = (
        dinov2_weights.interpolate_positions(positions, 16, o) for o in (0.1, 0.0)
    )
    assert np.abs(with_it - without).max() > 0.1
    np.testing.assert_array_equal(
        dinov2_weights.interpolate_positions(positions, 37, 0.1), positions
    )


@pytest.mark.parametrize(
    'change, message',
    [
        (
            dict(model_type='dinov2_with_registers'),
            "model_type = 'dinov2_with_registers' must be 'dinov2'",
        ),
        (dict(hidden_act='relu'), "hidden_act = 'relu'"),
        (dict(num_attention_heads=5), 'num_attention_heads = 5 must divide'),
        (dict(patch_size=15), 'patch_size = 15 must divide'),
        (dict(num_hidden_layers=4), 'no tensor encoder.layer.3'),
        (dict(num_hidden_layers=2), 'DINOv2 .*18 unknown: encoder.layer.2'),
        (dict(image_size=70), r'position_embeddings is \(1, 17, 32\), expected'),
        (dict(mlp_ratio=2), 'blocks/mlp_in/bias is '),
    ],
)
def test_other_networks_are_rejected(tmp_path, change, message):
    folder = write(tmp_path / 'network', dinov2.Config(**SIZES), **change)
    with pytest.raises(ValueError, match=message):
        feature_network.load_dinov2(folder)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match='not a folder or a hub id'):
        feature_network.load_dinov2(tmp_path / 'nowhere' / 'at' / 'all')
    with pytest.raises(ValueError, match='is not the config.json of a DINOv2'):
        feature_network.load_dinov2(tmp_path)
    folder = write(tmp_path / 'network', dinov2.Config(**SIZES))
    (folder / 'model.safetensors').unlink()
    with pytest.raises(ValueError, match='model.safetensors is not a file'):
        feature_network.load_dinov2(folder)
    (folder / 'config.json').write_text('{"hidden_size": 3')
    with pytest.raises(ValueError, match='is not the config.json of a DINOv2'):
        feature_network.load_dinov2(folder)
