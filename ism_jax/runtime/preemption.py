"""Signals to stop: the run finishes its step, saves, and exits with its own code.

Cluster managers send SIGTERM before they take a machine away; SIGINT is Ctrl-C. After
the first signal the current step is finished and saved; a second one ends the process
at once. With several processes, JAX's preemption service receives SIGTERM and makes all
of them stop after the same step.
"""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

# sysexits.h's EX_TEMPFAIL, "try again": the same command resumes the run.
EXIT_CODE = 75
# The exit code that shells report for a program ended by Ctrl-C.
INTERRUPTED_EXIT_CODE = 130


class Preempted(RuntimeError):
    """A signal requested a stop, and the run has saved.

    Attributes:
      exit_code: exit code of the process.
    """

    def __init__(self, message: str, exit_code: int = EXIT_CODE):
        super().__init__(message)
        self.exit_code = exit_code


class Requests:
    """Handles signals to stop inside a `with` block, then restores the handlers."""

    def __init__(self):
        self._signal = None
        self._at_once = False
        self._previous = {}

    def __enter__(self):
        # Python handles signals in the main thread only.
        if threading.current_thread() is not threading.main_thread():
            return self
        if jax.process_count() == 1:
            kinds = [signal.SIGINT, signal.SIGTERM]
            self._previous = {k: signal.signal(k, self._notice) for k in kinds}
        else:
            # JAX's service handles only SIGTERM, so Ctrl-C becomes SIGTERM.
            pass_on = lambda number, frame: os.kill(os.getpid(), signal.SIGTERM)
            self._previous = {signal.SIGINT: signal.signal(signal.SIGINT, pass_on)}
        return self

    def __exit__(self, *error):
        for kind, handler in self._previous.items():
            signal.signal(kind, handler)
        self._previous = {}

    def stop_after(self, step: int) -> bool:
        """Whether to stop after this step, the same in all processes.

        Every process must call it at every step.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(
            step
        ):
            return True
        return self._signal is not None

    def nothing_to_save(self) -> None:
        """From here on a signal ends the run at once, because everything is saved.

        Raises:
          Preempted: at once if a signal has arrived, or when one arrives.
        """
        self._at_once = True
        if self._signal is not None:
            raise self.error('everything was already saved')

    def error(self, what: str) -> Preempted:
        """The exception to raise; `what` states what is saved."""
        name = 'SIGTERM' if self._signal is None else self._signal.name
        code = EXIT_CODE
        if self._signal == signal.SIGINT:
            code = INTERRUPTED_EXIT_CODE
        return Preempted(
            f'stopped by {name}; {what}, and the same command resumes the run', code
        )

    def _notice(self, number, frame):
        del frame
        if self._signal is not None:
            # The second signal has its usual effect.
            before = self._previous[number]
            ignored = before in (None, signal.SIG_IGN)
            signal.signal(number, signal.SIG_DFL if ignored else before)
            signal.raise_signal(number)
            return
        self._signal = signal.Signals(number)
        if self._at_once:
            raise self.error('everything was already saved')
