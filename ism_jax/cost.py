"""Memory and FLOPs of a training run, without devices and without training.

    python -m ism_jax.train --config configs/imagenet256_ism_xl2.py --plan

The bytes of the state follow from its shapes and the rule of `sharding`, those of the
activations from what differentiation keeps, the FLOPs from the traced step.
"""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from ism_jax import config_check
from ism_jax.experiment import Experiment
from ism_jax.method import loss_distance
from ism_jax.method.training_batch import Batch
from ism_jax.models import conditions
from ism_jax.runtime import chips, sharding, traced_flops

# Fraction of a chip's peak that hours of training assume if none is given. Large
# transformers reach 30 to 60 %.
ASSUMED_UTILISATION = 0.4
# By which the predicted memory may differ from that of the compiled program.
PREDICTION_ERROR = 0.05


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cost of one config on one mesh.

    Attributes:
      devices: number of devices.
      parameters: number of parameters.
      bytes_per_device: by name: what is in memory in the middle of the backward pass,
        when a step needs most. See `bytes_per_device`.
      flops_per_step: FLOPs on all devices, without the recomputation of remat.
      steps: number of training steps.
    """

    devices: int
    parameters: int
    bytes_per_device: dict[str, int]
    flops_per_step: int
    steps: int

    @property
    def peak_bytes(self) -> int:
        """Bytes per device in the middle of the backward pass."""
        return sum(self.bytes_per_device.values())

    def hours(self, tflops: float) -> float:
        """Hours of training if each device sustains this number of TFLOP/s."""
        return self.steps * self.flops_per_step / (self.devices * tflops * 3.6e15)


def make_plan(
    config, devices: int, num_classes: int, chip: chips.Chip | None = None
) -> Plan:
    """The plan of a config whose mesh is filled with `devices` devices.

    Args:
      config: a validated config.
      devices: number of devices.
      num_classes: number of classes of the data.
      chip: what the devices are; None for a GPU or a CPU.

    Raises:
      ValueError: the mesh does not divide the devices.
    """
    sizes = config_check.mesh_shape(config, devices)
    mesh = jax.sharding.AbstractMesh(
        sizes, ('data', 'fsdp'), (AxisType.Auto, AxisType.Auto)
    )
    side = config.data.image_size
    shape = (side, side, config.data.channels)
    experiment = Experiment(
        config, mesh=mesh, num_classes=num_classes, image_shape=shape
    )
    return Plan(
        devices=devices,
        parameters=conditions.num_parameters(experiment.model, shape),
        bytes_per_device=bytes_per_device(experiment, chip and chip.is_tpu),
        flops_per_step=step_flops(experiment),
        steps=config.train.steps,
    )


def bytes_per_device(experiment: Experiment, is_tpu: bool) -> dict[str, int]:
    """Bytes on each device in the middle of the backward pass, by name.

    Calibrated with the programs of docs/performance.md: the arguments of a step stay in
    memory, and to them XLA adds the gradient, with `train.accumulate` the sum of the
    parts' gradients, the activations that are kept, and the workspace of one layer. For
    TPUs it also converts all parameters to the dtype of the computation before the
    loops over the layers; for GPUs each layer when it is used.
    """
    config, mesh = experiment.config, experiment.mesh
    trees = _trees(experiment, is_tpu)
    sizes = {name: tree_bytes(tree, mesh) for name, tree in trees.items()}
    batch = config.train.batch_size // config.train.accumulate
    kept = activation_bytes(experiment)
    sizes['kept for the backward pass'] = math.ceil(kept * batch / mesh.size)
    sizes['workspace of a layer'] = math.ceil(_layer_bytes(experiment, batch))
    pool = experiment.pool_batches * config.train.batch_size
    values = math.prod(experiment.image_shape) + 2  # Plus label and noise index.
    sizes['pool'] = math.ceil(pool * values * 4 / mesh.size)
    return sizes


def _layer_bytes(experiment: Experiment, batch: int) -> float:
    """Bytes that the backward pass of one layer needs besides what is kept.

    The attention scores and their gradient, in float32 unless the attention is fused;
    and the widest activation of the layer and its gradient.
    """
    model, (side, *_) = experiment.model, experiment.image_shape
    scores, hidden = model.workspace(side)
    scores *= 0 if model.attention == 'cudnn' else 4
    hidden *= jnp.dtype(model.dtype).itemsize
    return 2 * (scores + hidden) * batch / experiment.mesh.size


def _trees(experiment: Experiment, is_tpu: bool) -> dict:
    """Shapes of the trees in memory during a backward pass."""
    params = conditions.abstract_params(experiment.model, experiment.image_shape)
    dtype = jnp.dtype(experiment.model.dtype)
    converted = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), params)
    return _state_trees(experiment) | {
        'converted parameters': converted if is_tpu and dtype != jnp.float32 else {},
        'gradient': params,
        'sum of gradients': params if experiment.config.train.accumulate > 1 else {},
    }


def _state_trees(experiment: Experiment) -> dict:
    """Shapes of the trees that training keeps."""
    params = conditions.abstract_params(experiment.model, experiment.image_shape)
    return {
        'parameters': params,
        'optimizer': jax.eval_shape(experiment.optimizer.init, params),
        'target EMA': params if experiment.config.ema.twin else {},
        'inference EMA': params,
    }


def tree_bytes(tree, mesh) -> int:
    """Bytes of a tree on each device of a mesh."""
    shardings = sharding.tree_shardings(tree, mesh)
    total = 0
    for leaf, split in zip(
        jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True
    ):
        total += math.prod(split.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def activation_bytes(experiment: Experiment) -> float:
    """Bytes per sample that differentiation keeps, with the config's remat policy."""
    batch = _smallest_batch(experiment)
    params = conditions.abstract_params(experiment.model, experiment.image_shape)

    def kept(size):
        loss, args = _loss(experiment, size)
        pullback = jax.eval_shape(
            lambda p, *rest: jax.vjp(lambda q: loss(q, *rest), p)[1], params, *args
        )
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(pullback))

    # The part that does not grow with the batch is the parameters themselves.
    return (kept(2 * batch) - kept(batch)) / batch


def step_flops(experiment: Experiment) -> int:
    """FLOPs of a step: the loss and its gradient."""
    config = experiment.config.copy_and_resolve_references()
    with config.unlocked():
        config.model.update(remat='none', attention='xla')
    counted = Experiment(
        config,
        mesh=experiment.mesh,
        num_classes=experiment.num_classes,
        image_shape=experiment.image_shape,
    )
    batch = _smallest_batch(experiment)
    loss, args = _loss(counted, batch)
    operations = traced_flops.count_flops(jax.grad(loss), args[0], *args)
    return operations * config.train.batch_size // batch


def _smallest_batch(experiment: Experiment) -> int:
    """The smallest batch that splits in the same proportions as the full one."""
    objective, size = experiment.objective, experiment.config.train.batch_size
    multiple = objective.batch_multiple
    options = range(multiple, size + 1, multiple)
    return next(n for n in options if n >= objective.min_batch and size % n == 0)


def _loss(experiment: Experiment, size: int):
    """The loss as a function, and the shapes of (params, target params, batch, key)."""
    shape = experiment.image_shape
    images = jax.ShapeDtypeStruct((size, *shape), jnp.float32)
    label = jax.ShapeDtypeStruct((size,), jnp.int32)
    target = conditions.abstract_params(experiment.model, shape)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def loss(params, target, batch, key):
        return experiment.objective(
            experiment.apply,
            params,
            target,
            batch,
            key,
            distance=loss_distance.squared_error,
            progress=0.5,
        )[0]

    return loss, (target, Batch(images, images, label), key)


def check_memory(experiment: Experiment) -> None:
    """Rejects a run whose state, or data for transport, alone exceed the memory.

    Raises:
      ValueError: a device (on CPU, the machine) has too little memory.
    """
    mesh = experiment.mesh
    device = mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get('bytes_limit')
    owner, devices = 'each device has', 1
    if limit is None and device.platform == 'cpu':
        limit = _machine_bytes()
        owner, devices = 'the machine has', len(mesh.local_devices)
    trees = _state_trees(experiment).values()
    needed = devices * sum(tree_bytes(tree, mesh) for tree in trees)
    if limit and needed > limit:
        raise ValueError(
            f'parameters, optimizer and EMAs need {needed / 2**30:.1f} GiB, but '
            f'{owner} {limit / 2**30:.1f}: make model.hidden_size, model.depth, '
            'model.mlp_ratio or model.channel_multipliers smaller, '
            'or shard them over more devices with mesh.fsdp'
        )
    if experiment.is_semidiscrete:
        _check_points(experiment)


def _check_points(experiment: Experiment) -> None:
    """Rejects a data set that does not fit into this machine as float16."""
    needed = 2 * len(experiment.source) * math.prod(experiment.image_shape)
    if needed > _machine_bytes():
        raise ValueError(
            f"transport.method = 'semidiscrete' keeps the data in memory, "
            f'{needed / 2**30:.1f} GiB, but the machine has '
            f"{_machine_bytes() / 2**30:.1f}: prepare latents, or use 'permutation'"
        )


def _machine_bytes() -> int:
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def format_plan(plan: Plan, chip: chips.Chip, tflops: float | None = None) -> str:
    """The plan for a chip as text.

    Args:
      plan: see `make_plan`.
      chip: the chip, for its memory and its peak.
      tflops: TFLOP/s that a chip is assumed to sustain; None for
        `ASSUMED_UTILISATION` of its peak.
    """
    tflops = tflops or ASSUMED_UTILISATION * chip.tflops
    sizes = plan.bytes_per_device
    width = max(map(len, sizes)) + 2
    lines = [
        f'{plan.parameters:,} parameters, {plan.devices} x {chip.name}; predicted GiB '
        'per chip in the middle of the backward pass:',
        *(f'  {name:{width}}{size / 2**30:8.2f}' for name, size in sizes.items()),
        f'  {"total":{width}}{plan.peak_bytes / 2**30:8.2f} of '
        f'{chip.memory / 2**30:.2f} that a program can use',
        f'{plan.flops_per_step / 1e12:.1f} TFLOP per step, '
        f'{plan.flops_per_step * plan.steps / 1e18:.1f} EFLOP in {plan.steps:,} steps; '
        f'estimated {plan.hours(tflops):.1f} hours if a chip sustains {tflops:.0f} '
        f'TFLOP/s ({tflops / chip.tflops:.0%} of its peak)',
    ]
    return '\n'.join(lines)


def report(
    config, devices: int, chip: chips.Chip, num_classes: int, tflops: float | None
) -> str:
    """The plan of a config as text, with advice if it does not fit."""
    plan = make_plan(config, devices, num_classes, chip)
    text = format_plan(plan, chip, tflops)
    if plan.peak_bytes > chip.memory:
        text += '\nit does not fit: '
        text += advice(config, devices, num_classes, chip)
    return text


def advice(config, devices: int, num_classes: int, chip: chips.Chip) -> str:
    """One sentence: which fields make a run fit that does not, by prediction.

    Args:
      config: a validated config that does not fit.
      devices, num_classes, chip: see `make_plan`.
    """
    for fields in _smaller_runs(config, devices):
        other = config.copy_and_resolve_references()
        with other.unlocked():
            other.update_from_flattened_dict(fields)
        try:
            config_check.validate(other)
            config_check.check_devices(other, devices, 1)
        except ValueError:
            continue
        needed = make_plan(other, devices, num_classes, chip).peak_bytes
        if needed < (1 - PREDICTION_ERROR) * chip.memory:
            changes = ' and '.join(f'{k} = {v!r}' for k, v in fields.items())
            return f'set {changes}: predicted {needed / 2**30:.1f} GiB'
    return (
        'no mesh of this many chips fits it: use more chips, or a smaller model.depth'
    )


def _smaller_runs(config, devices: int):
    """Changes of a config that save memory, the cheapest in time first."""
    _, own = config_check.mesh_shape(config, devices)
    splits = [n for n in range(own, devices + 1) if devices % n == 0]
    for accumulate in (1, 2, 4, 8):
        for fsdp in splits:
            fields = {}
            if fsdp != own:
                fields |= {'mesh.data': -1, 'mesh.fsdp': fsdp}
            if accumulate > 1:
                fields['train.accumulate'] = accumulate * config.train.accumulate
            if fields:
                yield fields


def summary(experiment: Experiment, workdir) -> list[str]:
    """Lines that describe the run, to print at its start."""
    config, model, mesh = experiment.config, experiment.model, experiment.mesh
    count = conditions.num_parameters(model, experiment.image_shape)
    trees = _state_trees(experiment).values()
    state = sum(tree_bytes(tree, mesh) for tree in trees)
    return [
        f'network:   {type(model).__name__}, {count:,} parameters, {model.sizes()}, '
        f'patch {model.patch_size}, {model.dtype}',
        f'devices:   {mesh.size} x {mesh.devices.flat[0].device_kind}, '
        f'mesh data {mesh.shape["data"]} x fsdp {mesh.shape["fsdp"]}',
        f'data:      {experiment.source!r}',
        f'           {experiment.num_classes} classes, images {experiment.image_shape}',
        f'state:     {state / 2**30:.2f} GiB per device (--plan predicts the memory '
        'of a step)',
        f'objective: {config.objective.name}, {config.train.steps} steps of '
        f'{config.train.batch_size}',
        f'workdir:   {workdir}',
    ]
