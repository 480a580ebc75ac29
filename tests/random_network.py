"""A small network without zeros, so that every path counts, and its inputs."""

import functools

import jax
import numpy as np

from ism_jax.models import conditions

SHAPE = (8, 8, 3)
SMALL = dict(num_classes=5, patch_size=2, hidden_size=32, depth=3, num_heads=2)


def random_params(model, seed=0):
    params = conditions.init_params(model, SHAPE, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    leaves = [leaf + 0.1 * rng.normal(size=leaf.shape).astype('f') for leaf in leaves]
    return jax.tree.unflatten(tree, leaves)


def apply(model, params, *inputs, **options):
    """The network's output, compiled as one program."""
    return _compiled(model)({'params': params}, *inputs, **options)


@functools.cache
def _compiled(model):
    return jax.jit(model.apply, static_argnames='with_velocity')


def random_inputs(batch=4, d=0.0, w=0.0):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(batch, *SHAPE)).astype(np.float32)
    t = rng.uniform(size=batch).astype(np.float32)
    label = np.arange(batch) % 6
    return x, t, np.full(batch, d, 'f'), np.full(batch, w, 'f'), label
