"""Meshes, how arrays are split over them, and the collectives of compiled programs."""

import functools
import math
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax import config as config_lib
from ism_jax import cost, experiment, objectives
from ism_jax.runtime import compiled_program, hlo, sharding

pytestmark = pytest.mark.usefixtures('eight_devices')


def test_batches_lie_in_the_order_of_processes():
    """JAX may order the devices of a mesh by their interconnect."""
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7])
    devices = np.array([types.SimpleNamespace(process_index=i // 2) for i in range(8)])
    assert not sharding._is_in_process_order(devices[order].reshape(4, 2))
    assert sharding._is_in_process_order(devices.reshape(4, 2))


def test_small_arrays_are_replicated_and_large_ones_split():
    assert sharding.leaf_spec((64,), 8) == jax.P()
    assert sharding.leaf_spec((3, 512, 2048), 8) == jax.P(None, None, 'fsdp')
    assert sharding.leaf_spec((28, 2050, 1000), 8) == jax.P(None, None, 'fsdp')
    assert sharding.leaf_spec((3, 5001), 8) == jax.P()


@pytest.mark.parametrize(
    'data, fsdp, devices, expected',
    [
        (-1, 1, 8, (8, 1)),
        (-1, 4, 16, (4, 4)),
        (2, -1, 32, (2, 16)),
        (-1, -1, 1, (1, 1)),
        (-1, -1, 6, (3, 2)),
        (-1, -1, 64, (8, 8)),
    ],
)
def test_sizes_of_a_mesh_may_be_left_open(data, fsdp, devices, expected):
    assert sharding.mesh_shape(data, fsdp, devices) == expected


@pytest.mark.parametrize('batch,split', [(16, True), (12, False), (1, False)])
def test_batches_are_constrained_where_the_mesh_divides_them(batch, split):
    x = jnp.zeros((batch, 3))
    constrain = sharding.BatchSharding(sharding.make_mesh(2, 4)).constrain
    assert jax.jit(constrain)(x).sharding.is_fully_replicated != split
    one_device = sharding.make_mesh(devices=jax.devices()[:1])
    for mesh in (None, one_device):
        assert sharding.BatchSharding(mesh).constrain(x) is x


def test_copies_of_a_weight_add_their_gradients_in_float32():
    """In bfloat16 the sum 256 + 1 + ... + 1 would stay 256."""
    split = sharding.BatchSharding(sharding.make_mesh(2, 4))
    weight = jnp.ones((64, 128))

    def loss(weight):
        copies = split.copies(weight, 'bfloat16')
        assert copies.shape == (8, 64, 128) and copies.dtype == jnp.bfloat16
        scale = jnp.array([256.0, *[1.0] * 7]).reshape(8, 1, 1)
        return (copies * scale.astype(copies.dtype)).astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss))(weight)
    np.testing.assert_array_equal(gradient, 263.0)
    assert gradient.sharding.spec == sharding.leaf_spec((64, 128), 4)


BATCH, SIDE, TOKENS = 64, 16, 64
MESHES = [(2, 4), *(pytest.param(*m, marks=pytest.mark.slow) for m in ((8, 1), (1, 8)))]


def _experiment(data, fsdp, objective='flow_matching', accumulate=1, **model):
    """A deep network on a mesh of eight devices."""
    config = config_lib.default()
    config_lib.use_objective(config, objective)
    config.transport.enabled = config.wavelet.enabled = False
    config.model.update(dict(hidden_size=64, depth=6, num_heads=1) | model)
    config.train.update(batch_size=BATCH * accumulate, accumulate=accumulate)
    mesh = sharding.make_mesh(data, fsdp)
    shape = (SIDE, SIDE, 4)
    return experiment.Experiment(config, mesh=mesh, num_classes=4, image_shape=shape)


class Collective(NamedTuple):
    """One result of a collective on each device, and how often it runs."""

    kind: str
    array: hlo.Array
    runs: int

    @property
    def bytes(self):
        return self.runs * self.array.bytes


def collectives(compiled):
    """The collectives of a compiled program."""
    found = []
    for execution in hlo.Module(compiled.as_text()).executions():
        kind = execution.instruction.opcode.removesuffix('-start')
        if kind in compiled_program.COLLECTIVES:
            arrays = execution.instruction.outputs
            found += [Collective(kind, array, execution.times) for array in arrays]
    return found


@functools.cache
def _compiled_step(data, fsdp, objective='flow_matching', accumulate=1, **model):
    parts = _experiment(data, fsdp, objective, accumulate, **model)
    return parts.lower_train_step().compile(), parts.abstract_state()


def _split_bytes(found, params):
    """Bytes of collectives of parameters and gradients, and of all others.

    A parameter is recognised by its shape, and the activations of one device by the
    number of tokens.
    """
    shapes = set()
    for leaf in jax.tree.leaves(params):
        shapes |= {leaf.shape, leaf.shape[1:]}
    sizes = {math.prod(shape) for shape in shapes}
    total = {True: 0, False: 0}
    for one in found:
        total[one.array.size in sizes] += one.bytes
    return total[True], total[False]


def _check(found, params, passes, mesh=(2, 4)):
    """No activation moves, and each gradient is reduced once.

    Args:
      found: collectives of a step.
      params: shapes of the parameters.
      passes: how often the network runs, forward and backward.
      mesh: (data, fsdp); gradients are summed over `fsdp`, then a part over `data`.
    """
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    reduced = [one for one in found if one.kind in ('all-reduce', 'reduce-scatter')]
    gathered = [one for one in found if one.kind == 'all-gather']
    others = [one for one in found if one not in reduced + gathered]
    gradients, scalars = _split_bytes(reduced, params)
    data, fsdp = mesh
    once = size * ((fsdp > 1) + (data > 1) / fsdp)
    assert 0.9 * once < gradients + scalars < 1.02 * once
    weights, activations = _split_bytes(gathered, params)
    assert weights < 1.02 * passes * size
    # Conditions and labels, [B] and [B, width]; the tokens are [B, 64, width].
    assert activations < 0.05 * size and sum(one.bytes for one in others) < 0.05 * size


@pytest.mark.parametrize('data,fsdp', MESHES)
def test_a_step_gathers_weights_and_reduces_each_gradient_once(data, fsdp):
    step, state = _compiled_step(data, fsdp)
    found = collectives(step)
    _check(found, state.params, passes=2, mesh=(data, fsdp))
    assert any(one.kind == 'all-gather' for one in found) == (fsdp > 1)


@pytest.mark.parametrize(
    'data,fsdp', [(8, 1), pytest.param(2, 4, marks=pytest.mark.slow)]
)
def test_accumulated_gradients_cross_groups_of_devices_once(data, fsdp):
    """Within a group each part is reduced: no device can hold a whole gradient."""
    parts = 4
    step, state = _compiled_step(data, fsdp, accumulate=parts)
    reduced = [c for c in collectives(step) if c.kind == 'all-reduce']
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    within_groups = parts * size if fsdp > 1 else 0
    assert sum(one.bytes for one in reduced) < within_groups + 1.02 * size


@pytest.mark.slow
@pytest.mark.parametrize('name', objectives.names())
def test_no_objective_moves_activations(name):
    step, state = _compiled_step(2, 4, name, num_heads=2)
    _check(collectives(step), state.params, passes=8)


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_no_remat_policy_moves_activations(remat):
    step, state = _compiled_step(2, 4, remat=remat)
    _check(collectives(step), state.params, passes=3)


def test_the_state_takes_the_memory_that_the_plan_predicts():
    step, state = _compiled_step(2, 4)
    mesh = sharding.make_mesh(2, 4)
    pool = BATCH * (SIDE**2 * 4 + 2) * 4 // mesh.size
    predicted = cost.tree_bytes(state, mesh) + pool
    memory = step.memory_analysis().argument_size_in_bytes
    assert memory == pytest.approx(predicted, rel=0.02)


@pytest.mark.slow
def test_fsdp_keeps_no_gathered_weights():
    """Its workspace has a part of the gradient, and no copy of all weights."""
    (split, state), (whole, _) = _compiled_step(2, 4), _compiled_step(8, 1)
    saved = (
        whole.memory_analysis().temp_size_in_bytes
        - split.memory_analysis().temp_size_in_bytes
    )
    assert saved > 0.5 * 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_the_sampler_moves_weights_alone():
    parts = _experiment(2, 4)
    params = parts.abstract_state().infer
    found = collectives(parts.make_sampler(BATCH).lower(params, 4).compile())
    weights, others = _split_bytes(found, params)
    assert weights > 0 and others < 0.05 * weights
