"""A killed run resumes bit for bit; another config is refused."""

import json
import os
from pathlib import Path
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from PIL import Image
import pytest

from ism_jax import config as config_lib
from ism_jax import train, trained_network
from ism_jax.method import random_streams
from ism_jax.runtime import compilation_cache
from ism_jax.sampling.sampler import Sampler
from ism_jax.training import checkpoint, loop
from ism_jax.training.progress import Progress

ROOT = Path(__file__).parents[2]


def _config(method='ism', **changes):
    config = config_lib.default()
    config_lib.with_argument(config, f'{method},runlocal')
    config.scores.enabled = False
    config.log.grid_every = 0
    config.train.steps = 12
    config.checkpoint.every = 3  # Within some pools of 4 batches.
    config.update_from_flattened_dict(changes)
    config.lock()
    return config


def _params(workdir):
    run = trained_network.load(workdir)
    return run.step, jax.tree.map(np.asarray, run.params)


def _assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


CHILD = """
import sys
import jax
from ism_jax import config, train
config_ = config.from_json(open(sys.argv[1]).read())
train.train(config_, sys.argv[2])
"""


def _child(config_path, workdir):
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    return subprocess.Popen(
        [sys.executable, '-c', CHILD, str(config_path), str(workdir)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_killed_at_a_random_step_it_repeats_the_uninterrupted_run(tmp_path):
    config_path = tmp_path / 'config.json'
    config_path.write_text(
        config_lib.to_json(_config(**{'train.steps': 60, 'log.every': 1}))
    )
    straight = _child(config_path, tmp_path / 'straight')
    output, _ = straight.communicate(timeout=300)
    assert straight.returncode == 0, output[-3000:]

    killed = _child(config_path, tmp_path / 'killed')
    when = random.Random().randrange(4, 45)
    shown = []
    for line in killed.stdout:
        shown.append(line)
        reached = re.match(r'step (\d+)/', line)
        # Saving is asynchronous: on a slow machine the first is late.
        saved = checkpoint.saved_steps(tmp_path / 'killed')
        if reached and int(reached[1]) >= when and saved:
            killed.send_signal(signal.SIGKILL)
            break
    assert killed.wait(60) == -signal.SIGKILL, ''.join(shown)[-3000:]

    resumed = _child(config_path, tmp_path / 'killed')
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output[-3000:]
    assert 'resuming at step' in output, (when, saved, output[-2000:])
    step, params = _params(tmp_path / 'killed')
    expected_step, expected = _params(tmp_path / 'straight')
    assert step == expected_step == 60, when
    _assert_equal(params, expected)


def test_resumed_within_a_pool_and_with_more_steps(tmp_path):
    whole = train.train(_config(), tmp_path / 'whole')
    part = _config(**{'train.steps': 6})
    train.train(part, tmp_path / 'part')  # 6 is the middle of the second pool.
    state = train.train(_config(), tmp_path / 'part')
    assert int(state.step) == 12
    _assert_equal(
        jax.tree.map(np.asarray, (state.params, state.opt_state, state.target)),
        jax.tree.map(np.asarray, (whole.params, whole.opt_state, whole.target)),
    )


def test_a_run_resumes_on_another_mesh(tmp_path, eight_devices):
    train.train(_config(**{'train.steps': 6, 'mesh.fsdp': 4}), tmp_path)
    state = train.train(_config(**{'mesh.fsdp': 2}), tmp_path)
    assert int(state.step) == 12
    one = train.train(_config(**{'mesh.fsdp': 2}), tmp_path / 'straight')
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
    jax.tree.map(close, state.params, one.params)


def test_a_changed_config_is_named_or_refused(tmp_path, capsys):
    train.train(_config(**{'train.steps': 3}), tmp_path)
    fields = r'model.depth: 2 -> 3.*may change: train.steps'
    with pytest.raises(ValueError, match=fields) as e:
        train.train(_config(**{'model.depth': 3}), tmp_path)
    assert '--workdir' in str(e.value)
    train.train(_config(**{'train.steps': 4, 'log.every': 2}), tmp_path)
    shown = capsys.readouterr().out
    assert 'changed since the run was started: train.steps: 3 -> 4' in shown
    assert 'resuming at step 3' in shown


def test_before_the_first_checkpoint_a_config_may_change(tmp_path):
    changes = {'train.max_skipped_in_row': 2, 'checkpoint.every': 100}
    with pytest.raises(loop.NonFiniteError):
        train.train(_config(**{'optimizer.learning_rate': 1e30} | changes), tmp_path)
    assert checkpoint.saved_steps(tmp_path) == []
    assert int(train.train(_config(**{'train.steps': 3}), tmp_path).step) == 3


def test_the_last_and_the_best_are_kept(tmp_path):
    config = _config(**{'checkpoint.keep_last': 1, 'checkpoint.keep_best': 1})
    train.train(config, tmp_path)
    steps = checkpoint.saved_steps(tmp_path)
    assert 12 in steps and 1 <= len(steps) <= 2
    with pytest.raises(ValueError, match='no checkpoint 5; it has'):
        trained_network.load(tmp_path, 5)
    with pytest.raises(ValueError, match='holds no run'):
        trained_network.load(tmp_path / 'other')


def test_non_finite_steps_stop_the_run_and_keep_batches(tmp_path):
    config = _config(**{'optimizer.learning_rate': 1e30, 'train.max_skipped_in_row': 3})
    with pytest.raises(loop.NonFiniteError, match='3 steps in a row.*learning rate'):
        train.train(config, tmp_path)
    # The batches of the first and the last skipped step.
    first, last = sorted(tmp_path.glob('non_finite_step_*.npz'))
    assert first.stem.endswith('_00000001') and last.stem.endswith('_00000003')
    with np.load(last) as batch:
        assert batch['step'] == 3
        assert batch['images'].shape == (32, 32, 32, 1)
        assert not np.isfinite(batch['loss'] + batch['gradient_norm'])


@pytest.mark.slow  # tests/transport has the pairings.
def test_transport_changes_the_pairing_and_can_be_switched_off(tmp_path):
    losses = []
    for name, change in (
        ('blind', {'transport.per_class': False}),
        ('classes', {'transport.per_class': True}),
        ('rows', {'transport.method': 'row_sampling'}),
        ('off', {'transport.enabled': False}),
    ):
        state = train.train(_config(**{'train.steps': 3} | change), tmp_path / name)
        losses.append(np.asarray(state.params['final']['kernel']).sum())
    assert len(set(losses)) == 4


def test_what_a_run_leaves_behind(tmp_path, capsys):
    config = _config(**{'scores.enabled': True, 'log.grid_every': 6})
    train.train(config, tmp_path)
    shown = capsys.readouterr().out
    assert 'Total: ' in shown and 'SiT' in shown and 'images/s' in shown
    # The last lines say what was written, and what to do next.
    for name in ('samples.png', 'scores.json', 'grids', 'checkpoints'):
        assert (tmp_path / name).exists() and f'\n  {name} ' in shown
    *_, sample, evaluate, diagnose = shown.strip().splitlines()
    for name, line in dict(sample=sample, evaluate=evaluate, diagnose=diagnose).items():
        assert f'-m ism_jax.{name} --workdir {tmp_path}' in line
    records = json.loads((tmp_path / 'scores.json').read_text())
    assert {(r['steps'], r['guidance']) for r in records} == {
        (s, w) for s in (1, 2) for w in (0.0, 1.0)
    }
    assert all(r.keys() >= {'fd', 'accuracy', 'samples'} for r in records)
    evaluation = subprocess.run(
        [sys.executable, '-m', 'ism_jax.evaluate', f'--workdir={tmp_path}',
         '--steps=1,4', '--guidance=1', '--samples=100'],
        capture_output=True, text=True, cwd=ROOT, timeout=200,

    )  # fmt: skip
    assert evaluation.returncode == 0, evaluation.stderr[-3000:]
    assert 'Frechet' in evaluation.stdout
    merged = json.loads((tmp_path / 'scores.json').read_text())
    cells = [(r['trained_steps'], r['steps'], r['guidance']) for r in merged]
    assert sorted(cells) == [(12, s, w) for s, w in (
        (1, 0.0), (1, 1.0), (2, 0.0), (2, 1.0), (4, 1.0))]  # fmt: skip
    assert len(list((tmp_path / 'grids').glob('*.png'))) == 4
    (events,) = (tmp_path / 'tensorboard').glob('events*')
    content = events.read_bytes()
    for name in ('velocity/band_a5', 'transport/entropy', 'distance/target_infer',
                 'consistency_samples/step_1_over_64', 'samples_4_steps'):  # fmt: skip
        assert name.encode() in content, name


def test_last_metrics_are_written_when_logs_do_not_divide_the_steps(tmp_path, capsys):
    changes = {'log.every': 5, 'train.steps': 7, 'checkpoint.every': 3}
    train.train(_config(**changes), tmp_path)
    shown = capsys.readouterr().out
    assert re.findall(r'step (\d)/7', shown) == ['3', '5', '6', '7']
    # The clock stops exactly once for each checkpoint.
    assert all(0 < float(n) < 1e5 for n in re.findall(r'(\d+) images/s', shown))


def test_sampling_from_a_run(tmp_path):
    train.train(_config(**{'train.steps': 3}), tmp_path)

    def sample(*flags):
        return subprocess.run(
            [sys.executable, '-m', 'ism_jax.sample', f'--workdir={tmp_path}', *flags],
            capture_output=True, text=True, cwd=ROOT, timeout=200,

        )  # fmt: skip

    out = tmp_path / 'out'
    result = sample(
        '--steps=1,3', '--guidance=0,2.5', '--labels=0-2,null', f'--out={out}'
    )
    assert result.returncode == 0, result.stderr[-3000:]
    with np.load(out / 'samples.npz') as file:
        assert file['images'].shape == (2, 2, 4, 32, 32, 1)
        assert file['images'].dtype == np.uint8
        assert file['schedules'].tolist() == ['1.0', '0.5,0.25,0.25']
        assert file['labels'].tolist() == [0, 1, 2, 10]
    assert (out / 'grid.png').exists()
    assert len(list(out.glob('steps_*_guidance_*.png'))) == 4
    for flags, message in (
        (('--labels=0-12',), '0 .. 9'),
        (('--guidance=9',), '3.5'),
        (('--steps=0',), '1 .. 128'),
        (('--schedule=0.3,0.7',), '0.3'), (('--step=77',), '77'),
    ):  # fmt: skip
        result = sample(*flags)
        assert result.returncode == 2 and message in result.stderr.splitlines()[-1]


def test_time_is_not_counted_twice():
    """The clock of images/s excludes checkpoints and grids."""
    progress = Progress.__new__(Progress)
    progress._timer = (time.time() - 1, 0)
    with progress.paused():
        time.sleep(0.5)
    assert time.time() - progress._timer[0] < 1.4


def test_skipped_images_are_counted_and_named(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in 'ab':
        (tmp_path / 'images' / name).mkdir(parents=True)
        for i in range(20):
            image = Image.fromarray(rng.integers(0, 255, (32, 32), np.uint8))
            image.save(tmp_path / 'images' / name / f'{i}.png')
    broken = tmp_path / 'images' / 'a' / '7.png'
    broken.write_bytes(broken.read_bytes()[:60])
    changes = {'data.source': f'folder:{tmp_path}/images', 'train.steps': 5}
    with pytest.raises(ValueError, match=r"7\.png.*data.on_corrupt = 'skip'"):
        train.train(_config('flow_matching', **changes), tmp_path / 'stopped')
    changes['data.on_corrupt'] = 'skip'
    train.train(_config('flow_matching', **changes), tmp_path / 'run')
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith('skipped: ')]
    assert str(broken) in line and 'on_corrupt' not in line


def test_compiled_programs_are_kept_on_accelerators(monkeypatch):
    own = jax.config.jax_compilation_cache_dir
    kept = lambda: jax.config.jax_compilation_cache_dir
    try:
        for backend, set_before, expected in (
            ('gpu', '/elsewhere', '/elsewhere'),
            ('cpu', None, None),
            ('gpu', None, str(Path('~/.cache/ism_jax/compiled').expanduser())),
        ):
            jax.config.update('jax_compilation_cache_dir', set_before)
            monkeypatch.setattr(jax, 'default_backend', lambda name=backend: name)
            compilation_cache.keep_programs()
            assert kept() == expected
    finally:
        jax.config.update('jax_compilation_cache_dir', own)


def test_grids_draw_their_noise_from_their_own_stream(tmp_path, monkeypatch):
    """`key(seed)` itself is the parent of the streams of training."""
    keys, batches = [], Sampler.batches

    def recorded(self, params, key, *args, **kwargs):
        keys.append(key)
        return batches(self, params, key, *args, **kwargs)

    monkeypatch.setattr(Sampler, 'batches', recorded)
    train.train(_config(**{'train.steps': 2, 'log.grid_every': 2}), tmp_path)
    seed_key = jax.random.key(0)
    own = random_streams.stream(seed_key, random_streams.SAMPLES, 0)
    assert len(keys) == 2 + 2 * 2  # Grids, and the cells of the table at the end.
    for key in keys:
        assert jax.random.key_data(key).tolist() == jax.random.key_data(own).tolist()
    domains = [getattr(random_streams, n) for n in ('INIT', 'OBJECTIVE', 'NOISE')]
    assert random_streams.SAMPLES not in domains
