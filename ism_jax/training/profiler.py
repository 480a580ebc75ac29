"""Traces of training steps, for xprof and TensorBoard's profile plugin."""

import contextlib
import pathlib
import re
import shutil
import tempfile

import jax

from ism_jax.runtime import paths

STEP_NAME = 'train'  # The name that xprof's documentation gives steps.


class Profiler:
    """Writes one trace of some training steps, each with its number.

    Args:
      folder: the trace is written below it, in `plugins/profile`; a bucket gets it when
        it is complete.
      text: 'FROM:TO' for the steps after step FROM, up to step TO, as logs count them;
        '' for none. The steps before the one at which a run resumes are left out.
      num_steps: number of training steps.

    Raises:
      ValueError: not two numbers with 0 <= FROM < TO <= `num_steps`.
    """

    def __init__(self, folder: paths.Path, text: str, num_steps: int):
        self._folder = folder
        self._running = False
        match = re.fullmatch(r'(\d+):(\d+)', text)
        first, last = map(int, match.groups()) if match else (0, 0)
        if text and not first < last <= num_steps:
            raise ValueError(
                f'--profile {text} must be FROM:TO, two numbers with 0 <= FROM < TO <= '
                f'{num_steps}, the steps of the run; 20:25 traces steps 21 to 25'
            )
        self._steps = range(first, last)

    def step(self, number: int):
        """Context in which step `number` is dispatched."""
        if number not in self._steps:
            return contextlib.nullcontext()
        if not self._running:
            self._local = self._folder
            if paths.is_bucket(self._folder):
                self._local = pathlib.Path(tempfile.mkdtemp())
            jax.profiler.start_trace(self._local)
            self._running = True
        return jax.profiler.StepTraceAnnotation(STEP_NAME, step_num=number)

    def stop_after(self, number: int, result) -> None:
        """Ends the trace if step `number`, whose arrays are `result`, is the last."""
        if self._running and number + 1 not in self._steps:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes the trace of an interrupted run; nothing if it is written already."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            if paths.is_bucket(self._folder):
                for name in paths.files_below(self._local):
                    paths.upload(self._local / name, self._folder / name)
                shutil.rmtree(self._local)
