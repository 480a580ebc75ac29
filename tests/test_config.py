"""Configs: every field is read, every bad value is refused by name."""

import ast
import dataclasses
import importlib.util
import json
from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest

from ism_jax import config as config_lib
from ism_jax import objectives, sample, train, trained_network
from ism_jax.models import sit

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / 'configs').glob('*.py'))


def _get_config(path, *args):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*args), module


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_configs_are_valid_claims(path):
    config, module = _get_config(path)
    config_lib.validate(config)
    assert f'--config configs/{path.name}' in module.__doc__
    assert config_lib.flatten(config).keys() - {
        f'objective.{name}' for name in config.objective
    } == config_lib.flatten(config_lib.default()).keys() - {
        f'objective.{name}' for name in config_lib.default().objective
    }


@pytest.mark.parametrize(
    'path', [p for p in CONFIGS if 'runlocal' in p.read_text()], ids=lambda p: p.stem
)
def test_runlocal_is_small(path):
    config, _ = _get_config(path, 'runlocal')
    full, _ = _get_config(path)
    config_lib.validate(config)
    assert config.train.steps <= 50 and config.model.hidden_size <= 64
    assert (
        config.objective == full.objective and config.wavelet.name == full.wavelet.name
    )


def test_every_field_is_read():
    """Each field's name is an attribute that some line of the package loads."""
    read = set()
    for path in (ROOT / 'ism_jax').rglob('*.py'):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                # Not what only refuses it: `validate` reads by string.
                if path.name != 'config.py' or isinstance(node.value, ast.Attribute):
                    read.add(node.attr)
    passed_whole = {'model', 'objective'}
    config = config_lib.default()
    for name in config_lib.flatten(config):
        section, _, field = name.rpartition('.')
        if section not in passed_whole:
            assert field in read, name
    fields = {f.name for f in dataclasses.fields(sit.SiT)}
    assert set(config.model) <= fields
    config_lib.make_objective(config, 10)  # Its fields are exactly the objective's.


@pytest.mark.parametrize(
    'change,message',
    [
        ({'train.batch_size': 24}, 'train.batch_size = 24 .* at least 28'),
        ({'train.batch_size': 30}, 'multiple of 4'),
        ({'train.batch_size': 48, 'train.accumulate': 2}, 'at least 56'),
        ({'objective.base_steps': 100}, 'objective.base_steps = 100'),
        ({'objective.base_steps': 2**17}, 'base_steps = 131072 must be at most 65536'),
        ({'model.num_heads': 7}, 'model.num_heads = 7 does not divide'),
        ({'model.patch_size': 5}, 'model.patch_size = 5 does not divide'),
        ({'model.dtype': 'float16'}, "model.dtype = 'float16' must be one of"),
        ({'model.remat': 'some'}, 'model.remat'),
        ({'wavelet.levels': 6}, 'wavelet.levels = 6'),
        ({'wavelet.name': 'harr'}, 'did you mean'),
        ({'wavelet.weighting': '1,2'}, '2 weights'),
        ({'transport.epsilon': 0.0}, 'transport.epsilon = 0.0 must be a positive'),
        ({'transport.method': 'exact'}, 'transport.method'),
        ({'ema.target_decay': 1.0}, r'ema.target_decay = 1.0 must lie in \[0, 1\)'),
        ({'optimizer.learning_rate': float('nan')}, 'optimizer.learning_rate'),
        ({'optimizer.warmup_steps': 10**7}, 'optimizer.warmup_steps'),
        ({'optimizer.schedule': 'step'}, 'optimizer.schedule'),
        ({'sample.steps': (200,)}, 'steps = 200 must lie in 1 .. 128'),
        ({'sample.guidance': (4.0,)}, r'guidance = 4.0 must lie in \[0, 3.5\]'),
        ({'mesh.data': 0}, 'mesh.data = 0'),
        ({'checkpoint.keep_last': 0}, 'checkpoint.keep_last = 0'),
        ({'scores.samples': 10}, 'scores.samples = 10'),
        ({'objective.name': 'flow_matching'}, 'objective_defaults'),
        ({'objective.name': 'sm'}, "'sm' is unknown"),
        ({'model.step_embedding': 'log'}, "model.step_embedding = 'log' must be one"),
        ({'data.classes_per_pool': -1}, 'data.classes_per_pool = -1'),
        ({'data.autoencoder': 'a/b'}, "data.autoencoder = 'a/b' decodes latents"),
        (
            {'data.latent_std': (1.0,)},
            r'data.latent_std = \(1.0,\) are of latents, but',
        ),
        ({'data.source': 'latents:x'}, 'scores.enabled = True, but data.source'),
    ],
)
def test_bad_values_are_refused_by_name(change, message):
    config = config_lib.default()
    config_lib.validate(config)
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        config_lib.validate(config)


@pytest.mark.parametrize('std', [(), (1.0, 2.0), (1.0, 2.0, 3.0, 0.0)])
def test_normalisation_of_latents_is_whole(std):
    config, _ = _get_config(ROOT / 'configs' / 'imagenet256_imm_xl2.py')
    config_lib.validate(config)
    config.data.latent_std = std
    with pytest.raises(ValueError, match='must have a number for each .* = 4'):
        config_lib.validate(config)


def test_configs_of_older_versions_are_completed():
    """As they are in `run.json`: a field that is newer does what was done before."""
    config, _ = _get_config(ROOT / 'configs' / 'quickstart.py', 'shortcut')
    older = json.loads(config_lib.to_json(config))
    for section, field in (('data', 'classes_per_pool'), ('train', 'init_from')):
        del older[section][field]
    restored = config_lib.from_json(json.dumps(older))
    assert config_lib.differences(restored, config) == ([], [])


def test_sizes_of_the_network_are_arguments():
    path = ROOT / 'configs' / 'imagenet256_ism_xl2.py'
    (full, _), (small, _) = _get_config(path), _get_config(path, 'B/2')
    assert (full.model.depth, small.model.depth) == (28, 12)
    config_lib.validate(small)


@pytest.mark.parametrize('name', objectives.names())
def test_every_method_is_an_argument_of_a_config(name):
    path = ROOT / 'configs' / 'fashion_mnist.py'
    for argument in (name, f'{name},runlocal'):
        config, _ = _get_config(path, argument)
        config_lib.validate(config)
        assert config.objective.name == name
        assert config.wavelet.enabled == config.ema.twin == (name == 'ism')
    with pytest.raises(ValueError, match="'sm' is unknown; use 'runlocal', a method"):
        _get_config(path, 'sm')


@pytest.mark.parametrize(
    'name,change,message',
    [
        ('shortcut', {'sample.guidance': (0.0,)}, r'lie in \[0.5, 0.5\].*to 0.5'),
        ('shortcut', {'objective.cfg_levels': 'some'}, "cfg_levels = 'some' must be"),
        ('shortcut', {'objective.bootstrap_every': 1}, 'bootstrap_every = 1'),
        ('shortcut', {'train.batch_size': 48}, 'at least 56'),
        ('consistency', {'sample.guidance': (0.5,)}, r'lie in \[0, 0\]'),
        ('consistency', {'objective.sigma_min': 90.0}, 'objective.sigma_min = 90.0'),
        ('imm', {'objective.group_size': 0}, 'objective.group_size = 0'),
        ('imm', {'train.batch_size': 42}, 'multiple of 4'),
        ('imm', {'model.step_embedding': 'level'}, 'does not serve objective.name'),
        ('meanflow', {'objective.batch_split': (4, 0)}, 'objective.batch_split'),
        ('meanflow', {'objective.norm_eps': 0.0}, 'objective.norm_eps = 0.0'),
        ('alpha_flow', {'objective.anneal_end': 0.0}, 'objective.anneal_start = 0.0'),
        ('alpha_flow', {'objective.alpha': 2.0}, 'objective.alpha = 2.0'),
    ],
)
def test_bad_options_of_a_method_are_refused_by_name(name, change, message):
    config = config_lib.default()
    config_lib.use_objective(config, name)
    config_lib.validate(config)
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        config_lib.validate(config)


def test_the_readmes_objective_is_all_that_a_new_one_needs(tmp_path, monkeypatch):
    blocks = (ROOT / 'README.md').read_text().split('```python')[1:]
    (code,) = (b.split('```')[0] for b in blocks if '(BaseObjective)' in b)
    assert len(code.strip().splitlines()) <= 21
    (tmp_path / 'logit_normal.py').write_text(code)
    monkeypatch.setattr(objectives, '__path__', [*objectives.__path__, str(tmp_path)])
    config, _ = _get_config(
        ROOT / 'configs' / 'fashion_mnist.py', 'logit_normal,runlocal'
    )
    config.train.steps = 8
    config.log.grid_every = 0
    config.scores.enabled = False
    state = train.train(config, tmp_path / 'run')
    assert int(state.step) == 8 and int(state.skipped) == 0
    run = trained_network.load(tmp_path / 'run')
    images = sample.sample_grid(
        run, schedules_=[(0.5, 0.5)], guidance=[0.0], labels=[1, 2], seed=0
    )
    assert images.shape == (1, 1, 2, 32, 32, 1) and np.isfinite(images).all()


def test_weights_can_be_given_on_the_command_line():
    config = config_lib.default()
    config.wavelet.weighting = '1,2,3,4,5,6'
    config_lib.validate(config)
    assert config_lib.parse_weighting('1,2,3.5') == [1, 2, 3.5]
    assert config_lib.parse_weighting('detail') == 'detail'


def test_json_round_trip_and_differences():
    config = config_lib.default()
    restored = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.differences(config, restored) == ([], [])
    restored.unlock()
    restored.train.steps += 1
    restored.model.depth += 1
    allowed, refused = config_lib.differences(config, restored)
    assert allowed == ['train.steps: 800000 -> 800001']
    assert refused == ['model.depth: 28 -> 29']


def _train(*flags):
    return subprocess.run(
        [sys.executable, '-m', 'ism_jax.train', '--config', 'configs/quickstart.py', *flags],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip


def test_a_mistyped_name_suggests_the_right_one():
    result = _train('--config.train.batchsize=3')
    assert result.returncode != 0 and 'batch_size' in result.stderr + result.stdout


def test_a_bad_value_ends_with_one_line_and_code_2(tmp_path):
    result = _train('--config.train.batch_size=20', f'--workdir={tmp_path}/run')
    assert result.returncode == 2
    assert (
        result.stderr.strip()
        .splitlines()[-1]
        .startswith('error: train.batch_size = 20')
    )
    assert not (tmp_path / 'run').exists()


def test_help_is_useful():
    result = _train('--help')
    assert 'goes on where' in result.stdout and '--workdir' in result.stdout
