"""Checkpoints, with Orbax: asynchronous, atomic, the last and the best kept.

A checkpoint has four items: `state` (all that a step changes, but the slow average),
`infer` (the slow average, alone so that sampling reads nothing else), `data` (the
position of the iterator) and `config`; and `checksums.json`. Beside the checkpoints
lies `run.json`: what is needed to sample without the data.
"""

from collections.abc import Callable
import dataclasses
import json
import math
import os
from pathlib import Path
import threading
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ism_jax import config as config_lib
from ism_jax.runtime import checksums, files
from ism_jax.training.train_state import TrainState

# Saves in a row that may fail before the run stops.
MAX_FAILED_SAVES = 3
DAMAGED = 'damaged_checkpoints'


class SaveError(RuntimeError):
    """Checkpoints cannot be saved."""


class Checkpointer:
    """Saves and restores the state of a run.

    A save that fails (a full disk, a folder that cannot be written to) is told and
    tried again at the next; the earlier checkpoints stay. When a checkpoint is whole,
    the checksums of its files are written into it.

    Args:
      workdir: folder of the run.
      keep_last, keep_best: how many checkpoints are kept; the best have the lowest
        `score`.
      show: is told in words what went wrong.
    """

    def __init__(
        self, workdir: str | os.PathLike, *, keep_last: int, keep_best: int,
        show: Callable[[str], Any] = print,
    ):  # fmt: skip
        policies = [checkpoint_managers.LatestN(keep_last)]
        if keep_best:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: -metrics['score'],
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._folder = checkpoint_folder(workdir)
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )
        self._show = show
        self._failures = 0
        self._saving = None
        self._manager = self._open()

    def _open(self):
        return ocp.CheckpointManager(self._folder, options=self._options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, data_state: dict, config, score: float) -> None:
        """Starts saving; the state may be donated as soon as this returns.

        Raises:
          SaveError: it failed, `MAX_FAILED_SAVES` times in a row.
        """
        self._settle()
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(dataclasses.replace(state, infer=None)),
                    infer=ocp.args.StandardSave(state.infer),
                    data=ocp.args.JsonSave(data_state),
                    config=ocp.args.JsonSave(json.loads(config_lib.to_json(config))),
                ),
                # Every comparison with NaN fails; it must not pass for the best.
                metrics={'score': score if math.isfinite(score) else 1e30},
            )
        except Exception as error:  # Orbax's, TensorStore's, the system's.
            self._failed(step, error)
            return
        self._saving = _Sealing(step, self._folder / str(step))

    def _settle(self) -> None:
        """Waits for what is being saved, and for its checksums."""
        if self._saving is None:
            return
        sealing, self._saving = self._saving, None
        try:
            self._manager.wait_until_finished()
            sealing.finish()
            self._failures = 0
        except Exception as error:  # See above.
            sealing.abandon()
            self._failed(sealing.step, error)

    def _failed(self, step: int, error: Exception) -> None:
        self._failures += 1
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        # What is left of the attempt goes, and with it what Orbax believes of it.
        try:
            self._manager.close()
        except Exception:  # pylint: disable=broad-exception-caught
            pass  # It tells of the same failure.
        self._manager = self._open()
        left = self._manager.all_steps()
        self._show(
            f'checkpoint {step} could not be saved ({reason}); '
            + (f'those of {sorted(left)} stay' if left else 'there is none before')
            + ', and the next save tries again'
        )
        if self._failures >= MAX_FAILED_SAVES:
            raise SaveError(
                f'{self._failures} checkpoints in a row could not be saved, the last '
                f'because of: {reason}; make room for them in {self._folder}, then the '
                'same command goes on from the last that is whole'
            ) from error

    def restore(self, state: TrainState) -> tuple[TrainState, dict]:
        """The latest state, on the devices of `state`, and the data's position.

        A checkpoint without checksums (the run was killed before they were written)
        that cannot be restored is set aside, and the one before is taken.
        """
        while True:
            step = self.latest_step()
            try:
                return self._restore(step, state)
            except Exception as error:  # Of many kinds, by what is damaged.
                sealed = checksums.is_written(self._folder / str(step))
                if sealed or len(self._manager.all_steps()) < 2:
                    raise
                self._manager.close()
                _set_aside(self._folder / str(step), str(error), self._show)
                self._manager = self._open()

    def _restore(self, step, state):
        def like(tree):
            return ocp.args.StandardRestore(
                jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
            )

        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=like(dataclasses.replace(state, infer=None)),
                infer=like(state.infer),
                data=ocp.args.JsonRestore(),
            ),
        )
        return (
            dataclasses.replace(restored['state'], infer=restored['infer']),
            restored['data'],
        )

    def close(self, *, quiet: bool = False) -> None:
        """Waits for what is being saved.

        Args:
          quiet: raises nothing: another error is on its way.

        Raises:
          SaveError: the last checkpoint could not be saved.
        """
        try:
            self._settle()
        except SaveError:
            if not quiet:
                raise
        self._manager.close()
        if self._failures and not quiet:
            raise SaveError(
                f'the last checkpoint could not be saved in {self._folder}, see above; '
                'make room, then the same command goes on from the one before'
            )


class _Sealing:
    """Writes the checksums of a checkpoint as soon as it is whole, in a thread."""

    def __init__(self, step: int, folder: Path):
        self.step = step
        self._folder = folder
        self._given_up = threading.Event()
        self._error = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        # One process sees all files.
        if jax.process_index() == 0:
            self._thread.start()

    def _run(self):
        # Checkpoints are written under another name and renamed when they are whole.
        while not self._folder.is_dir():
            if self._given_up.wait(0.05):
                return
        try:
            checksums.write(self._folder)
        except OSError as error:
            self._error = error

    def finish(self) -> None:
        """Waits for it; the checkpoint is whole."""
        if jax.process_index() == 0:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """There will be no such checkpoint."""
        self._given_up.set()


def set_aside_damaged(workdir, show: Callable[[str], Any] = print) -> None:
    """Moves checkpoints away whose files changed, from the latest to the first good.

    They go to `damaged_checkpoints`; nothing is deleted. To be called before a
    `Checkpointer` is made, by one process.
    """
    for step in reversed(saved_steps(workdir)):
        folder = checkpoint_folder(workdir) / str(step)
        # Without checksums only restoring can tell.
        if not checksums.is_written(folder):
            return
        problems = checksums.problems(folder)
        if not problems:
            return
        _set_aside(folder, problems[0], show)


def _set_aside(folder: Path, reason: str, show) -> None:
    place = folder.parent.with_name(DAMAGED) / folder.name
    number = 0
    while place.exists():
        number += 1
        place = place.with_name(f'{folder.name}.{number}')
    place.parent.mkdir(exist_ok=True)
    folder.rename(place)
    reason = reason.strip().splitlines()[0]
    show(f'checkpoint {folder.name} is damaged ({reason}); it was moved to {place}')


def write_run(workdir, config, source) -> None:
    """Writes `run.json`, whole or not at all."""
    path = Path(workdir) / 'run.json'
    content = {
        'config': json.loads(config_lib.to_json(config)),
        'class_names': list(source.class_names),
        'image_shape': list(source.image_shape),
    }
    files.write_bytes(path, (json.dumps(content, indent=1) + '\n').encode())


def read_run_config(workdir) -> ml_collections.ConfigDict | None:
    """The config that the run in `workdir` was started with, None for a new run."""
    path = Path(workdir) / 'run.json'
    if not path.exists():
        return None
    return config_lib.from_json(json.dumps(json.loads(path.read_text())['config']))


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """Steps of which there is a whole checkpoint, ascending."""
    folder = checkpoint_folder(workdir)
    if not folder.is_dir():
        return []
    # Checkpoints are written under another name and renamed when they are whole.
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def checkpoint_folder(workdir) -> Path:
    return Path(workdir).absolute() / 'checkpoints'
