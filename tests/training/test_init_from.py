"""Training that starts from the parameters of an exported network."""

import contextlib
import io
import shutil

import jax
import numpy as np
from official_tensors import random_tensors, save, torch_shapes
import optax
import pytest

from ism_jax import config as config_lib
from ism_jax import convert, train, trained_network
from ism_jax.interchange import exported_network
from ism_jax.models import conditions, unet
from ism_jax.runtime import sharding
from ism_jax.training import train_state


def _config(**changes):
    config = config_lib.default()
    config_lib.with_argument(config, 'runlocal')
    config.scores.enabled = False
    config.log.grid_every = 0
    config.train.steps = 2
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope='module')
def small_sit(tmp_path_factory):
    """A converted SiT with the image size and width of `_config`."""
    shapes = torch_shapes(
        width=32, patch=8, classes=10, side=32, channels=1, outputs=1, mlp=128
    )
    folder = tmp_path_factory.mktemp('sit')
    path = save(folder / 'sit.safetensors', random_tensors(shapes, 5))
    convert.write(folder / 'net', convert.convert_sit(path, num_heads=2))
    return folder / 'net'


@pytest.fixture(scope='module')
def start(small_sit):
    """Changes to `_config`: a start from the SiT with almost no training.

    Adam moves every parameter by the learning rate, however small its gradient.
    """
    folder = small_sit.parent / 'start'
    shutil.copytree(small_sit, folder)
    return {
        'train.init_from': str(folder),
        'model.time_scale': 1.0,
        'optimizer.learning_rate': 1e-9,
    }


@pytest.fixture(scope='module')
def trained(start, tmp_path_factory):
    """Folder, final state and output of a run of two steps."""
    workdir, shown = tmp_path_factory.mktemp('run'), io.StringIO()
    with contextlib.redirect_stdout(shown):
        state = train.train(_config(**start), workdir)
    return workdir, state, shown.getvalue()


def test_training_starts_from_a_converted_sit(trained, start, small_sit, capsys):
    workdir, state, shown = trained
    assert int(state.step) == 2 and int(state.skipped) == 0
    assert 'starting from' in shown and 'SiT of sit.safetensors' in shown
    params = exported_network.read(small_sit).params
    fresh = {'step_embedding', 'guidance_embedding'}
    assert state.params.keys() - params.keys() == fresh
    for tree in (state.params, state.target, state.infer):
        for name in params:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8),
                tree[name],
                params[name],
            )
    # Fresh modules are initialised so that gradients reach them.
    guidance = state.params['guidance_embedding']
    assert np.abs(guidance['hidden']['kernel']).mean() > 1e-3
    assert 0 < np.abs(guidance['out']['kernel']).max() < 1e-8

    shutil.rmtree(start['train.init_from'])  # A resumed run does not need it.
    assert int(train.train(_config(**start), workdir).step) == 2
    shown = capsys.readouterr().out
    assert 'resuming at step 2' in shown and 'starting from' not in shown
    with pytest.raises(ValueError, match='train.init_from: .* -> '):
        train.train(_config(**start | {'train.init_from': ''}), workdir)


def test_parameters_and_both_emas_start_alike_on_their_shardings(small_sit):
    """On a mesh that splits parameters, with separate memory for each tree."""
    network = exported_network.read(small_sit)
    model = trained_network.exported_model(network)
    mesh = sharding.make_mesh(2, 4, jax.local_devices())
    state, shardings = train_state.create(
        lambda: conditions.init_params(model, (32, 32, 1), jax.random.key(1)),
        optax.adam(1e-3),
        mesh,
        twin_ema=True,
    )
    fresh = np.asarray(state.params['guidance_embedding']['hidden']['kernel'])
    state = train_state.start_from(state, network.params, shardings)
    trees = state.params, state.target, state.infer
    for tree, expected in zip(
        trees, (shardings.params, shardings.target, shardings.infer), strict=True
    ):
        assert jax.tree.map(lambda a: a.sharding, tree) == expected
        for name, module in network.params.items():
            jax.tree.map(np.testing.assert_array_equal, tree[name], module)
        kept = tree['guidance_embedding']['hidden']['kernel']
        np.testing.assert_array_equal(kept, fresh)
    kernels = [tree['blocks']['mlp_in']['kernel'] for tree in trees]
    assert not kernels[0].is_fully_replicated
    first = {k.addressable_shards[0].data.unsafe_buffer_pointer() for k in kernels}
    assert len(first) == 3


@pytest.mark.parametrize(
    'change,message',
    [
        ({}, 'time_scale = 1000.0, but .* has 1.0; set time_scale = 1.0'),
        ({'model.num_heads': 4}, 'num_heads = 4, but .* has 2'),
        (
            {'model.backbone': 'unet'},
            'is a SiT, and the model a UNet; change the backb',
        ),
        ({'train.init_from': 'nowhere'}, 'nowhere holds no exported network'),
    ],
)
def test_a_network_that_does_not_fit_is_rejected(small_sit, tmp_path, change, message):
    changes = {'train.init_from': str(small_sit)} | change
    if change:
        changes['model.time_scale'] = 1.0
    with pytest.raises(ValueError, match=message):
        train.train(_config(**changes), tmp_path / 'run')
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['lock']


def test_a_unet_starts_from_a_unet():
    options = dict(num_classes=3, hidden_size=8, channel_multipliers=(1, 2))
    options |= dict(blocks_per_level=1, attention_levels=1, patch_size=2)
    model = unet.UNet(num_heads=2, **options)
    shape = (8, 8, 1)
    network = exported_network.ExportedNetwork(
        config={},
        params=conditions.init_params(model, shape, jax.random.key(0)),
        step=1,
        class_names=('a', 'b', 'c'),
        image_shape=shape,
        origin='',
    )
    check = lambda other: exported_network.check_start(
        network, model, other, shape, 'f'
    )
    check(model)
    with pytest.raises(ValueError, match='num_heads = 1, but the network in f has 2'):
        check(unet.UNet(num_heads=1, **options))
