"""One run per folder: a lock that is released when its process ends.

In a bucket, which has no locks, a `lease.Lease` takes its place.
"""

import json
import os
from pathlib import Path
import socket
import time

try:
    import fcntl
except ImportError:  # Not on Windows, where nothing is locked.
    fcntl = None

from ism_jax.runtime import lease, paths

NAME = 'lock'


def for_folder(folder: paths.Path):
    """A context manager that holds a folder, on disk or in a bucket."""
    if paths.is_bucket(folder):
        return lease.Lease(folder, _about())
    return Lock(folder)


class Lock:
    """Locks a folder while it is entered.

    The operating system releases the lock however the process ends, so that a killed
    run leaves nothing to clean up.

    Args:
      folder: created if it is missing.
      wait: wait for the process that holds the lock, instead of raising.

    Raises:
      ValueError: on entry, if another process (which the message names) holds the lock,
        or if the folder cannot be written to.
    """

    def __init__(self, folder, *, wait: bool = False):
        self._wait = wait
        self._path = Path(folder) / NAME
        self._file = None

    def __enter__(self):
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, 'a+')
        except OSError as error:
            raise ValueError(
                f'{self._path.parent} cannot be written to ({error}); choose another '
                '--workdir'
            ) from error
        if fcntl is None:
            return self
        try:
            at_once = 0 if self._wait else fcntl.LOCK_NB
            fcntl.flock(self._file, fcntl.LOCK_EX | at_once)
        except BlockingIOError as error:
            self._file.seek(0)
            message = lease.used_message(self._path.parent, self._file.read())
            self._file.close()
            raise ValueError(message) from error
        self._file.truncate(0)
        self._file.write(json.dumps(_about()))
        self._file.flush()
        return self

    def __exit__(self, *error):
        if self._file is not None:
            self._file.close()  # Unlocks.
            self._file = None


def _about() -> dict:
    """This process, for the message to another one."""
    about = {'pid': os.getpid(), 'host': socket.gethostname()}
    return about | {'since': time.strftime('%Y-%m-%d %H:%M:%S')}
