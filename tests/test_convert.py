"""The command that converts checkpoints and exports runs."""

import os
from pathlib import Path
import pickle
import shlex
import subprocess
import sys

from flax import traverse_util
import jax
import numpy as np
from official_tensors import BASE_STEPS, CHANNELS, DIT, HEADS, SHORTCUT, SIDE, SIT, save
import pytest

from ism_jax import config as config_lib
from ism_jax import convert, sample, trained_network
from ism_jax.interchange import (
    exported_network,
    official_dit,
    official_shortcut,
    official_sit,
    tensor_file,
)

ROOT = Path(__file__).parent.parent


def _assert_same_bits(a, b):
    def same(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()

    jax.tree.map(same, a, b)


@pytest.mark.parametrize(
    'command,tensors,module,predicts,options',
    [
        ('sit', SIT, official_sit, 'velocity', {}),
        ('dit', DIT, official_dit, 'noise', {}),
        ('shortcut', SHORTCUT, official_shortcut, 'velocity', {'image_size': SIDE}),
    ],
)
def test_each_command_writes_what_its_module_converts(
    tmp_path, capsys, command, tensors, module, predicts, options
):
    options = {'num_heads': HEADS} | options
    path, out = save(tmp_path / 'net.safetensors', tensors), tmp_path / 'out'
    convert.run(command, path, out, **options)
    shown = capsys.readouterr().out
    converted = module.from_tensors(tensors, **options)
    network = exported_network.read(out)
    _assert_same_bits(network.params, converted.params)
    assert network.fresh == converted.fresh
    assert network.predicts == predicts and network.origin in shown
    assert network.class_names == ('0', '1', '2', '3', '4')
    scale = converted.model['time_scale']
    assert network.config['model']['time_scale'] == scale
    assert f'init_from={out} --config.model.time_scale={scale} ' in shown
    assert 'model.backbone=sit' in shown and 'channel_multipliers' not in shown


def test_the_flags_to_train_from_a_unet_describe_it():
    config = config_lib.default()
    config.model.update(backbone='unet', channel_multipliers=(1, 2), hidden_size=16)
    network = exported_network.ExportedNetwork(
        config=config_lib.to_dict(config), params={}, step=0, class_names=('a',),
        image_shape=(8, 8, 1), origin='',
    )  # fmt: skip
    flags = shlex.split(convert.start_flags(network, 'nets/a b'))
    fields = dict(flag.removeprefix('--config.').split('=') for flag in flags)
    assert fields['train.init_from'] == 'nets/a b'
    assert fields['model.backbone'] == 'unet'
    assert fields['model.channel_multipliers'] == '(1,2)'
    assert fields['model.hidden_size'] == '16' and 'model.depth' not in fields


def test_a_converted_shortcut_model_is_sampled(tmp_path):
    path = save(tmp_path / 'shortcut.safetensors', SHORTCUT)
    network = convert.convert_shortcut(path, image_size=SIDE, num_heads=HEADS)
    assert network.config['objective']['base_steps'] == BASE_STEPS
    convert.write(tmp_path / 'net', network)
    run = trained_network.load(tmp_path / 'net')
    schedules = [(1.0,), (0.5, 0.5)]
    images = sample.sample_grid(
        run, schedules=schedules, guidance=[0.5], labels=[0, 3], seed=0
    )
    assert images.shape == (2, 1, 2, SIDE, SIDE, CHANNELS)
    assert np.isfinite(images).all() and np.ptp(images[0] - images[1]) > 1e-2


def test_a_converted_dit_is_not_sampled(tmp_path):
    path = save(tmp_path / 'dit.safetensors', DIT)
    convert.write(tmp_path / 'net', convert.convert_dit(path, num_heads=HEADS))
    with pytest.raises(ValueError, match='predicts noise, not a velocity.*init_from'):
        trained_network.load(tmp_path / 'net')


def test_messages_name_the_file(tmp_path):
    path = save(tmp_path / 'other.safetensors', {'a': np.ones(3, 'f')})
    with pytest.raises(ValueError, match='other.safetensors: there is no tensor x_emb'):
        convert.convert_sit(path)


def test_sizes_that_do_not_fit_each_other_are_rejected(tmp_path):
    path = save(tmp_path / 'x.safetensors', SHORTCUT)
    options = dict(image_size=SIDE, num_heads=HEADS)
    with pytest.raises(ValueError, match='--base_steps = 100 must be a power of two'):
        convert.convert_shortcut(path, **options, base_steps=100)
    with pytest.raises(ValueError, match='patch_size = 2 does not divide.*7'):
        convert.convert_shortcut(path, image_size=7, num_heads=HEADS)
    with pytest.raises(ValueError, match='num_heads = 5 does not divide'):
        convert.convert_sit(save(path, SIT), num_heads=5)


class Program:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


def test_pickles_of_shortcut_models_are_rejected_and_not_run(tmp_path):
    trace = tmp_path / 'it_ran'
    for name in ('checkpoint', 'model.pkl'):
        path = tmp_path / name
        path.write_bytes(pickle.dumps({'train_state': Program(trace)}))
        with pytest.raises(ValueError, match='are pickles.*--help shows how'):
            convert.convert_shortcut(path, image_size=SIDE)
    assert not trace.exists()


def test_the_code_in_the_help_writes_the_tensors_of_a_pickle(tmp_path, monkeypatch):
    tree = traverse_util.unflatten_dict(SHORTCUT, sep='/')
    content = {'train_state': {'params_ema': tree}, '_timestamp': 0.0}
    (tmp_path / 'checkpoint').write_bytes(pickle.dumps(content))
    lines = convert.__doc__.split('import pickle')[1].splitlines()
    code = '\n'.join(line.removeprefix('    ') for line in lines)
    monkeypatch.chdir(tmp_path)
    exec(f'import pickle{code}', {})  # noqa: S102
    read, _ = tensor_file.read(tmp_path / 'shortcut.safetensors')
    assert read.keys() == SHORTCUT.keys()
    jax.tree.map(np.testing.assert_array_equal, read, SHORTCUT)


@pytest.fixture(scope='module')
def exported(small_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp('exported')
    convert.write(folder, convert.export(small_run))
    return folder


def test_an_exported_run_samples_the_same_bit_for_bit(small_run, exported):
    before, after = trained_network.load(small_run), trained_network.load(exported)
    assert after.step == before.step == 6
    assert after.model == before.model and after.config == before.config
    assert after.class_names == before.class_names
    assert after.image_shape == before.image_shape
    _assert_same_bits(before.params, after.params)
    cells = dict(schedules=[(1.0,), (0.5, 0.5)], guidance=[0.0, 1.0], labels=[1, 10])
    _assert_same_bits(
        sample.sample_grid(before, **cells, seed=3),
        sample.sample_grid(after, **cells, seed=3),
    )


def test_an_earlier_checkpoint_is_exported(small_run):
    network = convert.export(small_run, step=3)
    assert network.step == 3
    _assert_same_bits(network.params, trained_network.load(small_run, 3).params)


def test_messages_say_what_an_exported_folder_lacks(exported):
    with pytest.raises(ValueError, match='no checkpoint 7; .* of step 6'):
        trained_network.load(exported, 7)
    with pytest.raises(ValueError, match='without online parameters'):
        trained_network.load_parameter_sets(exported, trained_network.load(exported))
    with pytest.raises(ValueError, match='is already an exported network'):
        convert.export(exported)


def test_the_command_line(tmp_path, small_run):
    def call(*arguments):
        return subprocess.run(
            [sys.executable, '-m', 'ism_jax.convert', *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=200,
        )

    path, out = save(tmp_path / 'sit.safetensors', SIT), tmp_path / 'net'
    result = call('sit', f'--checkpoint={path}', '--num_heads=3', f'--out={out}')
    assert result.returncode == 0, result.stderr[-3000:]
    assert '--config.model.time_scale=1.0' in result.stdout
    assert exported_network.read(out).origin == 'SiT of sit.safetensors'
    result = call('export', f'--workdir={small_run}', f'--out={tmp_path / "mine"}')
    assert result.returncode == 0, result.stderr[-3000:]
    network = exported_network.read(tmp_path / 'mine')
    assert network.origin == 'ism_jax, ism, inference EMA'
    _assert_same_bits(network.params, trained_network.load(small_run).params)
    for arguments, message in (
        ((), 'give one of the commands sit, dit, shortcut, export'),
        (('sit', f'--workdir={small_run}'), '--workdir is not a flag of sit'),
        (('export',), 'export needs --workdir'),
    ):
        result = call(*arguments, f'--out={out}')
        assert result.returncode == 2 and message in result.stderr.splitlines()[-1]
