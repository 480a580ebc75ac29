"""Orbax checkpoints: asynchronous and atomic; the last and the best are kept.

A checkpoint has `checksums.json` and four items: `state` (all that a step changes
except the inference EMA), `infer` (only the inference EMA, so that sampling reads
nothing else), `data` (the position of the iterator) and `config`. `run.json`, next to
the checkpoints, holds everything else that sampling needs.
"""

from collections.abc import Callable
import dataclasses
import json
import math
import os
import threading
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ism_jax.runtime import checksums, files, paths
from ism_jax.training.train_state import TrainState

# Saves in a row that may fail before the run stops.
MAX_FAILED_SAVES = 3
DAMAGED = 'damaged_checkpoints'
# The object that Orbax writes last into a checkpoint in a bucket.
COMMITTED = 'commit_success.txt'
# Between looks for a complete checkpoint: on disk, in a bucket.
_POLL_SECONDS = 0.05, 1.0


class SaveError(RuntimeError):
    """Checkpoints cannot be saved."""


class Checkpointer:
    """Saves and restores the state of a run.

    A save that fails (a full disk, a read-only folder) is reported, and the next save
    tries again; the earlier checkpoints stay. When a checkpoint is complete, the
    checksums of its files are written into it.

    Args:
      workdir: folder of the run.
      keep_last, keep_best: how many checkpoints are kept; the best have the lowest
        `score`.
      log: called with a line of text about each failure.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        keep_last: int,
        keep_best: int,
        log: Callable[[str], Any] = print,
    ):
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
            # Without these, Orbax does not write the scores, and a run that is resumed
            # does not know its best checkpoint.
            best_fn=lambda metrics: metrics['score'],
            best_mode='min',
            cleanup_tmp_directories=True,
        )
        self._log = log
        self._failures = 0
        self._saving = None
        self._manager = self._open()

    def _open(self):
        return ocp.CheckpointManager(self._folder, options=self._options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(
        self, state: TrainState, data_state: dict, config: dict, score: float
    ) -> None:
        """Starts saving; the state may be donated as soon as this returns.

        Args:
          state: the whole train state.
          data_state, config: state of the iterator and config of the run, JSON-able.
          score: lower is better; NaN never counts as the best.

        Raises:
          SaveError: saving failed, `MAX_FAILED_SAVES` times in a row.
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
                    config=ocp.args.JsonSave(config),
                ),
                # Comparisons with NaN are false, so NaN could pass for the best.
                metrics={'score': score if math.isfinite(score) else 1e30},
            )
        except Exception as error:  # Of Orbax, TensorStore or the system.
            self._failed(step, error)
            return
        self._saving = _Sealing(step, self._folder / str(step))

    def _settle(self) -> None:
        """Waits for the save that is running, and for its checksums."""
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
        # Reopening removes what is left of the attempt, on disk and in Orbax.
        try:
            self._manager.close()
        except Exception:  # pylint: disable=broad-exception-caught
            pass  # It reports the same failure.
        try:
            self._manager = self._open()
        except Exception as failure:  # A bucket that does not answer.
            raise SaveError(
                f'checkpoint {step} could not be saved ({reason}), and {self._folder} '
                'cannot be read; the same command resumes from the last complete one'
            ) from failure
        left = self._manager.all_steps()
        self._log(
            f'checkpoint {step} could not be saved ({reason}); '
            + (f'checkpoints {sorted(left)} remain' if left else 'there is none so far')
            + ', and the next save tries again'
        )
        if self._failures >= MAX_FAILED_SAVES:
            raise SaveError(
                f'{self._failures} checkpoints in a row could not be saved, the last '
                f'because of: {reason}; make room for them in {self._folder}, then the '
                'same command resumes from the last complete one'
            ) from error

    def restore(self, state: TrainState) -> tuple[TrainState, dict]:
        """The latest state, on the devices of `state`, and the iterator's position.

        A checkpoint without checksums (the run was killed before they were written)
        that cannot be restored is set aside, and the one before is used.
        """
        while True:
            step = self.latest_step()
            try:
                return self._restore(step, state)
            except Exception as error:  # Its type depends on what is damaged.
                sealed = checksums.is_written(self._folder / str(step))
                if sealed or len(self._manager.all_steps()) < 2:
                    raise
                self._manager.close()
                _set_aside(self._folder / str(step), str(error), self._log)
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

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        # If a process is lost, a save by several processes may never end.
        if error is None or jax.process_count() == 1:
            self.close(quiet=error is not None)

    def close(self, *, quiet: bool = False) -> None:
        """Waits for the save that is running.

        Args:
          quiet: raises nothing, because another error is being raised.

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
                'make room, then the same command resumes from the one before'
            )


class _Sealing:
    """Writes the checksums of a checkpoint in a thread, once it is complete."""

    def __init__(self, step: int, folder: paths.Path):
        self.step = step
        self._folder = folder
        self._given_up = threading.Event()
        self._error = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        # One process reads all files.
        if jax.process_index() == 0:
            self._thread.start()

    def _run(self):
        pause = _POLL_SECONDS[paths.is_bucket(self._folder)]
        try:
            while not _is_complete(self._folder):
                if self._given_up.wait(pause):
                    return
            checksums.write(self._folder)
        except OSError as error:
            self._error = error

    def finish(self) -> None:
        """Waits for the checksums of a complete checkpoint."""
        if jax.process_index() == 0:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Gives up, because the save failed."""
        self._given_up.set()


def set_aside_damaged(workdir, log: Callable[[str], Any] = print) -> None:
    """Moves damaged checkpoints away, from the latest back to the first good one.

    They go to `damaged_checkpoints`; nothing is deleted. Only one process calls this,
    before it makes a `Checkpointer`.
    """
    for step in reversed(saved_steps(workdir)):
        folder = checkpoint_folder(workdir) / str(step)
        # Without checksums, only restoring reveals damage.
        if not checksums.is_written(folder):
            return
        problems = checksums.problems(folder)
        if not problems:
            return
        _set_aside(folder, problems[0], log)


def _is_complete(folder: paths.Path) -> bool:
    """Whether Orbax has finished a checkpoint.

    On disk it writes under another name and renames a complete checkpoint; in a bucket,
    where nothing can be renamed, it writes `COMMITTED` last.
    """
    if paths.is_bucket(folder):
        with paths.errors(folder):
            return (folder / COMMITTED).exists()
    return folder.is_dir()


def _set_aside(folder: paths.Path, reason: str, log) -> None:
    parent = folder.parent.parent / DAMAGED
    target, number = parent / folder.name, 0
    while target.exists():
        number += 1
        target = parent / f'{folder.name}.{number}'
    paths.move_folder(folder, target, first=[COMMITTED])
    reason = reason.strip().splitlines()[0]
    log(f'checkpoint {folder.name} is damaged ({reason}); it was moved to {target}')


def write_run(workdir, config: dict, source) -> None:
    """Writes `run.json` atomically: the config, class names and image shape."""
    content = {
        'config': config,
        'class_names': list(source.class_names),
        'image_shape': list(source.image_shape),
    }
    files.write_json(paths.to_path(workdir) / 'run.json', content)


def read_run(workdir) -> dict | None:
    """The content of `run.json`; None if there is no run."""
    path = paths.to_path(workdir) / 'run.json'
    return json.loads(paths.read_bytes(path)) if path.exists() else None


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    folder = checkpoint_folder(workdir)
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir()]
    steps = [int(name) for name in names if name.isdigit()]
    return sorted(step for step in steps if _is_complete(folder / str(step)))


def checkpoint_folder(workdir) -> paths.Path:
    """Where the checkpoints of a run are."""
    return paths.absolute(workdir) / 'checkpoints'


def restore_trees(workdir, step: int, trees: dict[str, Any]) -> dict[str, Any]:
    """Some parameter trees of a checkpoint, without the optimizer state.

    Args:
      workdir: folder of the run.
      step: step of the checkpoint.
      trees: 'infer', 'params' or 'target' -> shapes with shardings.
    """
    state = {name: tree for name, tree in trees.items() if name != 'infer'}
    items = {}
    if 'infer' in trees:
        items['infer'] = ocp.args.StandardRestore(trees['infer'])
    if state:
        items['state'] = ocp.args.PyTreeRestore(
            item=state,
            restore_args=ocp.checkpoint_utils.construct_restore_args(state),
            partial_restore=True,
        )
    with ocp.CheckpointManager(checkpoint_folder(workdir)) as manager:
        restored = manager.restore(step, args=ocp.args.Composite(**items))
    return {
        name: restored['infer'] if name == 'infer' else restored['state'][name]
        for name in trees
    }
