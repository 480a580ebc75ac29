"""Runs that are stopped, damaged, short of disk space or started twice.

Flow matching compiles in a third of the time of iSM, whose resumption is tested in
`test_resume.py`.
"""

import faulthandler
import json
import os
from pathlib import Path
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from ism_jax import config as config_lib
from ism_jax import train, trained_network
from ism_jax.data import pool_loader, source
from ism_jax.runtime import checksums, lock, preemption, watchdog
from ism_jax.training import checkpoint

ROOT = Path(__file__).parents[2]


def _config(**changes):
    config = config_lib.default()
    config_lib.with_argument(config, 'flow_matching,runlocal')
    config.scores.enabled = False
    config.log.update(grid_every=0, every=1)
    config.train.steps = 12
    config.checkpoint.update(every=3, keep_last=3)
    config.update_from_flattened_dict(changes)
    config.lock()
    return config


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """Parameters of an uninterrupted run."""
    state = train.train(_config(), tmp_path_factory.mktemp('straight'))
    return jax.tree.map(np.asarray, (state.params, state.opt_state, state.infer))


def _assert_as_straight(state, straight):
    found = jax.tree.map(np.asarray, (state.params, state.opt_state, state.infer))
    jax.tree.map(np.testing.assert_array_equal, found, straight)


CHILD = """
import sys
from ism_jax import config, train
from ism_jax.runtime import command_line
from ism_jax.training import checkpoint, loop
config_ = config.from_json(open(sys.argv[1]).read())
sys.argv[1:] = sys.argv[2:]
workdir = sys.argv.pop()
command_line.guard(
    lambda: train.train(config_, workdir), loop.NonFiniteError, checkpoint.SaveError
)(sys.argv)
"""


def child(config, workdir, **options):
    """A process that trains."""
    path = workdir.with_suffix('.json')
    path.write_text(config_lib.to_json(config))
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    return subprocess.Popen(
        [sys.executable, '-c', CHILD, str(path), str(workdir)],
        env=environment | {'PYTHONUNBUFFERED': '1'}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


def wait_for_step(process, step):
    """Reads what a run prints up to a step."""
    shown = []
    for line in process.stdout:
        shown.append(line)
        reached = re.match(r'step (\d+)/', line)
        if reached and int(reached[1]) >= step:
            break
    return ''.join(shown)


# More steps than a run takes between a line of its output and the stop that follows.
LONG = {'train.steps': 600, 'checkpoint.every': 1000, 'log.every': 100}


@pytest.fixture(scope='module')
def straight_child(tmp_path_factory):
    """An uninterrupted run in a child process, where rounding differs."""
    workdir = tmp_path_factory.mktemp('straight_child') / 'run'
    assert child(_config(**LONG), workdir).wait(200) == 0
    return trained_network.load(workdir)


@pytest.mark.parametrize(
    'kind, code',
    [
        pytest.param(signal.SIGTERM, preemption.EXIT_CODE, id='SIGTERM'),
        pytest.param(signal.SIGINT, 130, id='SIGINT', marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_same_command_resumes(
    kind, code, tmp_path, straight_child
):
    # There are no regular checkpoints: the signal caused the save.
    never = _config(**{'checkpoint.every': 1000, 'train.steps': 100_000})
    process = child(never, tmp_path / 'run')
    shown = wait_for_step(process, 2)
    process.send_signal(kind)
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == code, shown + rest
    assert f'stopped by {kind.name}; step' in rest and 'resumes the run' in rest
    steps = checkpoint.saved_steps(tmp_path / 'run')
    assert len(steps) == 1 and f'step {steps[0]} is saved' in rest
    assert not checksums.problems(tmp_path / 'run' / 'checkpoints' / str(steps[0]))
    assert steps[0] < LONG['train.steps']
    if kind == signal.SIGTERM:
        assert child(_config(**LONG), tmp_path / 'run').wait(200) == 0
        run = trained_network.load(tmp_path / 'run')
        assert run.step == straight_child.step
        jax.tree.map(np.testing.assert_array_equal, run.params, straight_child.params)


def test_a_second_signal_ends_at_once():
    # In the background of a shell, SIGINT is ignored by default.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with preemption.Requests() as requests:
        signal.raise_signal(signal.SIGINT)
        assert requests.stop_after(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    # Handlers are restored.
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_a_signal_while_scoring_loses_nothing():
    with preemption.Requests() as requests:
        assert not requests.stop_after(1)
        requests.nothing_to_save()
        with pytest.raises(preemption.Preempted, match='everything was already saved'):
            signal.raise_signal(signal.SIGTERM)


def _run(workdir, steps=12):
    return train.train(_config(**{'train.steps': steps}), workdir)


def _latest(workdir):
    return workdir / 'checkpoints' / str(checkpoint.saved_steps(workdir)[-1])


def _largest(folder, below=''):
    files = [p for p in (folder / below).rglob('*') if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def flip(path, where=0.5):
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.fixture(scope='module')
def nine_steps(tmp_path_factory):
    """A run with checkpoints 3, 6 and 9."""
    workdir = tmp_path_factory.mktemp('nine') / 'run'
    train.train(_config(**{'train.steps': 9}), workdir)
    return workdir


@pytest.fixture
def workdir(nine_steps, tmp_path):
    return shutil.copytree(nine_steps, tmp_path / 'copy')


@pytest.mark.parametrize(
    'damage, item',
    [(flip, 'state'), (flip, 'infer'), (truncate, 'data'), (os.remove, 'state')],
)
def test_a_damaged_checkpoint_is_set_aside(damage, item, workdir, straight, capsys):
    damage(_largest(_latest(workdir), item))
    capsys.readouterr()
    state = _run(workdir)
    shown = capsys.readouterr().out
    assert 'checkpoint 9 is damaged' in shown and 'resuming at step 6' in shown
    assert (workdir / 'damaged_checkpoints' / '9' / item).exists()
    _assert_as_straight(state, straight)


def test_all_damaged_checkpoints_are_set_aside(workdir, straight, capsys):
    for step in (6, 9):
        flip(_largest(workdir / 'checkpoints' / str(step), 'state'))
    state = _run(workdir)
    assert 'resuming at step 3' in capsys.readouterr().out
    _assert_as_straight(state, straight)


def test_a_checkpoint_without_checksums_is_tried(workdir, straight, capsys):
    """As left by a run that was killed just after saving."""
    (_latest(workdir) / checksums.NAME).unlink()
    os.remove(_largest(_latest(workdir), 'state'))
    state = _run(workdir)
    shown = capsys.readouterr().out
    assert 'checkpoint 9 is damaged' in shown
    assert 'resuming at step' in shown
    _assert_as_straight(state, straight)


def test_sampling_uses_the_last_undamaged_checkpoint(workdir):
    good = trained_network.load(workdir, 6)
    flip(_largest(workdir / 'checkpoints' / '9', 'state'))
    assert trained_network.load(workdir).step == 9  # Sampling does not read it.
    flip(_largest(workdir / 'checkpoints' / '9', 'infer'))
    with pytest.warns(UserWarning, match='checkpoint 9 .* is damaged .* differs'):
        run = trained_network.load(workdir)
    assert run.step == 6
    jax.tree.map(np.testing.assert_array_equal, run.params, good.params)
    with pytest.raises(ValueError, match='checkpoint 9 .* is damaged .* choose anoth'):
        trained_network.load(workdir, 9)


def test_every_flipped_bit_is_noticed(workdir):
    folder = _latest(workdir)
    assert checksums.problems(folder) == []
    chosen = random.Random(0)
    files = [p for p in folder.rglob('*') if p.is_file() and p.stat().st_size]
    for path in files:
        before = path.read_bytes()
        flip(path, chosen.random())
        assert len(checksums.problems(folder)) == 1, path
        path.write_bytes(before)
    assert checksums.problems(folder) == []


FULL = """
import resource, signal, sys
# Like a full disk: no file can be longer than this.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
"""


def test_a_full_disk_is_reported_and_stops_only_at_the_end(tmp_path, straight):
    _run(tmp_path / 'run', 3)
    path = tmp_path / 'config.json'
    path.write_text(config_lib.to_json(_config()))
    done = subprocess.run(
        [sys.executable, '-c', FULL + CHILD, '40000', str(path), str(tmp_path / 'run')],
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert 'checkpoint 6 could not be saved' in done.stdout
    assert 'checkpoints [3] remain, and the next save tries again' in done.stdout
    assert '3 checkpoints in a row could not be saved' in done.stdout, done.stdout
    assert checkpoint.saved_steps(tmp_path / 'run') == [3]
    # With enough space again, it resumes.
    _assert_as_straight(_run(tmp_path / 'run'), straight)


def test_a_run_survives_one_failed_save(tmp_path, straight, monkeypatch, capsys):
    import orbax.checkpoint as ocp

    save = ocp.CheckpointManager.save

    def fails_once(self, step, *args, **options):
        if step == 6:
            raise OSError(28, 'No space left on device')
        return save(self, step, *args, **options)

    monkeypatch.setattr(ocp.CheckpointManager, 'save', fails_once)
    state = _run(tmp_path)
    shown = capsys.readouterr().out
    assert 'checkpoint 6 could not be saved ([Errno 28] No space' in shown
    assert 'checkpoints [3] remain' in shown
    assert checkpoint.saved_steps(tmp_path) == [3, 9, 12]
    _assert_as_straight(state, straight)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match='file/run cannot be written to .* choose ano'):
        _run(tmp_path / 'file' / 'run')


class _Flaky(source.Source):
    """A source whose reads sometimes fail."""

    image_shape, class_names, skipped = (4, 4, 1), ('a', 'b'), ()

    def __init__(self, failures):
        self._failures = failures

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if self._failures:
            self._failures -= 1
            raise OSError(5, 'Input/output error', f'{index}.png')
        return {'image': np.full((4, 4, 1), index, np.uint8), 'label': index % 2}


def test_images_that_cannot_be_read_for_a_while_are_retried(monkeypatch):
    monkeypatch.setattr(pool_loader, 'FIRST_PAUSE', 0.01)
    options = dict(batches=2, batch_size=8, seed=0, flip=False)
    flaky = pool_loader.PoolLoader(_Flaky(4), retry_seconds=30, **options)
    steady = pool_loader.PoolLoader(_Flaky(0), **options)
    try:
        for _ in range(3):
            np.testing.assert_array_equal(next(flaky).images, next(steady).images)
        assert flaky.retries == 4
    finally:
        flaky.close()
        steady.close()
    # Retries end after retry_seconds.
    for seconds in (0.1, 0):
        gone = pool_loader.PoolLoader(_Flaky(10**9), retry_seconds=seconds, **options)
        started = time.monotonic()
        with pytest.raises(OSError, match='Input/output error'):
            next(gone)
        gone.close()
        assert time.monotonic() - started < 20


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with lock.Lock(tmp_path):
        about = json.loads((tmp_path / lock.NAME).read_text())
        assert about['pid'] == os.getpid()
        with pytest.raises(ValueError, match=f'another run .process {os.getpid()} on'):
            _run(tmp_path)
    _run(tmp_path, 3)
    # A lock is released however its process ends.
    assert (tmp_path / lock.NAME).exists()


def test_a_step_that_hangs_is_reported(tmp_path, monkeypatch):
    with open(tmp_path / 'stacks', 'w+') as file:
        monkeypatch.setattr(sys, '__stderr__', file)
        dog = watchdog.Watchdog(0.2)
        dog.step()
        time.sleep(0.5)
        dog.stop()
        file.seek(0)
        shown = file.read()
        assert 'Timeout (0:00:00.2' in shown
        assert 'test_a_step_that_hangs_is_reported' in shown
        time.sleep(0.3)
        file.seek(0)
        assert file.read() == shown  # Stopped.
        never = watchdog.Watchdog(0)
        never.step()
        faulthandler.cancel_dump_traceback_later()


def _chaos(workdir, config, seconds, seed):
    """Kills runs, damages checkpoints and fills the disk at random; returns the counts.

    Ends with an uninterrupted run.
    """
    chosen, counts = random.Random(seed), {}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        what = chosen.choice(['SIGKILL', 'SIGTERM', 'full disk', 'damage'])
        counts[what] = counts.get(what, 0) + 1
        if what == 'damage':
            # At least one checkpoint stays undamaged.
            steps = checkpoint.saved_steps(workdir)
            if len(steps) > 1:
                damage = chosen.choice([flip, truncate, os.remove])
                folder = workdir / 'checkpoints' / str(steps[-1])
                if checksums.is_written(folder):
                    files = [p for p in folder.rglob('*') if p.is_file()]
                    files = [p for p in files if p.name != checksums.NAME]
                    damage(chosen.choice([p for p in files if p.stat().st_size]))
            continue
        limit = {}
        if what == 'full disk':
            size = chosen.randrange(1000, 60_000)
            limit['preexec_fn'] = lambda size=size: _limit(size)
        process = child(config, workdir, **limit)
        if what == 'full disk':
            process.communicate(timeout=300)
            assert process.returncode in (0, 1)
        else:
            wait_for_step(process, 0)
            time.sleep(chosen.uniform(0, 2))
            process.send_signal(getattr(signal, what))
            process.communicate(timeout=120)
            assert process.returncode in (0, preemption.EXIT_CODE, -signal.SIGKILL)
        if process.returncode == 0:
            break  # The run has finished.
    last = child(config, workdir)
    output = last.communicate(timeout=600)[0]
    assert last.returncode == 0, output
    return counts


def _limit(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_chaos(tmp_path):
    """`CHAOS_SECONDS` of it, ten minutes by default, in runs of 400 steps."""
    seconds = float(os.environ.get('CHAOS_SECONDS', 600))
    config = _config(**{'train.steps': 400, 'checkpoint.every': 5, 'log.every': 5})
    quiet = child(config, tmp_path / 'quiet')
    output = quiet.communicate(timeout=600)[0]
    assert quiet.returncode == 0, output
    expected = trained_network.load(tmp_path / 'quiet')
    end, total, runs = time.monotonic() + seconds, {}, 0
    while time.monotonic() < end:
        workdir = tmp_path / f'chaos{runs}'
        counts = _chaos(workdir, config, end - time.monotonic(), seed=runs)
        found = trained_network.load(workdir)
        assert found.step == expected.step
        jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
        total = {k: total.get(k, 0) + counts.get(k, 0) for k in total | counts}
        runs += 1
    print(f'\n{runs} runs in {seconds:g} s, all bit for bit as uninterrupted: {total}')
