"""Files of the autoencoder: round trips, and the messages for others."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_autoencoder

from ism_jax.interchange import autoencoder_weights
from ism_jax.runtime import sharding


@pytest.fixture(scope='module')
def tiny():
    return tiny_autoencoder.make()


def _older(tensors):
    """Attention layers as in diffusers before 0.12: 1 x 1 convolutions."""
    older = {}
    for name, array in tensors.items():
        for old, new in autoencoder_weights.OLD_NAMES.items():
            if f'attentions.0.{new}.' in name:
                name = name.replace(new, old)
                if array.ndim == 2:
                    array = array[:, :, None, None]
        older[name] = array
    return older


@pytest.mark.parametrize('change', [lambda t: t, _older], ids=['newer', 'older'])
def test_round_trip_of_current_and_old_files(tiny, tmp_path, change):
    autoencoder, params = tiny
    tiny_autoencoder.save(tmp_path, autoencoder, params)
    path = tmp_path / autoencoder_weights.WEIGHTS
    tensors = safetensors.numpy.load_file(path)
    path.write_bytes(safetensors.numpy.save(change(tensors)))
    loaded, again = autoencoder_weights.load(str(tmp_path))
    assert loaded == autoencoder
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert autoencoder_weights.load(str(path))[0] == autoencoder  # The file alone.
    assert len(autoencoder_weights.digest(str(tmp_path))) == 64


def test_half_precision_files_are_read_as_float32(tiny, tmp_path):
    autoencoder, params = tiny
    tiny_autoencoder.save(tmp_path, autoencoder, params)
    path = tmp_path / autoencoder_weights.WEIGHTS
    for kind in ('float16', jnp.bfloat16):
        tensors = {
            n: a.astype(kind)
            for n, a in tiny_autoencoder.tensors_from_params(params).items()
        }
        path.write_bytes(safetensors.numpy.save(tensors))
        _, again = autoencoder_weights.load(str(tmp_path))
        for leaf, other in zip(
            jax.tree.leaves(again), jax.tree.leaves(params), strict=True
        ):
            assert leaf.dtype == jnp.float32
            np.testing.assert_allclose(leaf, other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    'change,message',
    [
        (lambda t: t.pop('encoder.conv_in.bias'), '1 missing: encoder.conv_in.bias'),
        (lambda t: t.update(extra=np.ones(1, np.float32)), '1 unknown: extra'),
        (
            lambda t: t.update({'quant_conv.bias': np.ones(3, np.float32)}),
            r'quant_conv.bias is \(3,\), expected \(8,\)',
        ),
    ],
)
def test_the_message_names_tensors_that_do_not_fit(tiny, tmp_path, change, message):
    autoencoder, params = tiny
    tensors = tiny_autoencoder.tensors_from_params(params)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        autoencoder_weights.params_from_tensors(tensors, autoencoder)


@pytest.mark.parametrize(
    'change,message',
    [
        ({'act_fn': 'relu'}, "act_fn = 'relu' must be 'silu'"),
        ({'use_quant_conv': False}, 'use_quant_conv = False'),
        ({'shift_factor': 0.1}, 'shift_factor = 0.1'),
        ({'down_block_types': ['AttnDownBlock2D'] * 3}, 'AttnDownBlock2D'),
        ({'_class_name': 'VQModel'}, 'VQModel'),
        ({'norm_num_groups': 3}, 'must be multiples of norm_num_groups = 3'),
    ],
)
def test_configs_of_other_networks_are_rejected(tiny, tmp_path, change, message):
    tiny_autoencoder.save(tmp_path, *tiny)
    path = tmp_path / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        autoencoder_weights.load(str(tmp_path))


def test_missing_and_damaged_files_are_named(tiny, tmp_path):
    with pytest.raises(ValueError, match='not a folder or a hub id'):
        autoencoder_weights.load(str(tmp_path / 'nothing' / 'here'))
    with pytest.raises(ValueError, match='it holds nothing. Save'):
        autoencoder_weights.load(str(tmp_path))
    tiny_autoencoder.save(tmp_path, *tiny)
    weights = tmp_path / autoencoder_weights.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match='cannot be read as safetensors'):
        autoencoder_weights.load(str(tmp_path))
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(ValueError, match='config.json cannot be read'):
        autoencoder_weights.load(str(tmp_path))
    (tmp_path / 'config.json').unlink()
    with pytest.raises(ValueError, match='config.json cannot be read .*No such file'):
        autoencoder_weights.load(str(tmp_path))


def test_hub_ids_are_downloaded(tiny, tmp_path, monkeypatch):
    hub = pytest.importorskip('huggingface_hub')
    tiny_autoencoder.save(tmp_path, *tiny)
    requested = []

    def download(repository, allow_patterns):
        requested.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, 'snapshot_download', download)
    assert autoencoder_weights.load('some/autoencoder')[0] == tiny[0]
    assert requested == [
        ('some/autoencoder', ('config.json', autoencoder_weights.WEIGHTS))
    ]

    def fail(repository, allow_patterns):
        raise OSError('no network')

    monkeypatch.setattr(hub, 'snapshot_download', fail)
    with pytest.raises(ValueError, match='cannot be downloaded .*no network'):
        autoencoder_weights.load('some/autoencoder')


def test_the_decoder_divides_by_the_scaling_factor(tiny, tmp_path):
    autoencoder, params = tiny
    tiny_autoencoder.save(tmp_path, autoencoder, params)
    latents = jax.random.normal(jax.random.key(0), (1, 4, 4, 4))
    decode = autoencoder_weights.make_decoder(str(tmp_path), sharding.make_mesh())
    np.testing.assert_allclose(
        decode(latents), autoencoder.decode(params, latents / 0.3), atol=1e-5
    )


def test_the_decoder_undoes_the_normalisation(tiny, tmp_path):
    autoencoder, params = tiny
    tiny_autoencoder.save(tmp_path, autoencoder, params)
    raw = jax.random.normal(jax.random.key(0), (1, 4, 4, 4))
    mean, std = (0.5, -1.0, 0.0, 2.0), (2.0, 3.0, 0.5, 4.0)
    decode = autoencoder_weights.make_decoder(
        str(tmp_path), sharding.make_mesh(), mean, std
    )
    latents = (np.asarray(raw) - mean) / std
    np.testing.assert_allclose(
        decode(latents), autoencoder.decode(params, raw), atol=1e-5
    )
