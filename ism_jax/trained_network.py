"""A trained network: from a run or an exported folder."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple
import warnings

import jax
import ml_collections
import orbax.checkpoint as ocp

from ism_jax import config as config_lib
from ism_jax import experiment
from ism_jax.interchange import exported_network
from ism_jax.models import sit
from ism_jax.runtime import checksums, sharding
from ism_jax.training import checkpoint


class TrainedNetwork(NamedTuple):
    """A trained run, as sampling needs it.

    Attributes:
      config: of the run.
      model: the network.
      params: the slow average, `infer`.
      step: how many steps it was trained.
      class_names: of the labels.
      image_shape: (H, W, C).
    """

    config: ml_collections.ConfigDict
    model: sit.SiT
    params: Any
    step: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]

    def apply(self, params, x, t, d, w, label):
        return experiment.apply_model(self.model, params, x, t, d, w, label)


def load(workdir: str | os.PathLike, step: int | None = None) -> TrainedNetwork:
    """Loads what is needed to sample from a run: its slow average and its config.

    Args:
      workdir: folder of the run, or of a network that `ism_jax.convert` wrote.
      step: which checkpoint; None for the latest.

    Raises:
      ValueError: there is no run, or no such checkpoint.
    """
    path = Path(workdir) / 'run.json'
    if not path.exists():
        if exported_network.exists(workdir):
            return _load_portable(workdir, step)
        raise ValueError(
            f'{workdir} holds no run (no run.json); give the --workdir of '
            'ism_jax.train, or a folder that ism_jax.convert wrote'
        )
    content = json.loads(path.read_text())
    config = config_lib.from_json(json.dumps(content['config']))
    model = experiment.make_model(config, len(content['class_names']))
    shape = tuple(content['image_shape'])
    step = _undamaged_step(workdir, step)
    with ocp.CheckpointManager(checkpoint.checkpoint_folder(workdir)) as manager:
        place = sharding.replicated(sharding.local_mesh())
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            sit.abstract_params(model, shape),
        )
        restored = manager.restore(
            step,
            args=ocp.args.Composite(infer=ocp.args.StandardRestore(abstract)),
        )
    return TrainedNetwork(
        config, model, restored['infer'], step, tuple(content['class_names']), shape
    )


def _undamaged_step(workdir, step: int | None) -> int:
    """The step that was asked for, or the latest of which `infer` is as it was written.

    Raises:
      ValueError: there is none.
    """
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
        told = f'checkpoint {candidate} of {workdir} is damaged ({problems[0]})'
        if step is None:
            warnings.warn(f'{told}; trying the one before', stacklevel=3)
    raise ValueError(f'{told}; it has {steps}: choose another one, or train again')


def _load_portable(folder, step: int | None) -> TrainedNetwork:
    network = exported_network.read(folder)
    if step not in (None, network.step):
        raise ValueError(
            f'{folder} has no checkpoint {step}; it holds one network, of step '
            f'{network.step}'
        )
    if network.predicts != 'velocity':
        raise ValueError(
            f'{folder} holds a network that predicts {network.predicts}, not a '
            f'velocity ({network.origin}); it is a start for training, with '
            f'--config.train.init_from={folder}'
        )
    place = sharding.replicated(sharding.local_mesh())
    params = jax.device_put(exported_network.initialised(network), place)
    return TrainedNetwork(
        network.config, network.model(), params, network.step, network.class_names,
        network.image_shape,
    )  # fmt: skip
