"""A Gaussian flow and the networks that equal its exact map, one for each method.

An ideal network returns what the method's network would after perfect training.
"""

from gaussian_flow_map import GaussianFlow
import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.method.training_batch import Batch, Inputs

# Class means are +-0.8 times the rows of a Hadamard matrix. Over all classes they have
# mean 0 and covariance 0.64 I, so the regression of the velocity on x alone is that of
# N(0, S^2 I), S^2 = s^2 + 0.64, with only eight classes.
_ROW = np.array([[1, 1], [1, -1]])
_MEANS = 0.8 * np.concatenate([np.kron(_ROW, _ROW), -np.kron(_ROW, _ROW)])
NULL = 8
SHAPE = (2, 2, 1)
FLOW = GaussianFlow(_MEANS.reshape(NULL, *SHAPE), 0.5, float(np.sqrt(0.25 + 0.64)))
flow = jax.jit(FLOW.apply)


def square(error):
    return jnp.mean(error**2, axis=(1, 2, 3)), {}


def expand(array):
    return array[:, None, None, None]


def batch_of(key, size):
    """A batch of the flow's data with random labels."""
    keys = jax.random.split(key, 3)
    label = jax.random.randint(keys[0], (size,), 0, NULL)
    noise = jax.random.normal(keys[1], (size, *SHAPE))
    return Batch(noise, FLOW.sample_data(keys[2], label), label)


def grid_points(size, seed=0):
    """x, t, label with t a multiple of 1/128 and t + d <= 1 for d up to 1/2."""
    rng = np.random.default_rng(seed)
    t = jnp.asarray(rng.integers(0, 64, size) / 128, jnp.float32)
    label = jnp.asarray(rng.integers(0, NULL, size))
    x = jnp.asarray(rng.normal(size=(size, *SHAPE)), jnp.float32)
    return x, t, label


def plain(params, x, t, d, w, label):
    """Ignores w."""
    return flow(params, x, t, d, jnp.zeros_like(w), label)


def guided(guidance):
    """Training fixes w, and the network is not conditioned on it."""

    def apply(params, x, t, d, w, label):
        return flow(params, x, t, d, jnp.full_like(w, guidance), label)

    return apply


def guided_in_steps(guidance):
    """SM: steps are guided, the velocity is not."""

    def apply(params, x, t, d, w, label):
        return flow(params, x, t, d, guidance * (d > 0), label)

    return apply


def guided_from(begin):
    """iSM: guidance applies from time `begin`."""

    def apply(params, x, t, d, w, label):
        before = jnp.clip(begin - t, 0, d)
        middle = FLOW.flow_map(x, t, before, jnp.zeros_like(w), label)
        end = FLOW.flow_map(middle, t + before, d - before, w, label)
        mean = (end - x) / expand(jnp.where(d > 0, d, 1.0))
        now = FLOW.velocity(x, t, jnp.where(t >= begin, w, 0.0), label)
        return jnp.where(expand(d > 0), mean, now)

    return apply


def guided_inside(params, x, t, d, w, label, interval):
    """Guidance applies inside the interval, which is an input."""
    begin, end = interval.T
    steps = [
        jnp.clip(begin - t, 0, d),
        jnp.clip(jnp.minimum(end, t + d) - jnp.maximum(begin, t), 0, d),
        jnp.clip(t + d - jnp.maximum(end, t), 0, d),
    ]
    position, time = x, t
    for step, scale in zip(steps, (0, w, 0), strict=True):
        position = FLOW.flow_map(position, time, step, scale * jnp.ones_like(w), label)
        time = time + step
    mean = (position - x) / expand(jnp.where(d > 0, d, 1.0))
    acting = jnp.where((t >= begin) & (t <= end), w, 0.0)
    return jnp.where(expand(d > 0), mean, FLOW.velocity(x, t, acting, label))


def with_head(network):
    """The network with its velocity at d = 0 as a second output, on request."""

    def apply(params, x, t, d, *rest, with_velocity=False):
        mean = network(params, x, t, d, *rest)
        if not with_velocity:
            return mean
        return mean, network(params, x, t, jnp.zeros_like(d), *rest)

    return apply


def to_the_end(objective):
    """iCT: the mean velocity up to the end at sigma_min, at d = 0."""

    def apply(params, x, t, d, w, label):
        rest = 1 / (1 + objective.sigma_min) - t
        return flow(params, x, t, jnp.maximum(rest, 0.0), w, label)

    return apply


def unscaled(objective):
    """IMM: the input has unit standard deviation."""

    def apply(params, x, t, d, w, label):
        scale = jnp.sqrt((t * objective.data_std) ** 2 + (1 - t) ** 2)
        return flow(params, expand(scale) * x, t, d, w, label)

    return apply


def moving_inputs(size=64):
    """Inputs of the network with step sizes d > 0 and w = 0."""
    x, t, label = grid_points(size)
    d = jnp.asarray(np.random.default_rng(1).uniform(0.01, 0.5, size), jnp.float32)
    return Inputs(x, t, d, jnp.zeros_like(t), label)


def curved(params, x, t, d, w, label):
    """No flow: a nonlinear function of all inputs but w."""
    scalar = jnp.sin(3 * t) + d**2 + 0.7 * d * t + 0.1 * label
    return jnp.cos(x * (1 + expand(d))) * expand(scalar)
