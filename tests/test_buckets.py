"""A run in a bucket: killed, resumed, damaged, refused, evaluated, exported, loaded.

Flow matching compiles in a third of the time of iSM, whose resumption on disk is tested
in `training/test_resume.py`.
"""

import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys

import fsspec
import jax
import numpy as np
import pytest

from ism_jax import config as config_lib
from ism_jax import convert, evaluate, resolved_config, sample, train, trained_network
from ism_jax.evaluation import real_images, sample_chunks, sample_files
from ism_jax.runtime import checksums, lease, paths
from ism_jax.training import checkpoint

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.usefixtures('one_device')

# The command, with a lease that expires soon.
COMMAND = """
import runpy, sys
from ism_jax.runtime import lease
lease.RENEW_SECONDS = 0.5
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, 'RENEW_SECONDS', 0.5)


def _start(module, *arguments):
    environment = os.environ | {'PYTHONUNBUFFERED': '1'}
    command = [sys.executable, '-c', COMMAND, f'ism_jax.{module}']
    return subprocess.Popen(
        [*command, *map(str, arguments)], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def _run(module, *arguments):
    process = _start(module, *arguments)
    shown = process.communicate(timeout=600)[0]
    assert process.returncode == 0, shown
    return shown


def _config(**changes):
    config = config_lib.with_argument(config_lib.default(), 'flow_matching,runlocal')
    config.scores.enabled = False
    config.log.update(grid_every=0, every=1, parameters=False)
    config.train.steps = 6
    config.checkpoint.update(every=2, keep_last=3)
    config.update_from_flattened_dict(changes)
    return config.lock()


def _assert_equal(run, other):
    jax.tree.map(np.testing.assert_array_equal, run, other)


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """The state of an uninterrupted run on disk, and its folder."""
    folder = tmp_path_factory.mktemp('straight')
    return train.train(_config(), folder), folder


@pytest.fixture(scope='module')
def trained(storage):
    """The URL of a run of six steps in the bucket."""
    folder = paths.to_path('gs://bucket/trained')
    train.train(_config(**{'log.grid_every': 6}), folder)
    return folder


@pytest.fixture
def copy(trained, folder):
    """A copy of it."""
    client = fsspec.filesystem('gs')
    for name in paths.files_below(trained):
        client.cp_file(str(trained / name), str(folder / name))
    return folder


def test_a_killed_run_resumes_bit_for_bit(folder, tmp_path):
    flags = (
        '--config=configs/fashion_mnist.py:flow_matching,runlocal',
        '--config.scores.enabled=False',
        '--config.checkpoint.every=2',
        '--config.log.every=1',
        '--config.optimizer.warmup_steps=0',
        '--config.optimizer.schedule=constant',  # So that the length may change.
        '--config.log.parameters=False',
        '--config.log.grid_every=0',
    )
    endless = '--config.train.steps=1000'
    first = _start('train', *flags, f'--workdir={folder}', endless)
    shown = []
    for line in first.stdout:
        shown.append(line)
        if line.startswith('step 5/'):
            break
    assert first.poll() is None, ''.join(shown)
    with pytest.raises(ValueError, match='is used by another run .process'):
        train.train(_config(), folder)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (folder / lease.NAME).exists()
    last = checkpoint.saved_steps(folder)[-1]

    steps = f'--config.train.steps={last + 3}'
    shown = _run('train', *flags, f'--workdir={folder}', steps)
    assert 'waiting 2 s for a sign of life' in shown
    assert re.search(r'resuming at step \d*[02468]$', shown, re.M)
    _run('train', *flags, f'--workdir={tmp_path / "straight"}', steps)
    run = trained_network.load(folder)
    other = trained_network.load(tmp_path / 'straight')
    assert run.step == other.step == last + 3
    _assert_equal(run.params, other.params)


def test_all_that_a_run_writes_is_in_the_bucket(trained, straight):
    names = paths.files_below(trained)
    state, on_disk = straight
    assert checkpoint.saved_steps(trained) == checkpoint.saved_steps(on_disk)
    assert {'run.json', 'grids/samples_1_steps_00000006.png'} <= set(names)
    assert any(name.startswith('tensorboard/events') for name in names)
    assert lease.NAME not in names
    run = trained_network.load(trained)
    _assert_equal(run.params, state.infer)
    assert not Path('gs:').exists()


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _largest(folder, below):
    sizes = {n: s for n, s in paths.files_below(folder).items() if n.startswith(below)}
    return folder / max(sizes, key=sizes.get)


def test_a_damaged_checkpoint_is_set_aside(copy, straight, capsys):
    """Also one that lacks an object, and one that was never finished."""
    _flip(_largest(copy, 'checkpoints/6/state'))
    _largest(copy, 'checkpoints/4/infer').unlink()
    fsspec.filesystem('gs').pipe_file(f'{copy}/checkpoints/8/state/part', b'1')
    run = trained_network.load(copy)
    assert run.step == 6  # Only its state is damaged.
    state = train.train(_config(), copy)
    shown = capsys.readouterr().out
    assert 'checkpoint 6 is damaged' in shown and 'resuming at step 2' in shown
    assert 'checkpoints/4/infer' in shown and 'is missing' in shown
    kept = paths.files_below(copy / checkpoint.DAMAGED)
    assert {name.split('/')[0] for name in kept} == {'4', '6'}
    _assert_equal(state.params, straight[0].params)
    assert checkpoint.saved_steps(copy) == [2, 4, 6]
    assert not (copy / 'checkpoints' / '8').exists()


def test_failures_of_the_service_lose_nothing(storage, folder, straight):
    faults = (
        (503, 'GET', '', 40),
        (429, 'POST', '', 15),
        ('cut', 'POST', '', 25),
        ('cut', 'GET', '', 90),
    )
    contexts = [
        storage.fault(answer, method=method, path=path, every=every, times=2)
        for answer, method, path, every in faults
    ]
    hits = [context.__enter__() for context in contexts]
    state = train.train(_config(), folder)
    for context in contexts:
        context.__exit__(None, None, None)
    assert all(hits), [len(h) for h in hits]
    _assert_equal(state.params, straight[0].params)
    for step in checkpoint.saved_steps(folder):
        assert not checksums.problems(folder / 'checkpoints' / str(step))


def test_denied_permission_at_the_start_is_one_sentence(storage, folder):
    with storage.fault(403):
        with pytest.raises(ValueError, match='--workdir gs://.* access is denied'):
            train.train(_config(), folder)
    with storage.fault(403, method='POST'):
        with pytest.raises(ValueError, match='cannot be written to .*injected'):
            train.train(_config(), folder)


def test_permission_that_is_lost_keeps_the_earlier_checkpoints(storage, copy, capsys):
    config = _config(**{'train.steps': 20})
    with storage.fault(403, method='POST', path='checkpoints') as hits:
        with pytest.raises(checkpoint.SaveError, match='3 checkpoints in a row'):
            train.train(config, copy)
    assert hits and 'checkpoint 8 could not be saved' in capsys.readouterr().out
    assert checkpoint.saved_steps(copy) == [2, 4, 6]


def test_an_exported_network_is_loaded(trained, url, tmp_path, capsys):
    folder = paths.from_user(url, '--out')
    convert.run('export', trained, folder)
    assert f'to {folder}/' in capsys.readouterr().out
    run, exported = trained_network.load(trained), trained_network.load(url)
    assert exported.step == run.step and exported.class_names == run.class_names
    _assert_equal(exported.params, run.params)
    for name in paths.files_below(folder):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    _assert_equal(trained_network.load(tmp_path).params, run.params)
    _flip(folder / 'model.safetensors')
    with pytest.raises(ValueError, match='has changed since the export'):
        trained_network.load(url)


def test_a_run_in_s3_is_refused(trained, s3_bucket):
    content = (trained / 'run.json').read_bytes()
    fsspec.filesystem('s3').pipe_file(f'{s3_bucket}/run/run.json', content)
    with pytest.raises(ValueError, match='only local paths and gs:// work here'):
        trained_network.load(f'{s3_bucket}/run')


def test_samples_and_their_chunks_are_written_to_a_bucket(folder):
    images = np.zeros((1, 1, 2, 8, 8, 1), np.float32)
    settings = dict(schedules=[(1.0,)], guidance=[0.0], labels=[0, 1], settings={})
    sample.write_samples(folder, images, **settings)
    assert {'samples.npz', 'grid.png'} <= set(paths.files_below(folder))
    labels = np.arange(5)
    chunks = sample_chunks.Chunks(folder, labels, 2, keep_images=True)
    draw = lambda first, labels: [(np.full((len(labels), 8, 8, 1), 0.5), labels)]
    mean = lambda images: {'mean': images.mean((1, 2, 3))}
    for index in chunks.missing():
        chunks.make(index, draw, mean)
    damaged = folder / 'chunk-00001.npz'
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.warns(UserWarning, match='gs://.*chunk-00001.npz is damaged'):
        chunks.discard_unusable()
    assert chunks.missing() == [1]
    chunks.make(1, draw, mean)
    assert chunks.features()['mean'].shape == (5,)
    name = sample_files.write_npz(folder, chunks.images)
    chunks.remove()
    assert not [n for n in paths.files_below(folder) if n.startswith('chunk')]
    reference = evaluate.open_reference(f'{folder}/{name}', image_size=None)
    images = real_images.open_images(reference)
    assert len(images) == 5 and len(next(images.batches(5))) == 5
    with pytest.raises(ValueError, match='is a folder in a bucket; .*folder:gs://'):
        evaluate.open_reference(str(folder), image_size=None)


def test_a_config_is_read_from_a_bucket(folder):
    config = _config()
    (folder / 'config.json').write_text(config_lib.to_json(config))
    found = resolved_config.get_config(f'{folder}/config.json')
    assert json.loads(config_lib.to_json(found)) == json.loads(
        config_lib.to_json(config)
    )
