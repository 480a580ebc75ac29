"""Trained networks from disk: to sample from, or to start training from."""

import os
from typing import Any, NamedTuple
import warnings

import jax
import ml_collections

from ism_jax import config as config_lib
from ism_jax import config_check
from ism_jax.experiment import Experiment, make_model
from ism_jax.interchange import exported_network
from ism_jax.models import conditions, sit
from ism_jax.runtime import checksums, paths, sharding
from ism_jax.training import checkpoint, train_state


class TrainedNetwork(NamedTuple):
    """A trained network, as sampling needs it.

    Attributes:
      config: config of the run.
      model: the network.
      params: the inference EMA, on all devices of this process.
      step: number of training steps.
      class_names: names of the labels.
      image_shape: (H, W, C).
    """

    config: ml_collections.ConfigDict
    model: sit.SiT
    params: Any
    step: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]

    def experiment(self) -> Experiment:
        """The parts of the run, on all devices of this process; opens no data."""
        return Experiment(
            self.config,
            mesh=sharding.local_mesh(),
            num_classes=len(self.class_names),
            image_shape=self.image_shape,
        )


def load(workdir: str | os.PathLike, step: int | None = None) -> TrainedNetwork:
    """Loads what sampling needs from a run: its inference EMA and its config.

    Args:
      workdir: folder of the run, or of a network that `ism_jax.convert` wrote, local
        or in a bucket.
      step: which checkpoint; None for the latest.

    Raises:
      ValueError: there is no run, or no such checkpoint.
    """
    workdir = paths.from_user(workdir, '--workdir')
    content = checkpoint.read_run(workdir)
    if content is None:
        if exported_network.exists(workdir):
            return _load_exported(workdir, step)
        raise ValueError(
            f'{workdir} holds no run (no run.json); give the --workdir of '
            'ism_jax.train, or a folder that ism_jax.convert wrote'
        )
    # Of the buckets that hold exports, Orbax reads checkpoints in these.
    workdir = paths.from_user(workdir, '--workdir', paths.CHECKPOINTS)
    config = config_lib.from_dict(content['config'])
    model = make_model(config, len(content['class_names']))
    shape = tuple(content['image_shape'])
    step = _undamaged_step(workdir, step)
    params = checkpoint.restore_trees(
        workdir, step, {'infer': _abstract_params(model, shape)}
    )['infer']
    return TrainedNetwork(
        config, model, params, step, tuple(content['class_names']), shape
    )


def load_parameter_sets(workdir, network: TrainedNetwork) -> dict[str, Any]:
    """Online parameters and EMAs of a run's checkpoint: {'online', 'target', 'infer'}.

    Without twin EMA 'target' is missing: the inference EMA makes the targets.

    Raises:
      ValueError: the folder holds only the inference EMA.
    """
    if not checkpoint.saved_steps(workdir):
        raise ValueError(
            f'{workdir} is an exported network, without online parameters and target '
            'EMA; give the --workdir of the run that it was exported from'
        )
    abstract = _abstract_params(network.model, network.image_shape)
    names = ('params', 'target') if network.config.ema.twin else ('params',)
    trees = checkpoint.restore_trees(
        workdir, network.step, {name: abstract for name in names}
    )
    return {'online': trees.pop('params'), **trees, 'infer': network.params}


def _abstract_params(model, image_shape):
    """Shapes of the parameters, on all devices of this process."""
    replicated = sharding.replicated(sharding.local_mesh())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        conditions.abstract_params(model, image_shape),
    )


def _undamaged_step(workdir, step: int | None) -> int:
    """The given step, or the latest one whose inference EMA is undamaged."""
    steps = checkpoint.saved_steps(workdir)
    if not steps or (step is not None and step not in steps):
        raise ValueError(
            f'{workdir} has no checkpoint{"" if step is None else f" {step}"}; '
            f'it has {steps or "none: train for at least checkpoint.every steps"}'
        )
    for candidate in reversed(steps) if step is None else [step]:
        folder = checkpoint.checkpoint_folder(workdir) / str(candidate)
        if not checksums.is_written(folder):
            return candidate
        problems = checksums.problems(folder, 'infer')
        if not problems:
            return candidate
        damage = f'checkpoint {candidate} of {workdir} is damaged ({problems[0]})'
        if step is None:
            warnings.warn(f'{damage}; trying the one before', stacklevel=3)
    raise ValueError(f'{damage}; it has {steps}: choose another one, or train again')


def _load_exported(folder, step: int | None) -> TrainedNetwork:
    network = exported_network.read(folder)
    if step not in (None, network.step):
        raise ValueError(
            f'{folder} has no checkpoint {step}; it holds one network, of step '
            f'{network.step}'
        )
    if network.predicts != 'velocity':
        raise ValueError(
            f'{folder} holds a network that predicts {network.predicts}, not a '
            f'velocity ({network.origin}); it can only start training, with '
            f'--config.train.init_from={folder}'
        )
    config = config_lib.from_dict(network.config)
    model = make_model(config, len(network.class_names))
    exported_network.check_params(network, model, folder)
    replicated = sharding.replicated(sharding.local_mesh())
    params = jax.device_put(exported_network.initialised(network, model), replicated)
    return TrainedNetwork(
        config, model, params, network.step, network.class_names, network.image_shape
    )


def exported_model(network: exported_network.ExportedNetwork) -> sit.SiT:
    """The model that the config of an exported network describes."""
    config = config_lib.from_dict(network.config)
    return make_model(config, len(network.class_names))


def check_resume(config, workdir) -> list[str]:
    """Lines 'field: old -> new' of what changed since the run was started.

    Raises:
      ValueError: a changed field that would make it another run.
    """
    content = checkpoint.read_run(workdir)
    if content is None or not checkpoint.saved_steps(workdir):
        return []  # Nothing has been trained yet, so the config may change.
    old = config_lib.from_dict(content['config'])
    changes = config_check.check_resume(old, config, workdir)
    return [f'changed since the run was started: {line}' for line in changes]


def initial_state(experiment: Experiment, workdir):
    """The initial train state; a new run starts from `train.init_from`, if set.

    Args:
      experiment: parts of the run.
      workdir: folder of the run; if it has checkpoints, `train.init_from` is ignored.

    Returns:
      The state, its shardings, and lines that say what it starts from.

    Raises:
      ValueError: the run cannot start from that network; names what differs.
    """
    folder = experiment.config.train.init_from
    if not folder or checkpoint.saved_steps(workdir):
        return *experiment.init_state(), []
    folder = paths.from_user(folder, 'train.init_from =')
    network = exported_network.read(folder)
    old_model = exported_model(network)
    exported_network.check_params(network, old_model, folder)
    class_names = experiment.source.class_names
    start = exported_network.with_classes(network, class_names)
    exported_network.check_start(
        start, old_model, experiment.model, experiment.image_shape, folder
    )
    state, shardings = experiment.init_state()
    state = train_state.start_from(state, start.params, shardings)
    line = f'starting from {folder}: {start.origin}, which predicts {start.predicts}'
    if len(network.class_names) != len(class_names):
        line += f'; its {len(network.class_names)} class embeddings are not used'
    return state, shardings, [line]
