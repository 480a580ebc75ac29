"""Reports a step that does not end, with what every thread is doing."""

import faulthandler
import io
import sys


class Watchdog:
    """Writes the stacks of all threads to standard error when a step takes too long.

    By Python's own faulthandler, which needs nothing of a process that hangs: also one
    that waits in compiled code is reported, again and again. It ends nothing.

    Args:
      seconds: that a step may take; 0 for any. The first step, which compiles, may take
        as long too.
      file: to write to, with a file descriptor; the process's standard error if None.
    """

    def __init__(self, seconds: float, file=None):
        self._seconds = seconds
        self._file = file or sys.__stderr__
        try:
            self._file.fileno()
        except (AttributeError, io.UnsupportedOperation):
            self._seconds = 0  # A notebook's, or none: nowhere to write to.

    def step(self) -> None:
        """A step begins."""
        if self._seconds:
            faulthandler.dump_traceback_later(
                self._seconds, repeat=True, file=self._file
            )

    def stop(self) -> None:
        """No step is to be waited for."""
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
