"""Fields, batches and subjects whose diagnosis is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax import objectives
from ism_jax.diagnosis.subject import Subject
from ism_jax.sampling.sampler import Sampler

NULL = 2
SHAPE = (8, 8, 1)


def make_normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_batch(size=6):
    """x, t, label; times on the grid of 1/8."""
    x = jnp.asarray(make_normal(size, 2, 2, 1))
    label = jnp.arange(size, dtype=jnp.int32) % NULL
    return x, jnp.arange(size) % 2 * 0.5, label


def affine(x, t, label):
    """A field with v(null) affine in x and v(c) - v(null) a function of t alone."""
    push = jnp.where(label == NULL, 0.0, (1 + t) * (1 + label))
    return (t - 0.7)[:, None, None, None] * x + push[:, None, None, None]


def curved(x, t, label):
    """A field for which proposition 1 does not hold."""
    scale = jnp.where(label == NULL, 0.3, 1.0 + label) + t
    return jnp.sin(2 * x) * scale[:, None, None, None]


def guided_network(x, t, d, w, label):
    """Instantaneous velocities with guidance inside the network."""
    del t, d
    push = (1 + w) * jnp.where(label == NULL, 0.0, label + 1.0)
    return push[:, None, None, None] - 0.5 * x


def make_subject(method, network, **options):
    """A subject with any function as its network."""
    objective = objectives.load(method)(num_classes=NULL, **options)
    size = 32
    noise, data = make_normal(2, size, *SHAPE)

    def apply(params, *inputs):
        return params * network(*inputs)

    params = jnp.ones(())
    return Subject(
        method=method,
        objective=objective,
        sampler=Sampler(objective, apply, SHAPE, batch_size=size),
        parameter_sets={'online': params, 'target': 0.9 * params, 'infer': params},
        apply=jax.jit(
            lambda params, *inputs: objective.velocity(apply, params, *inputs)
        ),
        noise=noise,
        data=data,
        label=np.arange(size, dtype=np.int32) % NULL,
        pool_size=size,
        coupling='independent',
        seed=0,
    )


@pytest.fixture
def null():
    return NULL


@pytest.fixture
def normal():
    return make_normal


@pytest.fixture
def batch():
    return make_batch


@pytest.fixture
def affine_field():
    return affine


@pytest.fixture
def curved_field():
    return curved


@pytest.fixture
def network():
    return guided_network


@pytest.fixture
def subject():
    return make_subject


@pytest.fixture
def intrinsic():
    """A network with guidance scale w at every step size."""

    def network(x, t, d, w, label):
        del t, d
        push = (1 + w) * jnp.where(label == NULL, 0.0, label + 1.0)
        return push[:, None, None, None] + 0 * x

    return make_subject('ism', network, base_steps=8, guidance_interval=0.0)


@pytest.fixture
def baked():
    """A network whose large steps have the guidance that proposition 1 predicts."""
    base, w = 8, 0.5

    def network(x, t, d, _, label):
        push = jnp.where(label == NULL, 0.0, label + 1.0)
        doublings = jnp.where(d > 0, jnp.log2(jnp.maximum(d, 1 / base) * base), 0.0)
        return (push * (1 + w) ** doublings)[:, None, None, None] + 0 * x

    options = dict(base_steps=base, guidance=w, cfg_levels='all')
    return make_subject('shortcut', network, **options)
