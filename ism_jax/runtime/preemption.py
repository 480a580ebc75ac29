"""Stopping when asked to: a run that gets a signal saves and says so by its exit code.

SIGTERM is what cluster managers send before they take a machine away, SIGINT is Ctrl-C.
The first asks, so that the step that runs is finished and saved; a second ends the
process at once. In several processes JAX's own service sees SIGTERM and lets all agree
on the step after which they stop.
"""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

# sysexits.h's EX_TEMPFAIL, "try again": nothing is wrong, the same command goes on.
EXIT_CODE = 75
# What a shell reports of a program that Ctrl-C ended.
INTERRUPTED_EXIT_CODE = 130


class Preempted(RuntimeError):
    """The run was asked to stop, and has saved.

    Attributes:
      exit_code: for the process.
    """

    def __init__(self, message: str, exit_code: int = EXIT_CODE):
        super().__init__(message)
        self.exit_code = exit_code


class Requests:
    """Notices requests to stop while it is entered; handlers are given back after."""

    def __init__(self):
        self._signal = None
        self._at_once = False
        self._previous = {}

    def __enter__(self):
        # Elsewhere Python cannot take signals; whoever runs this there sees to it.
        if threading.current_thread() is not threading.main_thread():
            return self
        if jax.process_count() == 1:
            kinds = [signal.SIGINT, signal.SIGTERM]
            self._previous = {k: signal.signal(k, self._notice) for k in kinds}
        else:
            # JAX's service takes SIGTERM, and hears of Ctrl-C by it.
            pass_on = lambda number, frame: os.kill(os.getpid(), signal.SIGTERM)
            self._previous = {signal.SIGINT: signal.signal(signal.SIGINT, pass_on)}
        return self

    def __exit__(self, *error):
        for kind, handler in self._previous.items():
            signal.signal(kind, handler)
        self._previous = {}

    def stop_after(self, step: int) -> bool:
        """Whether to stop after this step; all processes get the same answer.

        Every process must ask at every step.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(
            step
        ):
            return True
        return self._signal is not None

    def nothing_to_save(self) -> None:
        """From here on a request ends the run at once: all is saved.

        Raises:
          Preempted: now, or whenever a signal comes.
        """
        self._at_once = True
        if self._signal is not None:
            raise self.error('everything was saved before')

    def error(self, what: str) -> Preempted:
        """What to raise, when `what` has been done."""
        name = 'SIGTERM' if self._signal is None else self._signal.name
        code = EXIT_CODE
        if self._signal == signal.SIGINT:
            code = INTERRUPTED_EXIT_CODE
        return Preempted(
            f'stopped by {name}; {what}, and the same command goes on', code
        )

    def _notice(self, number, frame):
        del frame
        if self._signal is not None:
            # The second: as if nobody listened, or had asked not to be told.
            before = self._previous[number]
            ignored = before in (None, signal.SIG_IGN)
            signal.signal(number, signal.SIG_DFL if ignored else before)
            signal.raise_signal(number)
            return
        self._signal = signal.Signals(number)
        if self._at_once:
            raise self.error('everything was saved before')
