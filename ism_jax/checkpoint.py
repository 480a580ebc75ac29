"""Checkpoints, with Orbax: asynchronous, atomic, the last and the best kept.

A checkpoint has four items: `state` (all that a step changes, but the slow average),
`infer` (the slow average, alone so that sampling reads nothing else), `data` (the
position of the iterator) and `config`. Beside the checkpoints lies `run.json`: what
is needed to sample without the data.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ism_jax import build
from ism_jax import config as config_lib
from ism_jax import files
from ism_jax import portable
from ism_jax import sharding
from ism_jax.models import sit
from ism_jax.train_state import TrainState


class Checkpointer:
    """Saves and restores the state of a run.

    Args:
      workdir: folder of the run.
      keep_last, keep_best: how many checkpoints are kept; the best have the lowest
        `score`.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep_last: int, keep_best: int):
        policies = [checkpoint_managers.LatestN(keep_last)]
        if keep_best:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: -metrics['score'],
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            _folder(workdir),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, data_state: dict, config, score: float) -> None:
        """Starts saving; the state may be donated as soon as this returns."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
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

    def restore(self, state: TrainState) -> tuple[TrainState, dict]:
        """The latest state, on the devices of `state`, and the data's position."""

        def like(tree):
            return ocp.args.StandardRestore(
                jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
            )

        restored = self._manager.restore(
            self.latest_step(),
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

    def close(self) -> None:
        """Waits for what is being saved; raises what went wrong meanwhile."""
        self._manager.wait_until_finished()
        self._manager.close()


class Run(NamedTuple):
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
        return build.apply_model(self.model, params, x, t, d, w, label)


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
    folder = _folder(workdir)
    if not folder.is_dir():
        return []
    # Checkpoints are written under another name and renamed when they are whole.
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def load_run(workdir: str | os.PathLike, step: int | None = None) -> Run:
    """Loads what is needed to sample from a run: its slow average and its config.

    Args:
      workdir: folder of the run, or of a network that `ism_jax.convert` wrote.
      step: which checkpoint; None for the latest.

    Raises:
      ValueError: there is no run, or no such checkpoint.
    """
    path = Path(workdir) / 'run.json'
    if not path.exists():
        if portable.exists(workdir):
            return _load_portable(workdir, step)
        raise ValueError(
            f'{workdir} holds no run (no run.json); give the --workdir of '
            'ism_jax.train, or a folder that ism_jax.convert wrote'
        )
    content = json.loads(path.read_text())
    config = config_lib.from_json(json.dumps(content['config']))
    model = build.make_model(config, len(content['class_names']))
    shape = tuple(content['image_shape'])
    steps = saved_steps(workdir)
    if not steps or (step is not None and step not in steps):
        raise ValueError(
            f'{workdir} has no checkpoint{"" if step is None else f" {step}"}; '
            f'it has {steps or "none: train for at least checkpoint.every steps"}'
        )
    with ocp.CheckpointManager(_folder(workdir)) as manager:
        step = steps[-1] if step is None else step
        place = sharding.replicated(sharding.make_mesh())
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            sit.abstract_params(model, shape),
        )
        restored = manager.restore(
            step,
            args=ocp.args.Composite(infer=ocp.args.StandardRestore(abstract)),
        )
    return Run(
        config, model, restored['infer'], step, tuple(content['class_names']), shape
    )


def _load_portable(folder, step: int | None) -> Run:
    network = portable.read(folder)
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
    place = sharding.replicated(sharding.make_mesh())
    params = jax.device_put(portable.initialised(network), place)
    return Run(
        network.config, network.model(), params, network.step, network.class_names,
        network.image_shape,
    )  # fmt: skip


def _folder(workdir) -> Path:
    return Path(workdir).absolute() / 'checkpoints'
