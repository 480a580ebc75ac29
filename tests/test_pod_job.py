"""A pod job from start to end: `launch/tpu_pod.sh`, with processes in place of a pod.

A stand-in for gcloud starts the processes of a slice on this machine. The run and its
data, Parquet files, are in the bucket of an emulator. The job is preempted twice, with
and without a warning, and continues with another number of processes.
"""

import contextlib
import io
import json
import os
from pathlib import Path
import re
import runpy
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
from PIL import Image
import pytest
import sharded_files
from stand_ins import path_of, stand_in

import ism_jax
from ism_jax import train, trained_network
from ism_jax.data import array_source
from ism_jax.runtime import paths
from ism_jax.training import checkpoint

ROOT = Path(__file__).parent.parent
SOURCE = 'parquet:{folder}/data/*.parquet'
STEPS = 30

# Arguments: NAME --zone ... of `gcloud compute tpus tpu-vm`. Each slice has the number
# of workers in the next line of `sizes`; a worker is a folder with a Python that learns
# its number from the environment, as it would from the metadata of a machine.
GCLOUD = """
echo "$4" >> "$FOLDER/calls"
case "$4" in
  describe) cat "$FOLDER/state" 2>/dev/null || exit 1 ;;
  delete) rm -r "$FOLDER/state" "$FOLDER"/worker_* ;;
  create)
    size="$(head -n 1 "$FOLDER/sizes")"
    sed -i 1d "$FOLDER/sizes"
    echo "$((20000 + RANDOM % 10000))" > "$FOLDER/port"
    for ((i = 0; i < size; i++)); do
      mkdir -p "$FOLDER/worker_$i/ism_jax/.venv/bin"
      cp "$FOLDER/python_" "$FOLDER/worker_$i/ism_jax/.venv/bin/python"
    done
    echo READY > "$FOLDER/state" ;;
  ssh)
    command="${@: -1}"
    case "$command" in *'pip install'*) exit 0 ;; esac
    case "$*" in *--worker=0*) cd "$FOLDER/worker_0" && exec bash -c "$command" ;; esac
    for worker in "$FOLDER"/worker_*; do
      (cd "$worker" && exec bash -c "echo \\$\\$ > shell; $command") &
    done
    wait ;;
esac
"""
PYTHON = """
shift  # -m
here="$(cd "$(dirname "$0")/../../.." && pwd)"
echo "$$" > "$here/process"
workers=("$FOLDER"/worker_*)
exec {python} -c 'import runpy, sys
from ism_jax.runtime import lease
lease.RENEW_SECONDS = 0.5
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)' \
  "${{@/--distributed=on/--distributed=auto}}" --process_id "${{here##*_}}" \
  --num_processes "${{#workers[@]}}" --coordinator "127.0.0.1:$(cat "$FOLDER/port")"
"""


@pytest.fixture
def data(folder, tmp_path):
    """Writes 120 digits as Parquet shards, on disk and to the bucket."""
    digits = array_source.embedded_mnist(32)
    images = []
    for index in range(0, len(digits), len(digits) // 120):
        file = io.BytesIO()
        Image.fromarray(digits[index]['image'][..., 0]).save(file, 'PNG')
        images.append((file.getvalue(), digits[index]['label']))
    local = tmp_path / 'data'
    sharded_files.write_parquet(local, images, map(str, range(10)), (50, 70))
    for path in local.iterdir():
        paths.upload(path, folder / 'data' / path.name)


def _flags(folder, cache):
    return {
        'config.data.source': SOURCE.format(folder=folder),
        'config.data.dir': str(cache),
        'config.transport.enabled': False,  # Whose programs compile slowly.
        'config.train.steps': STEPS,
        'config.optimizer.warmup_steps': 0,
        'config.checkpoint.every': 5,
        'config.log.every': 1,
        'config.log.grid_every': 0,
        'config.log.parameters': False,
        'config.scores.enabled': False,
    }


def _straight(folder):
    """An uninterrupted run of one process on disk."""
    get_config = runpy.run_path(str(ROOT / 'configs' / 'fashion_mnist.py'))[
        'get_config'
    ]
    config = get_config('runlocal')
    for name, value in _flags(folder, folder / 'cache').items():
        config.update_from_flattened_dict({name.removeprefix('config.'): value})
    train.train(config.lock(), folder / 'straight')
    return trained_network.load(folder / 'straight')


class Job:
    """The launch script with its stand-ins; its output, line by line."""

    def __init__(self, tmp_path, url, sizes, flags):
        self.bin = tmp_path / 'bin'
        stand_in(self.bin, 'gcloud', GCLOUD)
        stand_in(self.bin, 'sleep', '')
        stand_in(self.bin, 'python_', PYTHON.format(python=sys.executable))
        (self.bin / 'sizes').write_text('\n'.join([*map(str, sizes), '']))
        settings = {'NAME': 'job', 'ZONE': 'z', 'TYPE': 't', 'REPOSITORY': 'r'}
        settings |= {'BUCKET': str(url), 'PATH': path_of(self.bin)}
        settings |= {'PYTHONUNBUFFERED': '1', 'PYTHONPATH': str(ROOT)}
        self.process = subprocess.Popen(
            ['bash', ROOT / 'launch' / 'tpu_pod.sh',
             f'--config={ROOT}/configs/fashion_mnist.py:runlocal',
             *(f'--{name}={value}' for name, value in flags.items())],
            env=os.environ | settings, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.shown = ''

    def wait_for(self, pattern):
        for line in self.process.stdout:
            self.shown += line
            if re.search(pattern, line):
                return
        raise AssertionError(self.shown)

    def pids(self, *names):
        found = [p for name in names for p in self.bin.glob(f'worker_*/{name}')]
        return [int(path.read_text()) for path in sorted(found)]

    def preempt(self):
        (self.bin / 'state').write_text('PREEMPTED')

    def calls(self, name):
        return (self.bin / 'calls').read_text().split().count(name)


def _command(module, *arguments):
    done = subprocess.run(
        [sys.executable, '-m', f'ism_jax.{module}', *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_preempted_pod_job_reaches_its_end(folder, data, tmp_path):
    flags = _flags(folder, tmp_path / 'cache')
    job = Job(tmp_path, folder, [2, 1, 2], flags)
    workdir = folder / 'job'
    try:
        # A warning: one process learns of it, and all save the same step.
        job.wait_for(r'^step 3/')
        job.preempt()
        os.kill(job.pids('process')[1], signal.SIGTERM)
        job.wait_for(r'step \d+ is saved, and the same command resumes the run')
        saved = max(checkpoint.saved_steps(workdir))

        # No warning: all end at once, and so does what would report it.
        job.wait_for(rf'^resuming at step {saved}$')
        # By then the next checkpoint is complete, as the one after it has begun.
        job.wait_for(rf'^step {saved + 12}/')
        job.preempt()
        for pid in job.pids('shell', 'process'):
            os.kill(pid, signal.SIGKILL)
        job.wait_for(r'^resuming at step \d+$')
        resumed = int(job.shown.split()[-1])
        assert saved < resumed and resumed % 5 == 0
        job.wait_for('the slice still exists')
        assert job.process.wait(60) == 0, job.shown
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)
        job.process.communicate()
    assert job.calls('create') == 3 and job.calls('delete') == 2
    assert re.findall(r'mesh data (\d) x fsdp 1', job.shown) == ['2', '1', '2']

    run = trained_network.load(workdir)
    straight = _straight(tmp_path)
    assert run.step == straight.step == STEPS
    # Other numbers of processes add in another order.
    difference = optax.global_norm(
        jax.tree.map(np.subtract, run.params, straight.params)
    )
    assert difference < 1e-3 * optax.global_norm(straight.params)
    _command('evaluate', f'--workdir={workdir}', '--steps=1', '--guidance=0',
             '--samples=20')  # fmt: skip
    (score,) = json.loads(paths.read_bytes(workdir / 'scores.json'))
    assert score['trained_steps'] == STEPS and np.isfinite(score['fd'])
    _command('convert', 'export', f'--workdir={workdir}', f'--out={folder}/export')
    model = ism_jax.load(f'{folder}/export')
    assert model.trained_steps == STEPS
    assert model.sample([0], steps=1).shape == (1, 32, 32, 1)
