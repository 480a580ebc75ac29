"""Several processes: how they find each other, agree, and end together.

On a TPU pod, in a SLURM step or under Open MPI each process learns from its
surroundings who it is; elsewhere flags say so. A process that dies takes the others
with it: JAX's service misses its heartbeat and ends them, at the latest after
`--heartbeat_seconds`.
"""

from collections.abc import Callable, Mapping
import json
import os
from pathlib import Path
import sys
import threading
import time
import traceback
from typing import Any

from absl import flags
import jax
from jax.experimental import multihost_utils
import numpy as np

KINDS = ('auto', 'on', 'off')
# How long a process that ends with an error waits for others that do so too.
GRACE_SECONDS = 5.0
_LOOK_AGAIN_SECONDS = 0.5
# Commands whose processes work alone wait for the slowest at the end.
_SHUTDOWN_SECONDS = 24 * 3600
_FLAGS = ('coordinator', 'num_processes', 'process_id')


def define_flags() -> None:
    """The flags that `start_by_flags` reads."""
    flags.DEFINE_enum(
        'distributed',
        'auto',
        KINDS,
        "Several processes: 'auto' starts so where the environment shows them (SLURM, "
        "Open MPI, GKE); 'on' insists and also asks a TPU VM's metadata.",
    )
    flags.DEFINE_string(
        'coordinator', None, 'HOST:PORT of process 0, the same for all.'
    )
    flags.DEFINE_integer('num_processes', None, 'How many there are.', lower_bound=1)
    flags.DEFINE_integer('process_id', None, 'Which this is, from 0.', lower_bound=0)
    flags.DEFINE_integer(
        'heartbeat_seconds', 60, 'A process silent for so long ends all.', lower_bound=5
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
    """Joins the other processes, if there are any. To be called before JAX is used.

    Args:
      kind: of `KINDS`; see `define_flags`.
      coordinator: 'HOST:PORT' at which the first process listens.
      num_processes, process_id: how many there are, and which this is. These three are
        given together or not at all.
      heartbeat_seconds: when a process that is silent counts as dead.

    Raises:
      ValueError: settings that contradict each other, or `on` where JAX finds no
        cluster.
      RuntimeError: the others did not come.
    """
    given = dict(zip(_FLAGS, (coordinator, num_processes, process_id)))
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            f'--{" and --".join(missing)} missing: give --coordinator, --num_processes '
            'and --process_id together, or none of them'
        )
    explicit = not missing
    if explicit:
        if kind == 'off':
            raise ValueError('--distributed=off and --coordinator contradict; drop one')
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
    # Which tells all of them when one is about to be taken away.
    jax.config.update('jax_enable_preemption_service', True)
    options = dict(
        coordinator_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        heartbeat_timeout_seconds=heartbeat_seconds,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
    if explicit:
        # All devices that the process sees, whatever cluster it may run on.
        options['cluster_detection_method'] = 'deactivate'
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        raise ValueError(
            f'--distributed={kind}, but JAX finds no cluster here ({error}); give '
            '--coordinator, --num_processes and --process_id'
        ) from error


def shows_processes(environment: Mapping[str, str]) -> bool:
    """Whether environment variables tell of more than one process."""
    counts = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
    many = any(int(environment.get(name) or 1) > 1 for name in counts)
    # Of GKE; multislice jobs of one host each have the coordinator alone.
    hosts = environment.get('TPU_WORKER_HOSTNAMES', '').split(',')
    return many or len(hosts) > 1 or 'MEGASCALE_COORDINATOR_ADDRESS' in environment


def first(make: Callable[[], Any]) -> Any:
    """What `make` returns in the first process, for all of them; they must all call.

    Args:
      make: returns something that JSON can hold.

    Raises:
      ValueError: in all, where it is raised in the first.
    """
    if jax.process_count() == 1:
        return make()
    told = {}
    if jax.process_index() == 0:
        try:
            told['value'] = make()
        except ValueError as error:
            told['error'] = str(error)
    content = np.frombuffer(json.dumps(told).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
    padded = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        padded[:] = content
    told = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))
    if 'error' in told:
        raise ValueError(told['error'])
    return told['value']


def define_share_flags(what: str) -> None:
    """The flags that `share_by_flags` reads; `what` is shared."""
    flags.DEFINE_integer(
        'process_index',
        None,
        f'Which share of the {what} to make; by default that of --process_id. For '
        'processes that do not know each other.',
    )
    flags.DEFINE_integer('process_count', None, 'How many processes share them.')


def share_by_flags(values) -> dict[str, Any]:
    """Arguments of work that processes share, each on its own devices.

    Returns:
      `process_index`, `process_count`, and `wait`: whether the first may wait for what
      the others make, because they are known to be at work.

    Raises:
      ValueError: one flag without the other.
    """
    given = values.process_index, values.process_count
    if given == (None, None):
        index, count = jax.process_index(), jax.process_count()
        return dict(process_index=index, process_count=count, wait=count > 1)
    if None in given:
        raise ValueError('give --process_index and --process_count together')
    return dict(process_index=given[0], process_count=given[1], wait=False)


def wait_until(done: Callable[[], bool]) -> None:
    """Waits for what other processes do; when one dies, JAX's service ends the wait."""
    while not done():
        time.sleep(_LOOK_AGAIN_SECONDS)


def to_host(array: jax.Array) -> np.ndarray:
    """An array that is spread over processes, in each; they must all call."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def leave(code: int) -> None:
    """Ends the process, without waiting for others that may never come.

    Where others end too, as after a bad input that all have read, they part in peace.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if not jax.distributed.is_initialized():
        sys.exit(code)
    parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    parting.start()
    parting.join(GRACE_SECONDS)
    os._exit(code)


def fail(error: BaseException) -> None:
    """Ends the process after an error that nobody expected, telling of it."""
    traceback.print_exception(error)
    index, count = jax.process_index(), jax.process_count()
    print(
        f'error: process {index} of {count} stops because of the error above; where '
        'that tells of a lost connection, another process has died and its own output '
        'says why. All end now, what was saved stays, and the same command in all '
        'processes goes on',
        file=sys.stderr,
    )
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(1)


def is_told_by(error: BaseException, package: str) -> bool:
    """Whether an error was raised by code of a folder, not by what that calls."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return Path(frame.tb_frame.f_code.co_filename).is_relative_to(package)
