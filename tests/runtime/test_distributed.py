"""Several processes that work as one, started for real on this machine."""

import os
from pathlib import Path
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from ism_jax import trained_network
from ism_jax.runtime import distributed, preemption
from ism_jax.training import checkpoint

ROOT = Path(__file__).parents[2]
STEPS = 8
DEVICES = 4
# Changes of the config, for the processes and for the run to compare with.
CHANGES = {
    'train.steps': STEPS, 'log.every': 1, 'checkpoint.every': 4, 'log.grid_every': 0,
    'scores.enabled': False,
}  # fmt: skip


def _flags(workdir, changes):
    changes = CHANGES | changes
    return [
        '--config=configs/fashion_mnist.py:runlocal', f'--workdir={workdir}',
        *(f'--config.{name}={value}' for name, value in changes.items()),
    ]  # fmt: skip


def _environment(devices):
    return os.environ | {'JAX_NUM_CPU_DEVICES': str(devices), 'PYTHONUNBUFFERED': '1'}


def _free_port():
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return server.getsockname()[1]


def _by_flags(index, count, port):
    return [
        f'--coordinator=127.0.0.1:{port}',
        f'--num_processes={count}',
        f'--process_id={index}',
    ], {}


def _by_slurm(index, count, port):
    return [], {
        'SLURM_JOB_ID': '1', 'JAX_COORDINATOR_PORT': str(port),
        'SLURM_STEP_NODELIST': '127.0.0.1', 'SLURM_NTASKS': str(count),
        'SLURM_STEP_NUM_TASKS': str(count), 'SLURM_PROCID': str(index),
        'SLURM_LOCALID': str(index),
    }  # fmt: skip


class Processes:
    """`count` processes that train, each with its share of four devices."""

    def __init__(self, count, flags, folder, who=_by_flags):
        port = _free_port()
        self.logs = [
            folder / f'process_{i}_of_{count}_{port}.log' for i in range(count)
        ]
        self.all = []
        for i in range(count):
            more, environment = who(i, count, port)
            command = [sys.executable, '-m', 'ism_jax.train', *flags, *more]
            with open(self.logs[i], 'w') as log:
                self.all.append(
                    subprocess.Popen(
                        [*command, '--heartbeat_seconds=10'],
                        cwd=ROOT,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=_environment(DEVICES // count) | environment,
                    )  # fmt: skip
                )

    def wait(self, timeout=240):
        """Exit codes."""
        end = time.monotonic() + timeout
        try:
            return [p.wait(max(end - time.monotonic(), 1)) for p in self.all]
        except subprocess.TimeoutExpired:
            raise AssertionError(f'they hang:\n{self.text()}') from None
        finally:
            for process in self.all:
                process.kill()

    def text(self):
        return '\n'.join(f'== {log.name}\n{log.read_text()}' for log in self.logs)

    def wait_for(self, pattern, timeout=240):
        end = time.monotonic() + timeout
        while not re.search(pattern, self.logs[0].read_text(), re.MULTILINE):
            if time.monotonic() > end or self.all[0].poll() is not None:
                raise AssertionError(f'{pattern} did not come:\n{self.text()}')
            time.sleep(0.05)


def _losses(text):
    found = re.findall(r'^step (\d+)/\d+  loss ([\d.]+)', text, re.MULTILINE)
    return {int(step): float(loss) for step, loss in found}


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """One process with all four devices: its losses and its last EMA."""
    folder = tmp_path_factory.mktemp('alone')
    workdir = folder / 'run'
    log = subprocess.run(
        [sys.executable, '-m', 'ism_jax.train', *_flags(workdir, {})], cwd=ROOT,
        env=_environment(DEVICES), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert log.returncode == 0, log.stdout
    return workdir, _losses(log.stdout), trained_network.load(workdir)


def _assert_as_alone(workdir, texts, alone):
    _, losses, expected = alone
    found = {}
    for text in texts:
        found |= _losses(text)
    assert found.keys() == losses.keys()
    np.testing.assert_allclose(
        [found[s] for s in sorted(found)], [losses[s] for s in sorted(found)], rtol=2e-4
    )
    run = trained_network.load(workdir)
    assert run.step == STEPS
    # Sums are rounded differently, and Adam's first steps have one size for any
    # gradient.
    difference = jax.tree.map(
        lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b),
        run.params, expected.params,
    )  # fmt: skip
    assert max(jax.tree.leaves(difference)) < 1e-3


@pytest.mark.slow
def test_a_killed_run_resumes_with_another_number_of_processes(tmp_path, alone):
    workdir = tmp_path / 'run'
    flags = _flags(workdir, {})
    two = Processes(2, [*flags, '--config.mesh.fsdp=2'], tmp_path)
    two.wait_for(r'^step 5/')
    killed = time.monotonic()
    two.all[1].kill()
    codes = two.wait(60)
    assert time.monotonic() - killed < 45
    # Python's error of a lost connection, or the service's end of the process.
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, 2), two.text()
    said = two.logs[0].read_text()
    assert 'another process has died' in said or 'another task died' in said
    assert checkpoint.saved_steps(workdir)

    four = Processes(4, flags, tmp_path)
    assert four.wait() == [0] * 4, four.text()
    output = four.logs[0].read_text()
    assert 'resuming at step' in output and '4 x cpu, mesh data 4 x fsdp 1' in output
    # Only the first process reports losses.
    assert not any(_losses(log.read_text()) for log in four.logs[1:])
    _assert_as_alone(workdir, [two.logs[0].read_text(), output], alone)


@pytest.mark.slow  # tests/test_pod_job.py stops and resumes processes, too.
def test_one_signal_stops_all_and_one_process_resumes(tmp_path, alone):
    workdir = tmp_path / 'run'
    flags = _flags(workdir, {'checkpoint.every': 1000, 'log.grid_every': 2})
    two = Processes(2, flags, tmp_path, _by_slurm)
    two.wait_for(r'^step 3/')
    two.all[1].send_signal(signal.SIGTERM)
    codes = two.wait(60)
    assert codes == [preemption.EXIT_CODE] * 2, two.text()
    output = two.logs[0].read_text()
    assert len(list((workdir / 'grids').glob('samples_*00002.png'))) > 1
    (step,) = checkpoint.saved_steps(workdir)
    assert f'stopped by SIGTERM; step {step} is saved' in output
    one = subprocess.run(
        [sys.executable, '-m', 'ism_jax.train', *_flags(workdir, {})], cwd=ROOT,
        env=_environment(DEVICES), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert one.returncode == 0, one.stdout
    _assert_as_alone(workdir, [output, one.stdout], alone)


@pytest.mark.slow
def test_processes_share_the_potentials_that_the_first_learned(tmp_path):
    flags = {'transport.method': 'semidiscrete', 'transport.samples_per_point': 4}
    losses = []
    for count in (1, 2):
        workdir = tmp_path / str(count)
        # The coordinator's flags work for a single process, too.
        processes = Processes(count, _flags(workdir, flags), tmp_path)
        assert processes.wait() == [0] * count, processes.text()
        output = processes.logs[0].read_text()
        assert 'learned 5,000 potentials' in output
        assert not any('learned' in log.read_text() for log in processes.logs[1:])
        losses.append(_losses(output))
    assert len(losses[0]) == STEPS and losses[0].keys() == losses[1].keys()
    np.testing.assert_allclose(
        list(losses[0].values()), list(losses[1].values()), rtol=2e-4
    )


def test_bad_input_is_reported_by_all(tmp_path):
    flags = _flags(tmp_path / 'run', {'train.batch_size': 30})
    two = Processes(2, flags, tmp_path, _by_slurm)
    assert two.wait(120) == [2, 2], two.text()
    for log in two.logs:
        assert 'error: ' in log.read_text() and 'train.batch_size' in log.read_text()
        assert 'Traceback' not in log.read_text()


def test_folders_that_are_not_shared_are_refused(tmp_path):
    """A --workdir that is on another file system in each process."""
    port = _free_port()
    code = (
        'import sys; from pathlib import Path; '
        'from ism_jax.runtime import command_line, distributed; '
        'run = lambda: (distributed.start("auto", coordinator=sys.argv.pop(), '
        'num_processes=2, process_id=int(sys.argv.pop())), '
        'distributed.check_shared(Path(sys.argv.pop()))); '
        'command_line.guard(run)(sys.argv[:1])'
    )
    started = []
    for i in range(2):
        folder = tmp_path / str(i)
        folder.mkdir()
        command = [sys.executable, '-c', code, folder, str(i), f'127.0.0.1:{port}']
        started.append(
            subprocess.Popen(
                command,
                env=_environment(1) | {'PYTHONPATH': str(ROOT)},
                stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip
        )
    for process in started:
        output = process.communicate(timeout=60)[1]
        assert process.returncode == 2, output
        assert (
            'processes [1] do not see' in output and 'that all of them share' in output
        )


@pytest.mark.parametrize(
    'environment, several',
    [
        ({}, False),
        ({'SLURM_JOB_ID': '1', 'SLURM_STEP_NUM_TASKS': '1'}, False),
        # Variables of a job, not of a step: the shell of `salloc --ntasks=8`.
        ({'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '8'}, False),
        ({'SLURM_STEP_NUM_TASKS': '8'}, True),
        ({'OMPI_COMM_WORLD_SIZE': '2'}, True),
        ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
        ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True),
        ({'MEGASCALE_COORDINATOR_ADDRESS': 'a'}, True),
    ],
)
def test_environments(environment, several):
    assert distributed.shows_processes(environment) == several


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(coordinator='a:1'), '--num_processes and --process_id missing'),
        (
            dict(kind='off', coordinator='a:1', num_processes=2, process_id=0),
            'give either --distributed=off or --coordinator',
        ),
        (
            dict(coordinator='a', num_processes=2, process_id=0),
            "--coordinator 'a' must be HOST:PORT",
        ),
        (
            dict(coordinator='a:1', num_processes=2, process_id=2),
            r'--process_id 2 must be in 0 .. 1',
        ),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        distributed.start(**options)


def test_no_cluster(monkeypatch):
    def initialize(**options):
        raise ValueError('coordinator_address should be defined.')

    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    with pytest.raises(ValueError, match='--distributed=on, but JAX finds no cluster'):
        distributed.start('on')


def test_a_single_process_starts_nothing():
    distributed.start()
    assert not jax.distributed.is_initialized()
    assert distributed.first(lambda: [1, 'a']) == [1, 'a']
    with pytest.raises(ValueError, match='as it was raised'):
        distributed.first(lambda: _raise(ValueError('as it was raised')))


def _raise(error):
    raise error
