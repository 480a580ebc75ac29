"""Meshes, how arrays are split over them, and the compiled step."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax import config as config_lib
from ism_jax import experiment
from ism_jax.models import sit
from ism_jax.runtime import sharding
from ism_jax.training import paired_pool


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


@pytest.mark.parametrize('batch,split', [(16, True), (12, False), (1, False)])
def test_batches_are_constrained_where_the_mesh_divides_them(batch, split):
    mesh = sharding.make_mesh(2, 4)
    x = jnp.zeros((batch, 3))
    constrained = jax.jit(lambda x: sharding.constrain_batch(x, mesh))(x)
    assert constrained.sharding.is_fully_replicated != split
    assert sharding.constrain_batch(x, None) is x
    one_device = sharding.make_mesh(devices=jax.devices()[:1])
    assert sharding.constrain_batch(x, one_device) is x


def _compiled_step():
    """The compiled train step of B/2 with two blocks, batch 64, on a (2, 4) mesh."""
    config = config_lib.with_argument(config_lib.default(), 'flow_matching')
    config.model.update(sit.preset('B/2') | {'depth': 2})
    config.data.update(image_size=32, channels=4)
    config.train.update(batch_size=64)
    shape = (32, 32, 4)
    parts = experiment.Experiment(
        config, mesh=sharding.make_mesh(2, 4), num_classes=4, image_shape=shape
    )
    state = jax.eval_shape(lambda: parts.init_state()[0])
    pool = paired_pool.Pool(
        jax.ShapeDtypeStruct((1, 64, *shape), jnp.float32),
        jax.ShapeDtypeStruct((1, 64), jnp.int32),
        jax.ShapeDtypeStruct((1, 64), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    shardings = sharding.tree_shardings(state, parts.mesh)
    step = parts.compile_train_step(shardings)
    return step.lower(state, pool, jax.random.key(0)).compile().as_text()


def test_attention_is_split_over_all_devices():
    """Without `constrain_batch` its scores have batch 32: only `data` splits them."""
    scores = re.findall(r'\[(\d+),12,256,256\]\S* dot\(', _compiled_step())
    assert set(scores) == {'8'}
