"""Benchmarks: what they report, not how fast anything is."""

import importlib.util
from pathlib import Path
import subprocess
import sys
import time

import pytest

from ism_jax import benchmark, cost
from ism_jax import config as config_lib

ROOT = Path(__file__).parent.parent


def _config(*args):
    path = ROOT / 'configs' / 'quickstart.py'
    spec = importlib.util.spec_from_file_location('quickstart', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(','.join(args))


def test_candidates_take_turns_and_the_first_calls_do_not_count():
    calls = []

    def run(name):
        calls.append(name)
        time.sleep(0.01 if name == 'slow' and len(calls) > 2 else 0)

    candidates = {name: lambda name=name: run(name) for name in ('fast', 'slow')}
    seconds = benchmark.take_turns(candidates, 3)
    assert calls == ['fast', 'slow'] * 4
    assert len(seconds['slow']) == 3 and min(seconds['slow']) >= 0.01


def test_a_training_is_measured_whole_and_in_parts():
    config = _config('runlocal')
    config.sample.steps = (1,)
    measured = benchmark.measure(config, 2, ['ema.twin=False'])
    rows = {row['name']: row for row in measured['rows']}
    assert list(rows)[:3] == [
        'train step', 'train step, ema.twin=False', 'flow matching step'
    ]  # fmt: skip
    parts = (
        'gradient of the loss', 'gradient of flow matching', 'optimizer', 'averages',
        'distance and its gradient', 'transport of a pool', 'matrix product',
        'input of a pool, waited for', 'input of a pool, made', '50 samples, 1 step',
    )  # fmt: skip
    assert set(parts) <= rows.keys()
    assert rows['train step']['ratio'] == 1 and rows['train step']['spread'] == 0
    assert all(rows[name]['milliseconds'] > 0 for name in parts)
    made = cost.make_plan(config, 8, 10)
    assert measured['flops_per_step'] == made.flops_per_step
    assert 0 < measured['utilisation'] < 1 and measured['compile_seconds'] > 0
    held = sum(made.bytes_per_device.values())
    assert 0.5 * held < measured['bytes_per_device'] < 5 * held
    shown = benchmark.format_measured(measured)
    assert 'transport of a pool, per step' in shown and 'TFLOP/s' in shown


@pytest.mark.parametrize(
    'change, message',
    [
        ('train.batch_size=64', 'the train steps share one pool'),
        ('data.flip=True', 'the train steps share one pool'),
        ('model.widht=3', 'sets no field of the config'),
        ('model.num_heads=7', 'model.num_heads = 7 does not divide'),
    ],
)
def test_changes_that_cannot_be_compared_are_refused(change, message):
    config = _config('runlocal')
    config_lib.validate(config)
    with pytest.raises(ValueError, match=message):
        benchmark.changed(config, change)


def test_something_must_be_asked_for():
    done = subprocess.run(
        [sys.executable, '-m', 'ism_jax.benchmark'], capture_output=True, text=True,
        cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and 'give --config' in done.stderr
