"""Trains a network: `python -m ism_jax.train --config configs/quickstart.py`.

The same command again goes on where the run stopped.

`--config.train.batch_size=128` overrides a field of the config. Its sections are data,
model, objective, wavelet, transport, ema, optimizer, train, mesh, log, checkpoint,
sample and scores; `ism_jax/config.py` lists the fields with what they mean, and
`ism_jax/objectives/` those of each objective. `configs/fashion_mnist.py:runlocal` keeps
the method of a config and shrinks the rest to a minute on a CPU.

`--config.train.init_from=FOLDER` starts a new run from a network that
`ism_jax.convert` wrote, such as a pretrained SiT; a run that goes on ignores it.

`--plan` only tells what the training would need, on `--plan_devices` devices: memory,
operations, hours. It opens no data and needs no such devices.
"""

from collections.abc import Callable
import contextlib
import functools
import io
import os
from pathlib import Path
import secrets
import sys
from typing import Any

from absl import app, flags, logging
import jax
from jax.experimental import multihost_utils
from ml_collections import config_flags
import numpy as np
import tqdm

from ism_jax import config as config_lib
from ism_jax import cost, experiment
from ism_jax.data import sources
from ism_jax.evaluation.sample_scorer import SampleScorer, score_settings
from ism_jax.interchange import exported_network
from ism_jax.method import random_streams, time_grid
from ism_jax.models import sit
from ism_jax.runtime import (
    command_line,
    distributed,
    files,
    lock,
    preemption,
    sharding,
    watchdog,
)
from ism_jax.training import checkpoint, paired_pool, progress, train_state

# Batches of skipped steps that are kept at most, beside the one that ends a run.
KEPT_BATCHES = 5


class NonFiniteError(RuntimeError):
    """Training stopped, because step after step was not finite."""


def train(
    config,
    workdir: str | os.PathLike,
    *,
    on_samples: Callable[[int, int, np.ndarray], Any] | None = None,
) -> train_state.TrainState:
    """Trains as the config says, from the latest checkpoint in `workdir` if any.

    Leaves in `workdir`: `checkpoints/`, `run.json`, `tensorboard/`, `grids/` and
    `scores.json`.

    Args:
      config: see `ism_jax.config`.
      workdir: folder of the run.
      on_samples: is called with the training step, the number of sampling steps and the
        samples of each grid, [N, H, W, C] in [-1, 1], such as for a notebook to show.

    Raises:
      ValueError: a config, data or a resumed run that could not work, or a workdir that
        another run uses.
      NonFiniteError: `train.max_skipped_in_row` steps in a row were not finite.
      preemption.Preempted: a signal asked to stop; the last step is saved.
      checkpoint.SaveError: the last checkpoint, or several in a row, cannot be saved.
    """
    workdir = Path(workdir)
    config_lib.validate(config)
    with contextlib.ExitStack() as held:
        distributed.first(lambda: held.enter_context(lock.Lock(workdir)) and None)
        check_shared(workdir)
        requests = held.enter_context(preemption.Requests())
        return _train(config, workdir, requests, on_samples)


def _train(config, workdir: Path, requests: preemption.Requests, on_samples):
    """`train`, in a folder that is nobody else's."""
    allowed_changes = distributed.first(lambda: check_resumable(config, workdir))
    distributed.first(
        lambda: checkpoint.set_aside_damaged(workdir, show=tqdm.tqdm.write)
    )

    source = sources.make_source(
        config.data.source, **config_lib.source_options(config)
    )
    num_classes = len(source.class_names)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    check_devices(config, mesh)
    check_memory(config, mesh, num_classes)
    model = experiment.make_model(config, num_classes)
    objective = config_lib.make_objective(config, num_classes)
    start = None
    if config.train.init_from and not checkpoint.saved_steps(workdir):
        start = exported_network.read(config.train.init_from)
        known = len(start.class_names)
        start = exported_network.with_classes(start, source.class_names)
        exported_network.check_start(
            start, model, source.image_shape, config.train.init_from
        )
    batches = experiment.pool_batches(config)
    loader = experiment.make_loader(config, source, batches=batches)
    seed_key = sharding.replicate(jax.random.key(config.seed), mesh)
    init_key = random_streams.stream(
        jax.random.key(config.seed), random_streams.INIT, 0
    )
    state, shardings = train_state.create(
        lambda: sit.init_params(model, source.image_shape, init_key),
        experiment.make_optimizer(config),
        mesh,
        twin_ema=config.ema.twin,
    )
    if start is not None:
        state = train_state.start_from(state, start.params, shardings)

    checkpointer = checkpoint.Checkpointer(
        workdir,
        keep_last=config.checkpoint.keep_last,
        keep_best=config.checkpoint.keep_best,
        show=tqdm.tqdm.write if jax.process_index() == 0 else lambda text: None,
    )
    if checkpointer.latest_step() is not None:
        state, data_state = checkpointer.restore(state)
        loader.set_state(data_state)
    first_step = int(state.step)
    loader.seek(first_step // batches)
    if jax.process_index() == 0:
        checkpoint.write_run(workdir, config, source)

    report = progress.Progress(workdir, config, first_step=first_step)
    report.show(progress.summary(config, model, state.params, mesh, source, workdir))
    if first_step:
        report.show(f'resuming at step {first_step}')
    if start is not None:
        report.show(
            f'starting from {config.train.init_from}: {start.origin}, which predicts '
            f'{start.predicts}'
            + (f'; its {known} classes are forgotten' if known != num_classes else '')
        )
    for line in allowed_changes:
        report.show(f'changed since the run was started: {line}')

    step_fn = experiment.compiled_step(config, source, mesh, shardings)
    couple = experiment.make_coupling(config, mesh, num_classes)
    sampler = experiment.make_sampler(
        config,
        objective,
        functools.partial(experiment.apply_model, model),
        source.image_shape,
        batch_size=config.sample.batch_size,
        mesh=mesh,
    )
    scorer = None
    if config.scores.enabled:
        scorer = SampleScorer(
            source, sampler, cache_dir=workdir, seed=config.seed, show=report.show
        )

    def save(state, *, hurry=False):
        score = report.loss
        if scorer and config.scores.checkpoint_samples and hurry:
            score = float('inf')  # Not compared with others.
        elif scorer and config.scores.checkpoint_samples:
            quick = scorer(
                state.infer, steps=4, guidance=0.0,
                samples=config.scores.checkpoint_samples,
            )  # fmt: skip
            score = quick['fd']
            report.show(
                f'step {int(state.step)}: Frechet distance in 4 steps {score:.3f}'
            )
        checkpointer.save(state, loader_state(loader, state, batches), config, score)

    pool, previous, extra = None, None, {}
    named = set()  # Corrupt images that have been reported.
    stuck = watchdog.Watchdog(config.train.stuck_after_seconds)
    try:
        for step in range(first_step, config.train.steps):
            stuck.step()
            if pool is None or step % batches == 0:
                pool, extra = paired_pool.next_pool(loader, couple, mesh, seed_key)
            state, metrics = step_fn(state, pool, seed_key)
            report.step(metrics)
            # Step n-1 is looked at while step n runs, so that the device never waits.
            if previous is not None:
                stop_if_not_finite(*previous, config=config, workdir=workdir)
            previous = step, metrics, pool
            done = step + 1
            if done % config.log.every == 0 or done == config.train.steps:
                counts = {
                    'data/skipped_images': float(loader.skipped),
                    'data/retries': float(loader.retries),
                }
                report.log(done, extra | counts)
                for name in source.skipped.reasons.keys() - named:
                    named.add(name)
                    report.show(f'skipped: {source.skipped.reasons[name]}')
            if requests.stop_after(done):
                stuck.stop()
                report.log(done, extra)
                report.show(f'asked to stop: saving step {done}')
                save(state, hurry=True)
                checkpointer.close()
                raise requests.error(f'step {done} is saved')
            saves = done % config.checkpoint.every == 0 or done == config.train.steps
            if saves:
                report.log(done, extra)
            report.pause()
            if config.log.grid_every and done % config.log.grid_every == 0:
                draw_grids(report, sampler, state, config, num_classes, on_samples)
            if saves:
                save(state)
            report.resume()
        stuck.stop()
        if previous is not None:
            stop_if_not_finite(*previous, config=config, workdir=workdir)
        checkpointer.close()
        requests.nothing_to_save()
        if scorer:
            report.show('scoring samples')
            score_settings(
                scorer,
                state.infer,
                trained_steps=int(state.step),
                steps=config.sample.steps,
                guidance=config.sample.guidance,
                samples=config.scores.samples,
                workdir=workdir,
                show=report.show,
            )
    finally:
        stuck.stop()
        loader.close()
        report.close()
        # With a process lost, what is being saved could be waited for for ever.
        if sys.exception() is None or jax.process_count() == 1:
            checkpointer.close(quiet=sys.exception() is not None)
    return state


def loader_state(loader, state, batches: int) -> dict:
    """The iterator's state at the pool that the next step needs.

    The iterator itself may be a pool ahead; the position is the step's.
    """
    return loader.get_state() | {'next_pool': int(state.step) // batches}


def stop_if_not_finite(step: int, metrics, pool, *, config, workdir) -> None:
    """Keeps the batch of a step that was skipped; stops when step after step was."""
    in_row = int(metrics['skipped_in_row'])
    if not in_row:
        return
    logging.warning('step %d was not finite and is skipped (%d in a row)', step, in_row)
    last = in_row >= config.train.max_skipped_in_row
    path = Path(workdir) / f'non_finite_step_{step:08d}.npz'
    kept = lambda: len(list(path.parent.glob('non_finite_*')))
    if last or (in_row == 1 and distributed.first(kept) < KEPT_BATCHES):
        keep_batch(path, step, metrics, pool)
    if not last:
        return
    raise NonFiniteError(
        f'loss or gradient was not finite in {in_row} steps in a row, up to step '
        f'{step} (train.max_skipped_in_row = {config.train.max_skipped_in_row}); '
        f'the batch is in {path}. Lower optimizer.learning_rate, set '
        'optimizer.clip_norm = 1, or look at the batch; the last checkpoint stays'
    )


def check_shared(workdir: Path) -> None:
    """Sees that all processes have the same folder.

    Raises:
      ValueError: this one does not see what the first wrote.
    """
    name = f'.shared_{secrets.token_hex(8)}'
    name = distributed.first(lambda: name)
    distributed.first(lambda: (workdir / name).touch())
    seen = (workdir / name).exists()
    seen = multihost_utils.process_allgather(np.bool_(seen))
    distributed.first(lambda: (workdir / name).unlink())
    if not np.all(seen):
        raise ValueError(
            f'processes {np.flatnonzero(~np.ravel(seen)).tolist()} do not see '
            f'{workdir} as the first does; give a --workdir on a file system that all '
            'of them share'
        )


def keep_batch(path: Path, step: int, metrics, pool) -> None:
    """Writes the batch of a step, to be looked at; a full disk is no reason to stop."""
    turn = step % pool.labels.shape[0]
    arrays = {
        name: distributed.to_host(getattr(pool, name)[turn])
        for name in ('images', 'labels', 'noise_index')
    }
    if jax.process_index():
        return
    out = io.BytesIO()
    np.savez(
        out,
        **arrays,
        pool=int(pool.number),
        step=step,
        loss=float(metrics['loss']),
        gradient_norm=float(metrics['norm/gradient']),
    )
    try:
        files.write_bytes(path, out.getvalue())
    except OSError as error:
        logging.warning(
            'the batch of step %d cannot be kept in %s: %s', step, path, error
        )


def draw_grids(
    report, sampler, state, config, num_classes: int, on_samples=None
) -> None:
    """Samples of fixed noise, for one to see them improve."""
    columns = config.log.grid_columns
    labels = np.tile(np.arange(columns) % num_classes, 4)
    for steps in config.log.grid_steps:
        batches = sampler.batches(
            state.infer,
            jax.random.key(config.seed),
            labels,
            guidance=config.log.grid_guidance,
            schedule=time_grid.dyadic_schedule(steps, sampler.base_steps),
        )
        images = np.concatenate([np.asarray(images) for images, _ in batches])
        report.picture(int(state.step), f'samples_{steps}_steps', images, columns)
        if on_samples is not None and jax.process_index() == 0:
            on_samples(int(state.step), steps, images)


def check_resumable(config, workdir: Path) -> list[str]:
    """Lines that say what changed since the run was started.

    Raises:
      ValueError: a changed field that would make it another run.
    """
    old = checkpoint.read_run_config(workdir)
    if old is None or not checkpoint.saved_steps(workdir):
        return []  # Nothing that another config could spoil.
    allowed, refused = config_lib.differences(old, config)
    if refused:
        raise ValueError(
            f'{workdir} holds a run of another config; these fields cannot change: '
            + '; '.join(refused)
            + (f'. These could: {"; ".join(allowed)}' if allowed else '')
            + '. Set them back or give a new --workdir'
        )
    return allowed


def check_devices(config, mesh) -> None:
    part = config.train.batch_size // config.train.accumulate
    if part % mesh.size:
        raise ValueError(
            f'train.batch_size = {config.train.batch_size} in train.accumulate = '
            f'{config.train.accumulate} part(s) must split evenly over the {mesh.size} '
            f'devices; choose a multiple of {mesh.size * config.train.accumulate}'
        )


def check_memory(config, mesh, num_classes: int) -> None:
    """Refuses what cannot fit, whatever XLA does: the state alone is too large.

    Raises:
      ValueError: a device, or on CPU the machine, has less memory.
    """
    device = mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get('bytes_limit')
    place, devices = 'each device has', 1
    if limit is None and device.platform == 'cpu':
        limit = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
        place, devices = 'the machine has', len(mesh.local_devices)
    needed = cost.state_bytes(config, mesh, num_classes) * devices
    if limit and needed > limit:
        raise ValueError(
            f'parameters, optimizer and averages need {needed / 2**30:.1f} GiB, but '
            f'{place} {limit / 2**30:.1f}: make model.hidden_size, model.depth or '
            'model.mlp_ratio smaller, or divide them over more devices with mesh.fsdp'
        )


def keep_compiled() -> None:
    """Keeps compiled programs on disk, so that a run that goes on starts at once.

    On accelerators, and where the user's environment says nothing else. Programs for a
    CPU are for one kind of CPU, while home folders are often shared.
    """
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != 'cpu':
        folder = Path('~/.cache/ism_jax/compiled').expanduser()
        jax.config.update('jax_compilation_cache_dir', str(folder))


def run_flags():
    """Does what the command line says."""
    if FLAGS.plan:
        config_lib.validate(FLAGS.config)
        made = cost.make_plan(FLAGS.config, FLAGS.plan_devices, FLAGS.plan_classes)
        print(cost.format_plan(made, FLAGS.plan_tflops))
        return
    workdir = FLAGS.workdir
    if not workdir:
        name = config_flags.get_config_filename(FLAGS['config']).split(':')[0]
        workdir = Path('runs') / Path(name).stem
    distributed.start_by_flags(FLAGS)
    keep_compiled()
    train(FLAGS.config, workdir)


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    config_flags.DEFINE_config_file(
        'config', None, 'Config file, such as configs/quickstart.py.', lock_config=True
    )
    flags.DEFINE_string('workdir', None, 'Folder of the run; runs/CONFIG by default.')
    flags.DEFINE_bool('plan', False, 'Only tell what the training would need.')
    flags.DEFINE_integer('plan_devices', 8, 'Devices to plan for.', lower_bound=1)
    flags.DEFINE_integer('plan_classes', 1000, 'Classes of the data.', lower_bound=1)
    flags.DEFINE_float(
        'plan_tflops', cost.DEFAULT_TFLOPS, 'What a device sustains, TFLOP/s.'
    )
    distributed.define_flags()
    flags.mark_flag_as_required('config')
    app.run(command_line.main(run_flags, NonFiniteError, checkpoint.SaveError))
