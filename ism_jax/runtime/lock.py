"""One run per folder: a lock that is released when its process ends."""

import json
import os
from pathlib import Path
import socket
import time

try:
    import fcntl
except ImportError:  # Not on Windows, where nothing is locked.
    fcntl = None

NAME = 'lock'


class Lock:
    """Locks a folder while it is entered.

    The operating system releases the lock however the process ends, so that a killed
    run leaves nothing to clean up.

    Args:
      folder: created if it is missing.

    Raises:
      ValueError: on entry, if another process (which the message names) holds the lock,
        or if the folder cannot be written to.
    """

    def __init__(self, folder):
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
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = _described(self._file.read())
            self._file.close()
            raise ValueError(
                f'{self._path.parent} is used by another run{holder}; wait for it, '
                'stop it, or give another --workdir'
            ) from error
        self._file.truncate(0)
        about = {'pid': os.getpid(), 'host': socket.gethostname()}
        about |= {'since': time.strftime('%Y-%m-%d %H:%M:%S')}
        self._file.write(json.dumps(about))
        self._file.flush()
        return self

    def __exit__(self, *error):
        if self._file is not None:
            self._file.close()  # Unlocks.
            self._file = None


def _described(text: str) -> str:
    try:
        about = json.loads(text)
        return f' (process {about["pid"]} on {about["host"]} since {about["since"]})'
    except (ValueError, KeyError, TypeError):
        return ''  # The holder has not written yet.
