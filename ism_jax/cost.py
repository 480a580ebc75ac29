"""Memory and FLOPs of a training run, without devices and without training.

    python -m ism_jax.train --config configs/imagenet256_ism_xl2.py --plan

The bytes of the state follow from its shapes and the rule of `sharding`, those of the
activations from what differentiation keeps, the FLOPs from the traced step.
"""

from collections.abc import Callable
import dataclasses
import math
import os

import jax
from jax.extend import core
import jax.numpy as jnp
from jax.sharding import AxisType

from ism_jax.experiment import Experiment
from ism_jax.method import loss_distance
from ism_jax.method.training_batch import Batch
from ism_jax.models import sit
from ism_jax.runtime import sharding

# TFLOP/s that a device is assumed to sustain: 40 % of an H100's peak in bfloat16.
DEFAULT_TFLOPS = 400.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cost of one config on one mesh.

    Attributes:
      devices: number of devices.
      parameters: number of parameters.
      bytes_per_device: by name: the trees of the state, the gradient, what is kept
        for the backward pass, and a pool; without XLA's workspace.
      flops_per_step: FLOPs on all devices, without the recomputation of remat.
      steps: number of training steps.
    """

    devices: int
    parameters: int
    bytes_per_device: dict[str, int]
    flops_per_step: int
    steps: int

    def hours(self, tflops: float) -> float:
        """Hours of training if each device sustains this number of TFLOP/s."""
        return self.steps * self.flops_per_step / (self.devices * tflops * 3.6e15)


def make_plan(config, devices: int, num_classes: int) -> Plan:
    """The plan of a config whose mesh is filled with `devices` devices.

    Raises:
      ValueError: the mesh does not divide the devices.
    """
    fsdp = config.mesh.fsdp
    data = devices // fsdp if config.mesh.data == -1 else config.mesh.data
    if data * fsdp != devices:
        raise ValueError(
            f'mesh.data = {config.mesh.data} times mesh.fsdp = {fsdp} is not the '
            f'number of devices {devices}'
        )
    mesh = jax.sharding.AbstractMesh(
        (data, fsdp), ('data', 'fsdp'), (AxisType.Auto, AxisType.Auto)
    )
    side = config.data.image_size
    shape = (side, side, config.data.channels)
    experiment = Experiment(
        config, mesh=mesh, num_classes=num_classes, image_shape=shape
    )
    return Plan(
        devices=devices,
        parameters=sit.num_parameters(experiment.model, shape),
        bytes_per_device=bytes_per_device(experiment),
        flops_per_step=step_flops(experiment),
        steps=config.train.steps,
    )


def bytes_per_device(experiment: Experiment) -> dict[str, int]:
    """See `Plan`."""
    config, mesh = experiment.config, experiment.mesh
    trees = _trees(experiment)
    sizes = {name: tree_bytes(tree, mesh) for name, tree in trees.items()}
    batch = config.train.batch_size // config.train.accumulate
    kept = activation_bytes(experiment)
    sizes['kept for the backward pass'] = math.ceil(kept * batch / mesh.size)
    pool = experiment.pool_batches * config.train.batch_size
    values = math.prod(experiment.image_shape) + 2  # Plus label and noise index.
    sizes['pool'] = math.ceil(pool * values * 4 / mesh.size)
    return sizes


def _trees(experiment: Experiment) -> dict:
    """Shapes of the trees that training keeps, and of a gradient."""
    params = sit.abstract_params(experiment.model, experiment.image_shape)
    return {
        'parameters': params,
        'optimizer': jax.eval_shape(experiment.optimizer.init, params),
        'target EMA': params if experiment.config.ema.twin else {},
        'inference EMA': params,
        'gradient': params,
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
    params = sit.abstract_params(experiment.model, experiment.image_shape)

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
    operations = count_flops(jax.grad(loss), args[0], *args)
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
    target = sit.abstract_params(experiment.model, shape)
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
    trees = _trees(experiment).values()
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


def format_plan(plan: Plan, tflops: float) -> str:
    """The plan as text."""
    sizes = plan.bytes_per_device
    width = max(map(len, sizes)) + 2
    lines = [
        f'{plan.parameters:,} parameters, {plan.devices} devices; GiB per device:',
        *(f'  {name:{width}}{size / 2**30:8.2f}' for name, size in sizes.items()),
        f'  {"total":{width}}{sum(sizes.values()) / 2**30:8.2f}',
        f'{plan.flops_per_step / 1e12:.1f} TFLOP per step, '
        f'{plan.flops_per_step * plan.steps / 1e18:.1f} EFLOP in {plan.steps:,} steps: '
        f'{plan.hours(tflops):.1f} hours if a device sustains {tflops:g} TFLOP/s',
    ]
    return '\n'.join(lines)


def summary(experiment: Experiment, workdir) -> list[str]:
    """Lines that describe the run, to print at its start."""
    config, model, mesh = experiment.config, experiment.model, experiment.mesh
    count = sit.num_parameters(model, experiment.image_shape)
    memory = sum(bytes_per_device(experiment).values())
    return [
        f'network:   {type(model).__name__}, {count:,} parameters, {model.sizes()}, '
        f'patch {model.patch_size}, {model.dtype}',
        f'devices:   {mesh.size} x {mesh.devices.flat[0].device_kind}, '
        f'mesh data {mesh.shape["data"]} x fsdp {mesh.shape["fsdp"]}',
        f'data:      {experiment.source!r}',
        f'           {experiment.num_classes} classes, images {experiment.image_shape}',
        f'memory:    {memory / 2**30:.2f} GiB per device, without the workspace of '
        'XLA (--plan has the details)',
        f'objective: {config.objective.name}, {config.train.steps} steps of '
        f'{config.train.batch_size}',
        f'workdir:   {workdir}',
    ]


def count_flops(function: Callable, *args) -> int:
    """FLOPs of one call; `args` are arrays or their `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: a loop of unknown length contains matrix products.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inner = [_count(part) for part in _jaxprs(params)]
        if name == 'dot_general':
            contracted, _ = params['dimension_numbers'][0]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += 2 * equation.outvars[0].aval.size * depth
        elif name == 'conv_general_dilated':
            kernel = equation.invars[1].aval
            features = kernel.shape[params['dimension_numbers'].rhs_spec[0]]
            total += 2 * equation.outvars[0].aval.size * kernel.size // features
        elif name == 'scan':
            total += params['length'] * sum(inner)
        elif name == 'cond':
            total += max(inner)
        elif name == 'while' and sum(inner):
            raise ValueError(
                'a while loop of unknown length contains matrix products; count a '
                'function without it'
            )
        else:
            total += sum(inner)
    return total


def _jaxprs(params):
    """The jaxprs that a primitive calls."""
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part
