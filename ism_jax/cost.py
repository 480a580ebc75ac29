"""What a training will need, told without devices and without training.

    python -m ism_jax.train --config configs/imagenet256_ism_xl2.py --plan

Bytes of the state follow from the shapes and the rule of `sharding`, activations from
what differentiation keeps, operations from the traced step.
"""

from collections.abc import Callable
import dataclasses
import functools
import math

import jax
from jax.extend import core
import jax.numpy as jnp
from jax.sharding import AxisType

from ism_jax import config as config_lib
from ism_jax import experiment
from ism_jax.method import loss_distance
from ism_jax.method.training_batch import Batch
from ism_jax.models import sit
from ism_jax.runtime import sharding

# Teraflop/s that a device is taken to sustain: 40 % of an H100's peak in bfloat16.
DEFAULT_TFLOPS = 400.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one config needs on one mesh.

    Attributes:
      devices: how many.
      parameters: of the network.
      bytes_per_device: by name: of the state's trees, of the gradient, of what is kept
        for the backward pass, and of a pool. What XLA needs besides is not known.
      flops_per_step: of all devices, without what rematerialisation repeats.
      steps: of the whole training.
    """

    devices: int
    parameters: int
    bytes_per_device: dict[str, int]
    flops_per_step: int
    steps: int

    def hours(self, tflops: float) -> float:
        """Of training, at so many 10^12 operations per second and device."""
        return self.steps * self.flops_per_step / (self.devices * tflops * 3.6e15)


def make_plan(config, devices: int, num_classes: int) -> Plan:
    """The plan of a config.

    Args:
      config: of the run; its mesh is filled with these devices.
      devices: how many there will be.
      num_classes: of the data.

    Raises:
      ValueError: the mesh or the batch does not divide.
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
    shape = _image_shape(config)
    trees = _trees(config, num_classes)
    params = trees['parameters']
    sizes = {name: tree_bytes(tree, mesh) for name, tree in trees.items()}
    batch = config.train.batch_size // config.train.accumulate
    kept = activation_bytes(config, num_classes, shape, params)
    sizes['kept for the backward pass'] = math.ceil(kept * batch / devices)
    pool = experiment.pool_batches(config) * config.train.batch_size
    sizes['pool'] = math.ceil(pool * (math.prod(shape) + 2) * 4 / devices)
    return Plan(
        devices=devices,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        bytes_per_device=sizes,
        flops_per_step=step_flops(config, num_classes, shape, params),
        steps=config.train.steps,
    )


def state_bytes(config, mesh, num_classes: int) -> int:
    """Bytes of the trees that training keeps, and of a gradient, on each device."""
    trees = _trees(config, num_classes)
    return sum(tree_bytes(tree, mesh) for tree in trees.values())


def _trees(config, num_classes: int) -> dict:
    model = experiment.make_model(config, num_classes)
    params = sit.abstract_params(model, _image_shape(config))
    return {
        'parameters': params,
        'optimizer': jax.eval_shape(experiment.make_optimizer(config).init, params),
        'target average': params if config.ema.twin else {},
        'slow average': params,
        'gradient': params,
    }


def _image_shape(config) -> tuple[int, int, int]:
    return (config.data.image_size, config.data.image_size, config.data.channels)


def tree_bytes(tree, mesh) -> int:
    """Bytes of a tree on each device of a mesh."""
    shardings = sharding.tree_shardings(tree, mesh)
    total = 0
    for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings)):
        shape = place.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def activation_bytes(config, num_classes: int, shape, params) -> float:
    """Bytes of a sample that differentiation keeps, with the config's remat policy."""
    batch = _smallest_batch(config)

    def kept(size):
        loss, args = _loss(config, num_classes, shape, size)
        pullback = jax.eval_shape(
            lambda p, *rest: jax.vjp(lambda q: loss(q, *rest), p)[1], params, *args
        )
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(pullback))

    # What does not grow with the batch are the parameters themselves.
    return (kept(2 * batch) - kept(batch)) / batch


def step_flops(config, num_classes: int, shape, params) -> int:
    """Operations of a step: those of the loss and its gradient."""
    counted = config.copy_and_resolve_references()
    with counted.unlocked():
        counted.model.update(remat='none', attention='xla')
    batch = _smallest_batch(config)
    loss, args = _loss(counted, num_classes, shape, batch)
    return count_flops(jax.grad(loss), params, *args) * config.train.batch_size // batch


def _smallest_batch(config) -> int:
    """The least batch that splits as the whole one does."""
    objective = config_lib.make_objective(config, 1)
    size, multiple = config.train.batch_size, objective.batch_multiple
    options = range(multiple, size + 1, multiple)
    return next(n for n in options if n >= objective.min_batch and size % n == 0)


def _loss(config, num_classes: int, shape, size: int):
    """The loss as a function of (params, target parameters, batch, key), and shapes."""
    model = experiment.make_model(config, num_classes)
    objective = config_lib.make_objective(config, num_classes)
    images = jax.ShapeDtypeStruct((size, *shape), jnp.float32)
    label = jax.ShapeDtypeStruct((size,), jnp.int32)
    target = sit.abstract_params(model, shape)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def loss(params, target, batch, key):
        return objective(
            functools.partial(experiment.apply_model, model), params, target, batch, key,
            distance=loss_distance.squared_error, progress=0.5,
        )[0]  # fmt: skip

    return loss, (target, Batch(images, images, label), key)


def format_plan(plan: Plan, tflops: float) -> str:
    """The plan in words."""
    sizes = plan.bytes_per_device
    width = max(map(len, sizes)) + 2
    lines = [
        f'{plan.parameters:,} parameters, {plan.devices} devices; of each device, GiB:',
        *(f'  {name:{width}}{size / 2**30:8.2f}' for name, size in sizes.items()),
        f'  {"in all":{width}}{sum(sizes.values()) / 2**30:8.2f}',
        f'{plan.flops_per_step / 1e12:.1f} TFLOP in a step, '
        f'{plan.flops_per_step * plan.steps / 1e18:.1f} EFLOP in {plan.steps:,} steps: '
        f'{plan.hours(tflops):.1f} hours if a device sustains {tflops:g} TFLOP/s',
    ]
    return '\n'.join(lines)


def count_flops(function: Callable, *args) -> int:
    """Operations of one call.

    Args:
      function: of arrays.
      *args: arrays, or their shapes (`jax.ShapeDtypeStruct`).

    Raises:
      ValueError: products in a loop whose length is not known.
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
                'there are products in a while loop, which runs nobody knows how '
                'often; count a function without it'
            )
        else:
            total += sum(inner)
    return total


def _jaxprs(params):
    """All that a primitive calls."""
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part
