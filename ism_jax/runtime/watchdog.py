"""Reports a step that hangs, with the stacks of all threads."""

import faulthandler
import io
import sys


class Watchdog:
    """Writes the stacks of all threads to standard error when a step takes too long.

    It uses Python's faulthandler, which also works while the process waits in compiled
    code. It reports repeatedly and never ends the process.

    Args:
      seconds: the longest that a step may take, including the first, which compiles; 0
        for no limit.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._file = sys.__stderr__
        try:
            self._file.fileno()
        except (AttributeError, io.UnsupportedOperation):
            self._seconds = 0  # No file descriptor, as in a notebook.

    def step(self) -> None:
        """Starts the clock of a step."""
        if self._seconds:
            faulthandler.dump_traceback_later(
                self._seconds, repeat=True, file=self._file
            )

    def stop(self) -> None:
        """Stops the clock."""
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
