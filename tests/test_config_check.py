"""Every bad value is refused by name, before anything is compiled."""

import importlib.util
from pathlib import Path

import pytest

from ism_jax import config as config_lib
from ism_jax import config_check
from ism_jax.method import wavelet

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    'change,message',
    [
        ({'train.batch_size': 24}, 'train.batch_size = 24 .* at least 28'),
        ({'train.batch_size': 30}, 'multiple of 4'),
        ({'train.batch_size': 48, 'train.accumulate': 2}, 'at least 56'),
        ({'objective.base_steps': 100}, 'objective.base_steps = 100'),
        ({'objective.base_steps': 2**17}, 'base_steps = 131072 must be .* to 65536'),
        ({'model.num_heads': 7}, 'model.num_heads = 7 does not divide'),
        ({'model.patch_size': 5}, 'model.patch_size = 5 does not divide'),
        ({'model.dtype': 'float16'}, "model.dtype = 'float16' must be one of"),
        ({'model.remat': 'some'}, 'model.remat'),
        ({'wavelet.levels': 6}, 'wavelet.levels = 6'),
        ({'wavelet.name': 'harr'}, 'did you mean'),
        ({'wavelet.weighting': '1,2'}, '2 weights'),
        ({'transport.epsilon': 0.0}, 'transport.epsilon = 0.0 must be a positive'),
        ({'transport.method': 'exact'}, 'transport.method'),
        (
            {'transport.method': 'semidiscrete', 'transport.per_class': False},
            "'semidiscrete' draws the label .*set transport.per_class = True",
        ),
        ({'transport.samples_per_point': 0}, 'transport.samples_per_point = 0'),
        ({'ema.target_decay': 1.0}, r'ema.target_decay = 1.0 must be in \[0, 1\)'),
        ({'optimizer.learning_rate': float('nan')}, 'optimizer.learning_rate'),
        ({'optimizer.warmup_steps': 10**7}, 'optimizer.warmup_steps'),
        ({'optimizer.schedule': 'step'}, 'optimizer.schedule'),
        (
            {'sample.steps': (200,)},
            r'sample.steps = \(200,\): each must lie in 1 .. 128',
        ),
        ({'sample.guidance': (4.0,)}, r'sample.guidance = 4.0 must lie in \[0, 3.5\]'),
        ({'mesh.data': 0}, 'mesh.data = 0'),
        ({'log.writer': 'jsonl,wanbd'}, "'jsonl,wanbd' must be names of tensorboard, "),
        ({'checkpoint.keep_last': 0}, 'checkpoint.keep_last = 0'),
        ({'scores.samples': 10}, 'scores.samples = 10'),
        ({'objective.name': 'flow_matching'}, 'objective_defaults'),
        ({'objective.name': 'sm'}, "objective.name = 'sm' must be one of"),
        ({'model.step_embedding': 'log'}, "model.step_embedding = 'log' must be one"),
        ({'data.classes_per_pool': -1}, 'data.classes_per_pool = -1'),
        ({'data.autoencoder': 'a/b'}, "data.autoencoder = 'a/b' decodes latents"),
        (
            {'data.latent_std': (1.0,)},
            r'data.latent_std = \(1.0,\) are of latents, but',
        ),
        ({'data.source': 'latents:x'}, 'scores.enabled = True, but data.source'),
        ({'data.source': 'latents:gs://b/x'}, 'in a bucket, .* set data.cache_dir to'),
    ],
)
def test_bad_values_are_refused_by_name(change, message):
    config = config_lib.default()
    config_check.validate(config)
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        config_check.validate(config)


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    config = config_lib.default()
    config.log.writer = 'tensorboard,wandb'
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match='needs the package wandb: run .pip inst'):
        config_check.validate(config)


@pytest.mark.parametrize('std', [(), (1.0, 2.0), (1.0, 2.0, 3.0, 0.0)])
def test_normalisation_of_latents_is_whole(std):
    path = ROOT / 'configs' / 'imagenet256_imm_xl2.py'
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config_check.validate(config)
    config.data.latent_std = std
    with pytest.raises(ValueError, match='must have a number for each .* = 4'):
        config_check.validate(config)


@pytest.mark.parametrize(
    'name,change,message',
    [
        ('shortcut', {'sample.guidance': (0.0,)}, r'lie in \[0.5, 0.5\]'),
        ('shortcut', {'objective.cfg_levels': 'some'}, "cfg_levels = 'some' must be"),
        ('shortcut', {'objective.bootstrap_every': 1}, 'bootstrap_every = 1'),
        ('shortcut', {'train.batch_size': 48}, 'at least 56'),
        ('consistency', {'sample.guidance': (0.5,)}, r'lie in \[0, 0\]'),
        ('consistency', {'objective.sigma_min': 90.0}, 'objective.sigma_min = 90.0'),
        ('imm', {'objective.group_size': 0}, 'objective.group_size = 0'),
        ('imm', {'train.batch_size': 42}, 'multiple of 4'),
        ('imm', {'model.step_embedding': 'level'}, 'does not fit objective.name'),
        ('meanflow', {'objective.batch_split': (4, 0)}, 'objective.batch_split'),
        ('meanflow', {'objective.norm_eps': 0.0}, 'objective.norm_eps = 0.0'),
        (
            'ism',
            {'objective.interval': 'input'},
            'model.interval_input = False does not',
        ),
        ('ism', {'model.interval_input': True}, 'set it to False'),
        ('ism', {'objective.step_draw': 'ends'}, "set it to 'size'"),
        ('ism', {'objective.consistency': 'derivative'}, "step_draw = 'ends'"),
        ('ism', {'objective.bootstrap_split': 'random'}, "step_draw = 'ends'"),
        ('ism', {'objective.consistency': 'jvp'}, "'derivative', 'difference'"),
        (
            'ism',
            {'objective.guidance_draw': 'uniform', 'objective.guidance_max': 0.0},
            'objective.guidance_max = 0.0 must be a positive',
        ),
        ('ism', {'objective.guidance_draw': 'normal'}, "'normal' must be one of"),
        ('ism', {'objective.null_share': 1.0}, 'objective.null_share = 1.0'),
        ('ism', {'objective.difference_distance': 0.0}, r'must be in \(0, 0.5\]'),
        ('ism', {'model.velocity_head': 1}, 'model.velocity_head = 1 does not fit'),
        ('imf', {'model.velocity_head': 0}, 'model.velocity_head = 0 does not fit'),
        ('imf', {'model.velocity_head': 28}, 'must be less than model.depth = 28'),
        ('imf', {'objective.tangent': 'boundary'}, 'set it to 0'),
        (
            'imf',
            {'model.backbone': 'in_context', 'model.hidden_size': 36 * 3}
            | {'model.num_heads': 36},
            'heads of odd width',
        ),
        ('imf', {'objective.batch_split': (4, 0)}, 'objective.batch_split'),
        ('imf', {'objective.guidance_max': -1.0}, 'objective.guidance_max = -1.0'),
        ('alpha_flow', {'objective.anneal_end': 0.0}, 'objective.anneal_start = 0.0'),
        ('alpha_flow', {'objective.alpha': 2.0}, 'objective.alpha = 2.0'),
        (
            'alpha_flow',
            {'objective.alpha': 0.01, 'model.dtype': 'bfloat16'},
            'objective.alpha = 0.01 lets',
        ),
        (
            'alpha_flow',
            {'objective.alpha_margin': 0.0, 'model.dtype': 'bfloat16'},
            'objective.alpha_margin = 0.0 lets',
        ),
        ('meanflow', {'model.attention': 'cudnn'}, "model.attention = 'cudnn' has no"),
    ],
)
def test_bad_options_of_a_method_are_refused_by_name(name, change, message):
    config = config_lib.default()
    config_lib.use_objective(config, name)
    config_check.validate(config)
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        config_check.validate(config)


def test_weights_can_be_given_on_the_command_line():
    config = config_lib.default()
    config.wavelet.weighting = '1,2,3,4,5,6'
    config_check.validate(config)
    assert wavelet.parse_weighting('1,2,3.5') == [1, 2, 3.5]
    assert wavelet.parse_weighting('detail') == 'detail'


def _resumed(old_change, new_change):
    old, new = config_lib.default(), config_lib.default()
    for config, change in ((old, old_change), (new, {**old_change, **new_change})):
        name = change.get('objective.name', 'ism')
        config_lib.use_objective(config, name)
        config.update_from_flattened_dict(change)
    return config_check.check_resume(old, new, 'runs/a')


def test_what_may_change_on_resume_is_reported():
    assert _resumed({}, {}) == []
    assert _resumed({}, {'train.steps': 900_000}) == ['train.steps: 800000 -> 900000']
    with pytest.raises(ValueError, match=r'cannot change: model.depth: 28 -> 29\.'):
        _resumed({}, {'model.depth': 29})
    with pytest.raises(ValueError, match='may change: train.steps: 800000 -> 800001'):
        _resumed({}, {'model.depth': 29, 'train.steps': 800_001})


@pytest.mark.parametrize(
    'change,reason',
    [
        (
            {'optimizer.schedule': 'cosine'},
            r"learning rate \(optimizer.schedule = 'cos",
        ),
        ({'optimizer.schedule': 'linear'}, 'learning rate'),
        ({'objective.name': 'alpha_flow'}, r'curriculum \(alpha_flow\)'),
        ({'objective.name': 'consistency'}, r'curriculum \(consistency\)'),
    ],
)
def test_the_length_may_not_change_where_training_depends_on_it(change, reason):
    with pytest.raises(ValueError, match=f'800000 -> 900000 .its {reason}'):
        _resumed(change, {'train.steps': 900_000})
    constant = {'objective.name': 'alpha_flow', 'objective.alpha': 0.5}
    assert _resumed(constant, {'train.steps': 900_000})


@pytest.mark.parametrize(
    'change,devices,processes,message',
    [
        ({'mesh.fsdp': 3}, 8, 1, 'mesh.fsdp = 3 does not divide the 8 devices'),
        ({'mesh.data': 3, 'mesh.fsdp': 2}, 8, 1, 'mesh.data = 3 times mesh.fsdp = 2'),
        ({'mesh.data': 3, 'mesh.fsdp': -1}, 11, 1, 'mesh.data = 3 times mesh.fsdp ='),
        ({'train.batch_size': 36}, 8, 1, '8 devices; choose a multiple of 8'),
        ({'train.batch_size': 32, 'train.accumulate': 2}, 32, 1, 'a multiple of 64'),
        ({'train.batch_size': 32}, 1, 3, 'a multiple of the 3 processes'),
    ],
)
def test_devices_that_do_not_fit_are_refused(change, devices, processes, message):
    config = config_lib.default()
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        config_check.check_devices(config, devices, processes)


class _Source(list):
    """A source of images, of which only the number is known."""


@pytest.mark.parametrize(
    'change, message',
    [
        ({'data.classes_per_pool': 3}, 'data.classes_per_pool = 3 needs the labels'),
        (
            {'transport.method': 'semidiscrete'},
            "transport.method = 'semidiscrete' needs the labels",
        ),
    ],
)
def test_sources_without_labels_are_refused(change, message):
    config = config_lib.default()
    source = _Source(range(20))
    config_check.check_source(config, source)
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        config_check.check_source(config, source)
    source.labels = [0] * 20
    config_check.check_source(config, source)


def test_too_few_images_for_scores_are_refused_before_training():
    config = config_lib.default()
    with pytest.raises(ValueError, match='fewer than 20 images.*scores.enabled'):
        config_check.check_source(config, _Source(range(19)))
    config.scores.enabled = False
    config_check.check_source(config, _Source(range(19)))
