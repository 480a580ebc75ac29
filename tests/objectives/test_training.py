"""Training with every objective brings a small network near the exact map."""

import itertools

from ideal_networks import FLOW, NULL, SHAPE, batch_of, expand, square
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ism_jax import objectives
from ism_jax.method import time_grid
from ism_jax.objectives import (
    alpha_flow,
    consistency,
    flow_matching,
    imf,
    imm,
    ism,
    meanflow,
    shortcut,
)

_IMM = imm.Objective(NULL)
WIDTH = 64


def _initial(key):
    """Parameters of `_small_network`, which is 0 at first."""
    sizes = (6 + NULL + 1, WIDTH, WIDTH, 1 + np.prod(SHAPE))
    keys = jax.random.split(key, 3)
    weights = [
        jax.random.normal(k, shape) / np.sqrt(shape[0])
        for k, shape in zip(keys, itertools.pairwise(sizes), strict=True)
    ]
    weights[-1] *= 0
    return [(weight, jnp.zeros((1, weight.shape[1]))) for weight in weights]


def _small_network(params, x, t, d, w, label, interval=None):
    """a x + b, with a and b a perceptron of t, d, w, the interval and the label."""
    if interval is None:
        interval = jnp.tile(jnp.array([[0.0, 1.0]]), (t.shape[0], 1))
    scalars = [t, d, jnp.sqrt(d + 1e-4), 0.3 * w, *(w[None] * interval.T)]
    scalars = jnp.stack(scalars, axis=1)
    hidden = jnp.concatenate([scalars, jax.nn.one_hot(label, NULL + 1)], axis=1)
    for number, (weight, bias) in enumerate(params):
        hidden = hidden @ weight + bias
        if number < 2:
            hidden = jax.nn.silu(hidden)
    return expand(hidden[:, 0]) * x + hidden[:, 1:].reshape(-1, *SHAPE)


def _train(objective, *, num_steps=2000, size=256, rate=1e-2):
    """Initial parameters and the inference EMA after training."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps))
    average = lambda decay, old, new: jax.tree.map(
        lambda a, b: decay * a + (1 - decay) * b, old, new
    )

    def body(state, step):
        params, target, infer, moments = state
        key_batch, key = jax.random.split(jax.random.fold_in(jax.random.key(1), step))
        gradient = jax.grad(
            lambda params: objective(
                _small_network,
                params,
                target,
                batch_of(key_batch, size),
                key,
                distance=square,
                progress=step / num_steps,
            )[0]
        )(params)
        updates, moments = optimizer.update(gradient, moments)
        params = optax.apply_updates(params, updates)
        target, infer = average(0.95, target, params), average(0.98, infer, params)
        return (params, target, infer, moments), None

    first = _initial(jax.random.key(0))
    state = first, first, first, optimizer.init(first)
    # Thousands of steps of a tiny network: worth optimizing.
    run = jax.jit(
        lambda state: jax.lax.scan(body, state, jnp.arange(num_steps))[0],
        compiler_options={'xla_backend_optimization_level': 3},
    )
    return first, run(state)[2]


def _map_error(objective, params, steps, w):
    """RMS error of the sampler's map from noise to data.

    It is relative to the RMS deviation of the true map from the identity, so a network
    that returns 0 has an error of 1.
    """
    size = 2048
    keys = jax.random.split(jax.random.key(99), 3)
    noise = jax.random.normal(keys[0], (size, *SHAPE))
    label = jax.random.randint(keys[1], (size,), 0, NULL)
    guidance, zero = jnp.full((size,), w), jnp.zeros((size,))
    times = time_grid.times_and_sizes(objective.schedule(steps))
    sample = objective.sample(
        _small_network, params, noise, label, guidance, *times, keys[2]
    )
    exact = FLOW.flow_map(noise, zero, zero + 1, guidance, label)
    square = jnp.mean((sample - exact) ** 2) / jnp.mean((exact - noise) ** 2)
    return float(jnp.sqrt(square))


# Objective, steps and guidance scale of the sampler, and the largest error of
# four seeds.
TRAINED = {
    'flow_matching': (flow_matching.Objective(NULL), 128, 0.5, 0.013),
    'shortcut': (
        shortcut.Objective(NULL, guidance=0.5, bootstrap_every=2),
        1,
        0.5,
        0.071,
    ),
    'ism': (
        ism.Objective(
            NULL, guidance_interval=0.0, guidance_max=2.0, batch_split=(1, 1, 2)
        ),
        1,
        1.0,
        0.053,
    ),
    'ism derivative': (
        ism.Objective(
            NULL,
            guidance_interval=0.0,
            guidance_max=2.0,
            batch_split=(1, 1, 2),
            consistency='derivative',
            step_draw='ends',
        ),
        (0.6, 0.4),
        1.0,
        0.053,
    ),
    'imf': (
        imf.Objective(NULL, tangent='boundary', guidance_max=2.0, time_std=2.0),
        1,
        0.5,
        0.062,
    ),
    # Wider times than the default, which rarely draws a step over the whole path.
    'meanflow': (
        meanflow.Objective(NULL, guidance=0.5, batch_split=(1, 1), time_std=2.0),
        1,
        0.5,
        0.055,
    ),
    'alpha_flow': (
        alpha_flow.Objective(NULL, guidance=0.5, batch_split=(1, 1), time_std=2.0),
        1,
        0.5,
        0.035,
    ),
    'consistency': (consistency.Objective(NULL, last_intervals=160), 1, 0.0, 0.038),
    'imm': (_IMM, 1, 0.0, 0.060),
}


@pytest.mark.parametrize('name', [*TRAINED])
def test_training_ends_near_the_exact_map(name):
    assert {*objectives.names()} <= {*TRAINED}
    objective, steps, w, measured = TRAINED[name]
    first, trained = _train(objective)
    errors = [_map_error(objective, params, steps, w) for params in (first, trained)]
    assert errors[1] < 2 * measured < 0.5 < errors[0], errors
