"""Reports on a run: a progress bar or lines of text, its writers, and image grids."""

from collections.abc import Sequence
import contextlib
from pathlib import Path
import shlex
import sys
import time
from typing import Any

from clu import parameter_overview
import jax
import numpy as np
import tqdm

from ism_jax.data import pixels
from ism_jax.runtime import paths
from ism_jax.sampling import image_grid, sample_table


class Progress:
    """Reports and records a run; silent on all processes but the first.

    Args:
      workdir: pictures go to `workdir/grids`.
      writers: record scalars and pictures; see `training.writers`.
      batch_size: images per step.
      num_steps: number of training steps.
      first_step: step from which this process trains.

    Attributes:
      loss: mean loss of the last log.
    """

    def __init__(
        self,
        workdir,
        writers: Sequence[Any],
        *,
        batch_size: int,
        num_steps: int,
        first_step: int,
    ):
        self._workdir = paths.to_path(workdir)
        self._writers = writers
        self._batch_size = batch_size
        self._num_steps = num_steps
        self._writes = jax.process_index() == 0
        self._pending = []
        self._timer = (time.time(), first_step)
        self._failed = False
        self.loss = float('nan')
        if not self._writes:
            return
        # A bar on a terminal; in a file one line per log.
        self._bar = tqdm.tqdm(
            total=num_steps,
            initial=first_step,
            unit='step',
            disable=None,
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def show(self, text: str) -> None:
        """Prints without breaking the bar."""
        if self._writes:
            tqdm.tqdm.write(text)

    def step(self, metrics: dict) -> None:
        """Takes a step's metrics, which may not be computed yet."""
        self._pending.append(metrics)
        if self._writes:
            self._bar.update()

    def log(self, step: int, extra: dict[str, float]) -> None:
        """Writes the means since the last log; blocks until they are computed."""
        if not self._pending:
            return
        values = jax.device_get(self._pending)
        self._pending = []
        # Counts are not averaged.
        means = {name: float(np.mean([v[name] for v in values])) for name in values[0]}
        means |= {n: float(values[-1][n]) for n in means if n.startswith('skipped')}
        self.loss = means['loss']
        then, last = self._timer
        speed = (step - last) * self._batch_size / max(time.time() - then, 1e-9)
        self._timer = (time.time(), step)
        if not self._writes:
            return
        scalars = means | extra | {'images_per_second': speed}
        scalars = {name: float(value) for name, value in scalars.items()}
        for writer in self._writers:
            self._record(writer.scalars, step, scalars)
        text = f'loss {self.loss:.4f}'
        if means['skipped']:
            text += f', {means["skipped"]:.0f} skipped'
        self._bar.set_postfix_str(f'{text}, {speed:.0f} images/s')
        if self._bar.disable:
            left = (self._num_steps - step) * self._batch_size / max(speed, 1e-9)
            print(
                f'step {step}/{self._num_steps}  {text}  {speed:.0f} images/s  '
                f'{left / 60:.1f} min left',
                flush=True,
            )

    @contextlib.contextmanager
    def paused(self):
        """Excludes the time of a `with` block from images/s."""
        started = time.time()
        yield
        then, step = self._timer
        self._timer = (then + time.time() - started, step)

    def picture(self, step: int, name: str, images: np.ndarray, columns: int) -> None:
        """Writes a grid of images in [-1, 1], [N, H, W, C]; latents are left out."""
        if not self._writes or images.shape[-1] not in (1, 3):
            return
        picture = image_grid.grid(
            # Images of a diverged network are informative too.
            np.nan_to_num(images),
            columns,
            scale=image_grid.readable_scale(images.shape[1]),
        )
        path = self._workdir / 'grids' / f'{name}_{step:08d}.png'
        self._record(image_grid.write_png, path, picture, {'step': str(step)})
        for writer in self._writers:
            self._record(writer.picture, step, name, picture)

    def table(self, images: np.ndarray, steps, guidance) -> None:
        """Writes `samples.png`, a table from `sample_table.draw`, unless latents."""
        if not self._writes or images.shape[-1] not in (1, 3):
            return
        images = pixels.to_uint8(np.nan_to_num(images))
        picture = sample_table.picture(images, steps, guidance)
        self._record(image_grid.write_png, self._workdir / 'samples.png', picture)

    def close(self) -> None:
        """Closes the bar and the writers."""
        if self._writes:
            self._bar.close()
        for writer in self._writers:
            self._record(writer.close)

    def _record(self, write, *arguments) -> None:
        """Calls `write`; a failure warns once and does not stop training."""
        try:
            write(*arguments)
        except Exception as error:  # Trackers raise any type.
            if not self._failed:
                self.show(f'records and pictures cannot be written: {error}')
            self._failed = True


def parameter_table(params) -> str:
    """All parameters with their shapes and, on several devices, shardings, as text."""
    several = len(jax.tree.leaves(params)[0].sharding.device_set) > 1
    return parameter_overview.get_parameter_overview(
        params, include_stats='sharding' if several else False
    )


# What a run writes to its folder, and what it is.
WRITTEN = {
    'samples.png': 'samples by number of steps and guidance scale',
    'scores.json': 'scores of such samples',
    'grids': 'samples during training',
    'tensorboard': 'losses and speed during training',
    'checkpoints': 'the network',
}
NEXT_COMMANDS = (
    'sample --workdir {} --steps 1,4 --labels 0-9 --out samples',
    'evaluate --workdir {}',
    'diagnose --workdir {}',
)


def closing_text(workdir: paths.Path) -> str:
    """Says what a finished run has written, and what to do with it."""
    python = Path(sys.executable)
    # The interpreter of a local environment, which need not be activated.
    inside = python.is_relative_to(Path.cwd())
    python = python.relative_to(Path.cwd()) if inside else 'python'
    quoted = shlex.quote(str(workdir))
    lines = [
        f'{workdir} now holds:',
        *(f'  {n:12} {what}' for n, what in WRITTEN.items() if (workdir / n).exists()),
        'next:',
        *(f'  {python} -m ism_jax.{rest.format(quoted)}' for rest in NEXT_COMMANDS),
    ]
    return '\n'.join(lines)
