"""Configs: every field is read, every bad value is refused by name."""

import ast
import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from ism_jax import config as config_lib
from ism_jax import config_check, experiment, objectives, sample, train, trained_network

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
    config_check.validate(config)
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
    config_check.validate(config)
    assert config.train.steps <= 50 and config.model.hidden_size <= 64
    assert (
        config.objective == full.objective and config.wavelet.name == full.wavelet.name
    )


def test_every_field_is_read():
    """Each field's name is an attribute that the package reads."""
    read = set()
    for path in (ROOT / 'ism_jax').rglob('*.py'):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                if path.name not in ('config.py', 'config_check.py'):
                    read.add(node.attr)
    passed_whole = {'model', 'objective'}
    config = config_lib.default()
    for name in config_lib.flatten(config):
        section, _, field = name.rpartition('.')
        if section not in passed_whole:
            assert field in read, name
    fields = {
        field.name
        for backbone in experiment.BACKBONES.values()
        for field in dataclasses.fields(backbone)
    }
    assert set(config.model) - {'backbone'} <= fields
    # Its fields are exactly the objective's.
    objectives.create(num_classes=10, **config.objective)


def test_configs_of_older_versions_are_completed():
    """A field missing in `run.json` gets the default that keeps its behaviour."""
    config, _ = _get_config(ROOT / 'configs' / 'quickstart.py', 'shortcut')
    older = json.loads(config_lib.to_json(config))
    for section, field in (('data', 'classes_per_pool'), ('train', 'init_from')):
        del older[section][field]
    restored = config_lib.from_json(json.dumps(older))
    assert config_lib.flatten(restored) == config_lib.flatten(config)


def test_sizes_of_the_network_are_arguments():
    path = ROOT / 'configs' / 'imagenet256_ism_xl2.py'
    (full, _), (small, _) = _get_config(path), _get_config(path, 'B/2')
    assert (full.model.depth, small.model.depth) == (28, 12)
    config_check.validate(small)


@pytest.mark.parametrize('argument, side, width, patch', [
    ('64', 64, 32, 4), ('large', 32, 128, 1), ('64,large', 64, 128, 2),
])  # fmt: skip
def test_glyphs_have_two_sizes_of_images_and_of_networks(argument, side, width, patch):
    config, _ = _get_config(ROOT / 'configs' / 'glyphs.py', argument)
    config_check.validate(config)
    assert config.data.image_size == side
    assert (config.model.hidden_size, config.model.patch_size) == (width, patch)


@pytest.mark.parametrize('name', objectives.names())
def test_every_method_is_an_argument_of_a_config(name):
    path = ROOT / 'configs' / 'fashion_mnist.py'
    for argument in (name, f'{name},runlocal'):
        config, _ = _get_config(path, argument)
        config_check.validate(config)
        assert config.objective.name == name
        assert config.wavelet.enabled == config.ema.twin == (name == 'ism')
    with pytest.raises(ValueError, match="'sm' is unknown; use 'runlocal', a method"):
        _get_config(path, 'sm')


def test_the_documented_objective_is_all_that_a_new_one_needs(tmp_path, monkeypatch):
    blocks = (ROOT / 'docs' / 'method.md').read_text().split('```python')[1:]
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
        run, schedules=[(0.5, 0.5)], guidance=[0.0], labels=[1, 2], seed=0
    )
    assert images.shape == (1, 1, 2, 32, 32, 1) and np.isfinite(images).all()


def test_json_round_trip():
    config = config_lib.default()
    restored = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.flatten(config) == config_lib.flatten(restored)
    restored = config_lib.from_dict(config_lib.to_dict(config))
    assert config_lib.flatten(config) == config_lib.flatten(restored)
    with pytest.raises(AttributeError, match='locked'):
        restored.train.nothing = 1


def test_every_field_is_described():
    """`--help=config`: a line for each field, with its value and its meaning."""
    for name in objectives.names():
        config = config_lib.default()
        config_lib.use_objective(config, name)
        text = config_lib.describe(config)
        for field, value in config_lib.flatten(config).items():
            (line,) = [li for li in text.splitlines() if f'--config.{field}=' in li]
            assert repr(value) in line
            assert len(line.partition(repr(value))[2].strip()) > 2, line
