"""The training loop: parts and functions in, the trained state out."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from absl import logging
import jax
import numpy as np

from ism_jax.data.pool_loader import PoolLoader
from ism_jax.runtime import distributed, files, paths
from ism_jax.runtime.preemption import Requests
from ism_jax.runtime.watchdog import Watchdog
from ism_jax.sampling import sample_table
from ism_jax.training.checkpoint import Checkpointer
from ism_jax.training.paired_pool import Pool
from ism_jax.training.profiler import Profiler
from ism_jax.training.progress import Progress
from ism_jax.training.train_state import TrainState
from ism_jax.training.train_step import state_metrics

# Batches of skipped steps that are kept, in addition to the one that ends a run.
MAX_KEPT_BATCHES = 5


class NonFiniteError(RuntimeError):
    """Training stopped, because too many steps in a row were not finite."""


@dataclasses.dataclass(frozen=True)
class Intervals:
    """When to log, save and draw, in training steps.

    Attributes:
      end: the last step.
      log, checkpoint, grid: their intervals in steps; `grid` 0 for none.
    """

    end: int
    log: int
    checkpoint: int
    grid: int

    def is_due(self, name: str, step: int) -> bool:
        """Whether `name` is due after `step` steps; the last step logs and saves."""
        every = getattr(self, name)
        return bool(every) and (
            step % every == 0 or (step == self.end and name != 'grid')
        )


def run(
    state: TrainState,
    *,
    train_step: Callable[[TrainState, Pool, jax.Array], tuple[TrainState, dict]],
    seed_key: jax.Array,
    next_pool: Callable[[], tuple[Pool, dict]],
    intervals: Intervals,
    progress: Progress,
    loader: PoolLoader,
    save: Callable[..., Any],
    draw_grids: Callable[[TrainState], Any],
    requests: Requests,
    watchdog: Watchdog,
    profiler: Profiler,
    max_skipped_in_row: int,
    workdir: paths.Path,
) -> TrainState:
    """Trains from `state.step` to `intervals.end`.

    Args:
      state: the initial state; it is donated.
      train_step: see `train_step.train_step`, compiled.
      seed_key: the run's key.
      next_pool: returns the pool of the next step, and the coupling's report.
      intervals: when to log, save and draw.
      progress: reports and records.
      loader: loader of the pools; its skipped images and retries are reported.
      save: saves a state; `save(state, hurry=True)` before a requested stop.
      draw_grids: draws samples of a state.
      requests: requests to stop, from signals.
      watchdog: reports a step that hangs.
      profiler: traces some of the steps.
      max_skipped_in_row: non-finite steps in a row that end the run.
      workdir: where the batches of skipped steps are kept.

    Raises:
      NonFiniteError: too many steps in a row were not finite.
      preemption.Preempted: a signal requested a stop; the last step is saved.
    """
    check = functools.partial(
        stop_if_not_finite, max_skipped_in_row=max_skipped_in_row, workdir=workdir
    )
    pool, previous, coupling, reported = None, None, {}, set()
    for step in range(int(state.step), intervals.end):
        watchdog.step()
        with profiler.step(step):
            if pool is None or step % loader.batches == 0:
                pool, coupling = next_pool()
            state, metrics = train_step(state, pool, seed_key)
        profiler.stop_after(step, metrics)
        progress.step(metrics)
        # Step n-1 is checked while step n runs, so that the device never waits.
        if previous is not None:
            check(*previous)
        previous = step, metrics, pool
        done = step + 1
        if intervals.is_due('log', done):
            progress.log(done, coupling | data_counts(loader) | state_metrics(state))
            report_skipped(loader.source, reported, progress)
        if requests.stop_after(done):
            watchdog.stop()
            progress.log(done, coupling)
            progress.show(f'stop requested: saving step {done}')
            save(state, hurry=True)
            raise requests.error(f'step {done} is saved')
        if intervals.is_due('checkpoint', done):
            progress.log(done, coupling)
        with progress.paused():
            if intervals.is_due('grid', done):
                draw_grids(state)
            if intervals.is_due('checkpoint', done):
                save(state)
    watchdog.stop()
    if previous is not None:
        check(*previous)
    return state


def data_counts(loader: PoolLoader) -> dict[str, float]:
    """Scalars of the data pipeline, by name."""
    return {
        'data/skipped_images': float(loader.skipped),
        'data/retries': float(loader.retries),
    }


def report_skipped(source, reported: set[str], progress: Progress) -> None:
    """Prints each skipped image that is not in `reported`, and adds it."""
    for name in source.skipped.reasons.keys() - reported:
        reported.add(name)
        progress.show(f'skipped: {source.skipped.reasons[name]}')


def stop_if_not_finite(
    step: int, metrics, pool: Pool, *, max_skipped_in_row: int, workdir: paths.Path
) -> None:
    """Keeps the batch of a skipped step; stops after too many in a row.

    Raises:
      NonFiniteError: `max_skipped_in_row` steps in a row were not finite.
    """
    in_row = int(metrics['skipped_in_row'])
    if not in_row:
        return
    logging.warning('step %d was not finite and is skipped (%d in a row)', step, in_row)
    last = in_row >= max_skipped_in_row
    path = workdir / f'non_finite_step_{step:08d}.npz'
    kept = lambda: len(list(workdir.glob('non_finite_*')))
    if last or (in_row == 1 and distributed.first(kept) < MAX_KEPT_BATCHES):
        keep_batch(path, step, metrics, pool)
    if last:
        raise NonFiniteError(
            f'loss or gradient was not finite in {in_row} steps in a row, up to step '
            f'{step}; the batch is in {path}. Use a lower learning rate, clip '
            'gradients at norm 1, or inspect the batch; the last checkpoint is kept'
        )


def keep_batch(path: paths.Path, step: int, metrics, pool: Pool) -> None:
    """Writes the batch of a step; a failure, such as a full disk, only warns."""
    turn = step % pool.labels.shape[0]
    arrays = {'images': pool.data, 'labels': pool.labels}
    arrays |= {'noise_index': pool.noise_index}
    arrays = {name: distributed.to_host(a[turn]) for name, a in arrays.items()}
    if jax.process_index():
        return
    try:
        files.write_npz(
            path,
            **arrays,
            pool=int(pool.number),
            step=step,
            loss=float(metrics['loss']),
            gradient_norm=float(metrics['norm/gradient']),
        )
    except OSError as error:
        logging.warning(
            'the batch of step %d cannot be kept in %s: %s', step, path, error
        )


def save(
    state: TrainState,
    *,
    checkpointer: Checkpointer,
    loader: PoolLoader,
    config: dict,
    make_scorer: Callable[[], Any],
    samples: int,
    progress: Progress,
    hurry: bool = False,
) -> None:
    """Starts saving a state, with the score that ranks its checkpoint.

    Args:
      state: the state after a step.
      checkpointer: saves it.
      loader: its position is saved.
      config: config of the run, JSON-able.
      make_scorer: returns a `SampleScorer`; its classifier trains for a while, so it
        waits until a score is needed.
      samples: number of samples for the score, the Frechet distance in 4 steps without
        guidance; if 0, the score is the mean loss.
      progress: reports the score.
      hurry: skips the score, and returns only when everything is saved.
    """
    score = progress.loss
    if samples and hurry:
        score = float('inf')  # Not compared with others.
    elif samples:
        score = make_scorer()(state.infer, steps=4, guidance=0.0, samples=samples)['fd']
        progress.show(
            f'step {int(state.step)}: Frechet distance in 4 steps {score:.3f}'
        )
    # The loader may be a pool ahead; the position of this step is saved.
    position = loader.get_state() | {'next_pool': int(state.step) // loader.batches}
    checkpointer.save(state, position, config, score)
    if hurry:
        checkpointer.close()


def draw_table(
    state: TrainState,
    *,
    sampler,
    key: jax.Array,
    num_classes: int,
    steps: tuple[int, ...],
    guidance: tuple[float, ...],
    progress: Progress,
) -> None:
    """Records a table of samples of up to ten classes, steps by guidance scale."""
    labels = np.arange(min(num_classes, 10))
    images = sample_table.draw(
        sampler, state.infer, key, labels, schedules=steps, guidance=guidance
    )
    progress.table(images, steps, guidance)


def draw_grids(
    state: TrainState,
    *,
    sampler,
    key: jax.Array,
    num_classes: int,
    steps: tuple[int, ...],
    guidance: float,
    columns: int,
    progress: Progress,
    on_samples: Callable[[int, int, np.ndarray], Any] | None,
) -> None:
    """Records grids of samples from fixed noise, one for each number of steps."""
    labels = np.tile(np.arange(columns) % num_classes, 4)
    for number in steps:
        batches = sampler.batches(
            state.infer, key, labels, guidance=guidance, schedule=number
        )
        images = np.concatenate([np.asarray(images) for images, _ in batches])
        progress.picture(int(state.step), f'samples_{number}_steps', images, columns)
        if on_samples is not None and jax.process_index() == 0:
            on_samples(int(state.step), number, images)
