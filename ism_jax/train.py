"""Trains a network: `python -m ism_jax.train --config configs/quickstart.py`.

The same command resumes a run that was stopped. `--config.train.batch_size=128`
overrides a field of the config; `--help=config` lists all fields, with the values of
`--config` if it is given. `configs/fashion_mnist.py:runlocal` keeps the method of a
config and shrinks the rest to a minute on a CPU.

`--config.train.init_from=FOLDER` starts a new run from a network that
`ism_jax.convert` wrote, such as a pretrained SiT; a resumed run ignores it.

`--plan` only predicts what the run needs on `--plan_devices` chips of `--plan_chip`:
memory, FLOPs and hours. With `--topology=v5p:2x2x4` or `--topology=h100:8` it also
compiles the run's programs for these chips and prints their memory, FLOPs, bytes and
collectives. It opens no data and needs no such chips.

`--profile FROM:TO` writes a trace of the steps after FROM, up to TO, for xprof.
"""

from collections.abc import Callable
import contextlib
import functools
import os
from pathlib import Path
from typing import Any

from absl import flags
import jax
from ml_collections import config_flags
import numpy as np
import tqdm

from ism_jax import compiled_plan, config_check, cost, trained_network
from ism_jax import config as config_lib
from ism_jax.data.source import CorruptImageError
from ism_jax.experiment import Experiment
from ism_jax.runtime import (
    command_line,
    compilation_cache,
    distributed,
    lock,
    paths,
    preemption,
    watchdog,
)
from ism_jax.training import checkpoint, loop, profiler, train_state, writers
from ism_jax.training.progress import Progress, closing_text, parameter_table


def train(
    config,
    workdir: str | os.PathLike,
    *,
    on_samples: Callable[[int, int, np.ndarray], Any] | None = None,
    profile: str = '',
) -> train_state.TrainState:
    """Trains a config, from the latest checkpoint in `workdir` if there is one.

    Writes to `workdir`: `checkpoints/`, `run.json`, `tensorboard/`, `grids/`,
    `samples.png`, `scores.json`, and `potentials.npz` with semidiscrete transport.

    Args:
      config: see `ism_jax.config`.
      workdir: folder of the run, local or gs://.
      on_samples: called with the training step, the number of sampling steps and the
        samples of each grid, [N, H, W, C] in [-1, 1], for example in a notebook.
      profile: the steps to trace, 'FROM:TO', into `workdir/profile`; '' for none.

    Raises:
      ValueError: an invalid config, data set or change of a resumed run, or a workdir
        that another run uses.
      loop.NonFiniteError: `train.max_skipped_in_row` steps in a row were not finite.
      preemption.Preempted: a signal requested a stop; the last step is saved.
      checkpoint.SaveError: the last checkpoint, or several in a row, cannot be saved.
    """
    workdir = paths.from_user(workdir, '--workdir', paths.CHECKPOINTS)
    config_check.validate(config)
    tracer = profiler.Profiler(workdir / 'profile', profile, config.train.steps)
    with contextlib.closing(tracer), contextlib.ExitStack() as held:
        distributed.first(lambda: held.enter_context(lock.for_folder(workdir)) and None)
        distributed.check_shared(workdir)
        requests = held.enter_context(preemption.Requests())
        try:
            return _train(config, workdir, held, requests, on_samples, tracer)
        except CorruptImageError as error:
            if config.data.on_corrupt == 'skip':
                raise
            advice = "; or replace such images with data.on_corrupt = 'skip'"
            raise CorruptImageError(f'{error}{advice}') from error


def _train(config, workdir: paths.Path, held, requests, on_samples, tracer):
    """`train`, in a folder locked for this run; `held` closes what it opens."""
    experiment = Experiment(config)
    log = tqdm.tqdm.write if jax.process_index() == 0 else lambda text: None
    changes = distributed.first(lambda: trained_network.check_resume(config, workdir))
    distributed.first(lambda: checkpoint.set_aside_damaged(workdir, log))
    config_check.check_devices(config, len(jax.devices()), jax.process_count())
    config_check.check_source(config, experiment.source)
    cost.check_memory(experiment)
    experiment.restore_potentials(workdir, log)
    state, shardings, origin = trained_network.initial_state(experiment, workdir)
    checkpointer = held.enter_context(experiment.make_checkpointer(workdir, log))
    loader = held.enter_context(contextlib.closing(experiment.make_loader()))
    if checkpointer.latest_step() is not None:
        state, position = checkpointer.restore(state)
        loader.set_state(position)
        changes = [f'resuming at step {int(state.step)}', *changes]
    loader.seek(int(state.step) // loader.batches)
    if jax.process_index() == 0:
        checkpoint.write_run(workdir, config_lib.to_dict(config), experiment.source)
    progress = Progress(
        workdir,
        writers.open_writers(config.log.writer, workdir, config_lib.flatten(config)),
        batch_size=config.train.batch_size,
        num_steps=config.train.steps,
        first_step=int(state.step),
    )
    held.callback(progress.close)
    if config.log.parameters:
        progress.show(parameter_table(state.params))
    for line in (*cost.summary(experiment, workdir), *origin, *changes):
        progress.show(line)
    sampler = experiment.make_sampler()
    make_scorer = functools.cache(
        lambda: experiment.make_scorer(sampler, workdir, progress.show)
    )
    stuck = watchdog.Watchdog(config.train.stuck_after_seconds)
    held.callback(stuck.stop)
    state = loop.run(
        state,
        train_step=experiment.compile_train_step(shardings),
        seed_key=experiment.seed_key,
        next_pool=functools.partial(experiment.next_pool, loader),
        intervals=loop.Intervals(**experiment.intervals()),
        progress=progress,
        loader=loader,
        save=functools.partial(
            loop.save,
            checkpointer=checkpointer,
            loader=loader,
            config=config_lib.to_dict(config),
            make_scorer=make_scorer,
            samples=config.scores.enabled and config.scores.checkpoint_samples,
            progress=progress,
        ),
        draw_grids=functools.partial(
            loop.draw_grids,
            sampler=sampler,
            progress=progress,
            on_samples=on_samples,
            **experiment.grid_options(),
        ),
        requests=requests,
        watchdog=stuck,
        profiler=tracer,
        max_skipped_in_row=config.train.max_skipped_in_row,
        workdir=workdir,
    )
    checkpointer.close()
    requests.nothing_to_save()
    if scorer := make_scorer():
        progress.show('scoring samples')
        experiment.score(scorer, state, workdir, progress.show)
    if config.log.grid_every:
        options = experiment.table_options()
        loop.draw_table(state, sampler=sampler, progress=progress, **options)
    progress.show(closing_text(workdir))
    return state


def run_flags():
    """Runs the command."""
    config = command_line.required_config(FLAGS.config)
    if FLAGS.plan:
        config_check.validate(config)
        return compiled_plan.run_flags(FLAGS, config)
    file = config_flags.get_config_filename(FLAGS['config']).split(':')[0]
    workdir = FLAGS.workdir or Path('runs') / Path(file).stem
    distributed.start_by_flags(FLAGS)
    compilation_cache.keep_programs()
    train(config, workdir, profile=FLAGS.profile)


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    command_line.define_config_flag()
    flags.DEFINE_string(
        'workdir', None, 'Folder of the run, local or gs://; runs/CONFIG by default.'
    )
    flags.DEFINE_string('profile', '', 'FROM:TO, the steps to trace for xprof.')
    compiled_plan.define_flags()
    distributed.define_flags()
    command_line.run(
        run_flags,
        loop.NonFiniteError,
        checkpoint.SaveError,
        topics={
            'config': lambda: config_lib.describe(FLAGS.config or config_lib.default())
        },
    )
