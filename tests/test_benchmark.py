"""What benchmarks report, not how fast anything is."""

import importlib.util
from pathlib import Path
import subprocess
import sys
import time

import pytest

from ism_jax import benchmark, config_check, cost

ROOT = Path(__file__).parent.parent


def _config(*args):
    path = ROOT / 'configs' / 'fashion_mnist.py'
    spec = importlib.util.spec_from_file_location('fashion_mnist', path)
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


def test_a_train_step_and_its_parts_are_timed():
    config = _config('runlocal')
    config.sample.steps = (1,)
    measured = benchmark.measure(config, 2, ['ema.twin=False'])
    rows = {row['name']: row for row in measured['rows']}
    assert list(rows)[:3] == [
        'train step',
        'train step, ema.twin=False',
        'flow matching step',
    ]
    parts = (
        'gradient of the loss',
        'gradient of flow matching',
        'optimizer',
        'EMA updates',
        'distance and its gradient',
        'transport of a pool',
        'matrix product',
        'input of a pool, prefetched',
        'input of a pool, not prefetched',
        '50 samples, 1 step',
    )
    assert set(parts) <= rows.keys()
    assert rows['train step']['ratio'] == 1 and rows['train step']['spread'] == 0
    assert all(rows[name]['milliseconds'] > 0 for name in parts)
    plan = cost.make_plan(config, 1, 10)
    assert measured['flops_per_step'] == plan.flops_per_step
    assert 0 < measured['utilisation'] < 1 and measured['compile_seconds'] > 0
    planned = sum(plan.bytes_per_device.values())
    assert 0.5 * planned < measured['bytes_per_device'] < 5 * planned
    text = benchmark.format_measured(measured)
    assert 'transport of a pool, per step' in text and 'TFLOP/s' in text


@pytest.mark.parametrize(
    'change, message',
    [
        ('train.batch_size=64', 'the train steps share one pool'),
        ('data.flip=True', 'the train steps share one pool'),
        ('model.widht=3', 'sets no field of the config'),
        ('model.num_heads=7', 'model.num_heads = 7 does not divide'),
    ],
)
def test_changes_of_the_data_are_refused(change, message):
    config = _config('runlocal')
    config_check.validate(config)
    with pytest.raises(ValueError, match=message):
        benchmark.changed(config, change)


def test_a_config_or_networks_is_required():
    done = subprocess.run(
        [sys.executable, '-m', 'ism_jax.benchmark'],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 2 and 'give --config' in done.stderr
