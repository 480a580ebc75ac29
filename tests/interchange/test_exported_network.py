"""Networks in portable folders: round trips, damaged files, and models that fit."""

import json
from pathlib import Path
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from official_tensors import random_tensors, save, torch_shapes
import pytest

from ism_jax.interchange import exported_network, official_sit, tensor_file
from ism_jax.models import sit

PREVIOUS = Path(__file__).parents[1] / 'fixtures' / 'exported_network'
SHAPE = (32, 32, 1)


@pytest.fixture(scope='module')
def network():
    """A converted SiT; the config is opaque to the module."""
    shapes = torch_shapes(
        width=32, patch=8, classes=10, side=32, channels=1, outputs=1, mlp=128
    )
    converted = official_sit.from_tensors(random_tensors(shapes, 5), 2)
    return exported_network.ExportedNetwork(
        config={'model': converted.model, 'any': [1, 'text', None]},
        params=converted.params,
        step=7,
        class_names=tuple('0123456789'),
        image_shape=converted.image_shape,
        origin='SiT of sit.safetensors',
        fresh=converted.fresh,
    )


def _model(network, **changes):
    options = network.config['model'] | changes
    return sit.SiT(**{'num_classes': len(network.class_names)} | options)


@pytest.fixture(scope='module')
def folder(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp('net')
    exported_network.write(folder, network, _model(network))
    return folder


def _assert_same_bits(a, b):
    def same(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()

    jax.tree.map(same, a, b)


def test_round_trip_is_bit_for_bit(network, folder, tmp_path):
    again = exported_network.read(folder)
    assert again._replace(params=None) == network._replace(params=None)
    _assert_same_bits(again.params, network.params)
    exported_network.write(tmp_path / 'again', again, _model(again))
    first, second = (
        (f / exported_network.CONFIG).read_bytes() for f in (folder, tmp_path / 'again')
    )
    assert first == second
    tensors, metadata = tensor_file.read_safetensors(folder / exported_network.TENSORS)
    assert metadata['format'] == 'ism_jax' and metadata['version'] == '1'
    assert metadata['tensors_sha256'] == exported_network.params_digest(network.params)
    assert tensors['blocks/qkv/kernel'].shape == (2, 32, 96)
    assert exported_network.exists(folder) and not exported_network.exists(tmp_path)


def test_exports_of_the_previous_version_are_read_and_written_alike(tmp_path):
    network = exported_network.read(PREVIOUS)
    assert network.origin == 'ism_jax, ism, slow average' and network.step == 8
    model = _model(network)
    exported_network.check_params(network, model, PREVIOUS)
    exported_network.write(tmp_path, network, model)
    assert (tmp_path / exported_network.CONFIG).read_bytes() == (
        PREVIOUS / exported_network.CONFIG
    ).read_bytes()
    old, new = (
        tensor_file.read_safetensors(f / exported_network.TENSORS)
        for f in (PREVIOUS, tmp_path)
    )
    assert old[1] == new[1]
    _assert_same_bits(old[0], new[0])


def test_a_run_is_not_overwritten(network, tmp_path):
    (tmp_path / 'run.json').write_text('{}')
    with pytest.raises(ValueError, match='holds a run; give another folder'):
        exported_network.write(tmp_path, network, _model(network))


def _damage_tensor(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _edit_heads(path):
    path.write_text(path.read_text().replace('"num_heads": 2', '"num_heads": 4'))


def _edit_version(path):
    tensors, metadata = tensor_file.read_safetensors(path)
    save(path, tensors, metadata | {'version': '2'})


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    'name,damage,message',
    [
        ('model.safetensors', Path.unlink, 'there is no model.safetensors'),
        ('config.json', Path.unlink, 'there is no config.json'),
        ('model.safetensors', _truncate, 'model.safetensors cannot be read .* trunc'),
        ('model.safetensors', _damage_tensor, 'model.safetensors has changed since'),
        (
            'model.safetensors',
            lambda path: save(path, {'a': np.ones(3, 'f')}),
            "has the format None, .* instead of 'ism_jax'",
        ),
        ('model.safetensors', _edit_version, "version '2', instead of .* version '1'"),
        ('config.json', _edit_heads, 'config.json has changed since the export'),
        ('config.json', _truncate, 'config.json has changed since the export'),
    ],
)
def test_damaged_foreign_and_edited_files_are_rejected(
    folder, tmp_path, name, damage, message
):
    copy = tmp_path / 'net'
    shutil.copytree(folder, copy)
    before = (copy / name).read_bytes()
    damage(copy / name)
    assert not (copy / name).exists() or (copy / name).read_bytes() != before
    with pytest.raises(ValueError, match=message):
        exported_network.read(copy)


def test_parameters_that_do_not_fit_the_model_are_not_written(network, tmp_path):
    final = network.params['final']
    final = final | {'kernel': final['kernel'][:, :3]}
    wrong = network._replace(params=network.params | {'final': final})
    message = r'final/kernel is \(32, 3\) float32, expected \(32, 64\) float32'
    with pytest.raises(ValueError, match=message):
        exported_network.write(tmp_path / 'net', wrong, _model(network))
    assert not (tmp_path / 'net').exists()


def test_fresh_modules_are_initialised_reproducibly(network):
    first, second = (
        exported_network.initialised(network, _model(network)) for _ in range(2)
    )
    assert first.keys() - network.params.keys() == set(network.fresh)
    _assert_same_bits(first, second)
    assert np.abs(first['guidance_embedding']['hidden']['kernel']).max() > 0


@pytest.mark.parametrize(
    'change,message',
    [
        (
            {'time_scale': 1000.0},
            r'time_scale = 1000.0, but .* has 1.0; set time_scale',
        ),
        ({'num_heads': 4}, 'num_heads = 4, but .* has 2'),
        ({'depth': 3}, 'depth = 3'),
        ({'mlp_ratio': 2.0}, 'mlp_ratio = 2.0'),
        (
            {'num_classes': 7},
            r'class_embedding/embedding is \(11, 32\) .* expected \(8, 32\)',
        ),
    ],
)
def test_a_model_that_computes_something_else_cannot_start(network, change, message):
    own, other = _model(network), _model(network, **change)
    with pytest.raises(ValueError, match=message):
        exported_network.check_start(network, own, other, SHAPE, 'net')


def test_images_may_have_another_side_but_not_other_channels(network):
    model = _model(network)
    exported_network.check_start(network, model, model, (64, 64, 1), 'net')
    message = r'final/bias is \(64,\) float32, expected \(192,\) float32'
    with pytest.raises(ValueError, match=message):
        exported_network.check_start(network, model, model, (32, 32, 3), 'net')


def test_new_class_embeddings_start_as_the_null_embedding(network):
    assert exported_network.with_classes(network, tuple('abcdefghij')) is network
    other = exported_network.with_classes(network, ('cat', 'dog', 'newt'))
    model = _model(other)
    exported_network.check_start(other, model, model, SHAPE, 'net')
    assert other.class_names == ('cat', 'dog', 'newt')
    x = jax.random.normal(jax.random.key(0), (3, *SHAPE))
    t, zero = jnp.array([0.1, 0.5, 0.9]), jnp.zeros(3)

    def velocity(network, label):
        model = _model(network)
        params = exported_network.initialised(network, model)
        return model.apply({'params': params}, x, t, zero, zero, label)

    expected = velocity(network, jnp.full(3, 10))
    for label in (jnp.full(3, 3), jnp.arange(3)):
        np.testing.assert_array_equal(velocity(other, label), expected)
    assert np.abs(velocity(network, jnp.arange(3)) - expected).max() > 1e-3


def test_the_step_embedding_may_differ_where_none_was_trained(network):
    own, other = _model(network), _model(network, step_embedding='size')
    exported_network.check_start(network, own, other, SHAPE, 'net')
    params = exported_network.initialised(network, own)
    trained = network._replace(params=params, fresh=())
    with pytest.raises(ValueError, match="step_embedding = 'size', but .* has 'level'"):
        exported_network.check_start(trained, own, other, SHAPE, 'net')


def test_config_json_has_a_stable_layout(folder):
    content = json.loads((folder / exported_network.CONFIG).read_text())
    assert list(content) == [
        'config',
        'class_names',
        'image_shape',
        'step',
        'origin',
        'predicts',
        'fresh',
    ]
