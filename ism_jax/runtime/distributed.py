"""Several processes: how they start, agree, and end together.

On a TPU pod, in a SLURM step, under Open MPI or on GKE each process learns its number
from the environment; elsewhere flags give it. When a process dies, JAX's coordination
service ends the others within `--heartbeat_seconds`.
"""

from collections.abc import Callable, Mapping
import json
import os
from pathlib import Path
import secrets
import sys
import threading
import time
import traceback
from typing import Any

from absl import flags
import jax
from jax.experimental import multihost_utils
import numpy as np

from ism_jax.runtime import files, paths

KINDS = ('auto', 'on', 'off')
# How long a process that ends with an error waits for others to do the same.
GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.5
# Commands whose processes work independently wait for the slowest at the end.
_SHUTDOWN_SECONDS = 24 * 3600
_FLAGS = ('coordinator', 'num_processes', 'process_id')


def define_flags() -> None:
    """The flags that `start_by_flags` reads."""
    flags.DEFINE_enum(
        'distributed',
        'auto',
        KINDS,
        "'auto' detects several processes (SLURM, Open MPI, GKE); 'on' requires them "
        "and also reads a TPU VM's metadata.",
    )
    flags.DEFINE_string(
        'coordinator', None, 'HOST:PORT of process 0, the same for all.'
    )
    flags.DEFINE_integer('num_processes', None, 'Number of processes.', lower_bound=1)
    flags.DEFINE_integer(
        'process_id', None, 'Number of this process, from 0.', lower_bound=0
    )
    flags.DEFINE_integer(
        'heartbeat_seconds',
        60,
        'Seconds without a heartbeat after which all processes end.',
        lower_bound=5,
    )


def start_by_flags(values) -> None:
    """`start` with the flags of `define_flags`, from `flags.FLAGS`."""
    start(
        values.distributed,
        **{name: getattr(values, name) for name in _FLAGS},
        heartbeat_seconds=values.heartbeat_seconds,
    )


def start(
    kind: str = 'auto',
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int = 60,
) -> None:
    """Joins the other processes, if there are any; called before JAX is used.

    Args:
      kind: one of `KINDS`; see `define_flags`.
      coordinator: 'HOST:PORT' at which the first process listens.
      num_processes, process_id: given together with `coordinator`, or not at all.
      heartbeat_seconds: time without a heartbeat after which a process counts as lost.

    Raises:
      ValueError: settings that contradict each other, or `on` where JAX finds no
        cluster.
      RuntimeError: the others did not join.
    """
    given = dict(zip(_FLAGS, (coordinator, num_processes, process_id), strict=True))
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            f'--{" and --".join(missing)} missing: give --coordinator, --num_processes '
            'and --process_id together, or none of them'
        )
    explicit = not missing
    if explicit:
        if kind == 'off':
            raise ValueError('give either --distributed=off or --coordinator')
        host, _, port = coordinator.rpartition(':')
        if not host or not port.isdecimal():
            raise ValueError(
                f'--coordinator {coordinator!r} must be HOST:PORT, such as 10.0.0.1:900'
            )
        if process_id >= num_processes:
            raise ValueError(
                f'--process_id {process_id} must be in 0 .. {num_processes - 1} '
                '(--num_processes - 1)'
            )
    elif kind == 'off' or (kind == 'auto' and not shows_processes(os.environ)):
        return
    # The service that notifies all processes when one is about to be preempted.
    jax.config.update('jax_enable_preemption_service', True)
    options = dict(
        coordinator_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        heartbeat_timeout_seconds=heartbeat_seconds,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
    if explicit:
        # All devices of the process, on any cluster.
        options['cluster_detection_method'] = 'deactivate'
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        raise ValueError(
            f'--distributed={kind}, but JAX finds no cluster here ({error}); give '
            '--coordinator, --num_processes and --process_id'
        ) from error


def shows_processes(environment: Mapping[str, str]) -> bool:
    """Whether environment variables describe more than one process."""
    counts = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
    many = any(int(environment.get(name) or 1) > 1 for name in counts)
    # Set by GKE. Multislice jobs with one host per slice set only the coordinator.
    hosts = environment.get('TPU_WORKER_HOSTNAMES', '').split(',')
    return many or len(hosts) > 1 or 'MEGASCALE_COORDINATOR_ADDRESS' in environment


def first(make: Callable[[], Any]) -> Any:
    """Returns the first process's `make()` in all processes; all must call this.

    Args:
      make: returns a JSON-able value.

    Raises:
      ValueError: in all processes, if it is raised in the first.
    """
    if jax.process_count() == 1:
        return make()
    sent = {}
    if jax.process_index() == 0:
        try:
            sent['value'] = make()
        except ValueError as error:
            sent['error'] = str(error)
    content = np.frombuffer(json.dumps(sent).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
    padded = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        padded[:] = content
    sent = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))
    if 'error' in sent:
        raise ValueError(sent['error'])
    return sent['value']


def define_share_flags(what: str) -> None:
    """The flags that `share_by_flags` reads; `what` names what is shared."""
    flags.DEFINE_integer(
        'process_index',
        None,
        f'Which share of the {what} to make; by default that of --process_id. For '
        'processes that are started independently.',
    )
    flags.DEFINE_integer('process_count', None, 'Number of processes with a share.')


def share_by_flags(values) -> dict[str, Any]:
    """Arguments for work that is split among processes.

    Returns:
      `process_index`, `process_count`, and `wait`: whether the first process may wait
      for the others, because they are known to run.

    Raises:
      ValueError: one flag without the other, or an index out of range.
    """
    given = values.process_index, values.process_count
    if given == (None, None):
        index, count = jax.process_index(), jax.process_count()
        return dict(process_index=index, process_count=count, wait=count > 1)
    if None in given or not 0 <= given[0] < given[1]:
        raise ValueError(
            f'--process_index {given[0]} and --process_count {given[1]} must be given '
            'together, and the index must be in 0 .. count - 1'
        )
    return dict(process_index=given[0], process_count=given[1], wait=False)


def check_shared(folder: paths.Path) -> None:
    """Checks that all processes see the same folder.

    Raises:
      ValueError: a process does not see what the first wrote.
    """
    name = first(lambda: f'.shared_{secrets.token_hex(8)}')
    first(lambda: files.write_bytes(folder / name, b''))
    sees = multihost_utils.process_allgather(np.bool_((folder / name).exists()))
    first(lambda: paths.remove_file(folder / name))
    if not np.all(sees):
        raise ValueError(
            f'processes {np.flatnonzero(~np.ravel(sees)).tolist()} do not see the same '
            f'{folder} as the first; give a --workdir on a file system that all of '
            'them share'
        )


def wait_until(done: Callable[[], bool]) -> None:
    """Waits for other processes; when one dies, JAX's service ends the wait."""
    while not done():
        time.sleep(_POLL_SECONDS)


def to_host(array: jax.Array) -> np.ndarray:
    """The whole distributed array, in each process; all must call this."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def leave(code: int) -> None:
    """Ends the process, without waiting for others that may never end.

    If all processes end, as after bad input, they disconnect first.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if not jax.distributed.is_initialized():
        sys.exit(code)
    disconnect = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    disconnect.start()
    disconnect.join(GRACE_SECONDS)
    os._exit(code)


def fail(error: BaseException) -> None:
    """Prints an unexpected error and ends the process."""
    traceback.print_exception(error)
    index, count = jax.process_index(), jax.process_count()
    print(
        f'error: process {index} of {count} stops because of the error above. If that '
        'is a lost connection, another process has died and its own output says why. '
        'All processes end now; what was saved stays, and the same command in all '
        'processes resumes the run',
        file=sys.stderr,
    )
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(1)


def is_raised_by(error: BaseException, package: str) -> bool:
    """Whether an error was raised by code in a folder, not by code that it calls."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return Path(frame.tb_frame.f_code.co_filename).is_relative_to(package)
