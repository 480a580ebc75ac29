"""The straight path between noise and data: its ends, points and moves along it."""

import jax
import jax.numpy as jnp


def interpolate(noise: jax.Array, data: jax.Array, t: jax.Array) -> jax.Array:
    """x_t = (1 - t) x0 + t x1; arrays [B, H, W, C], `t` [B]."""
    t = t[:, None, None, None]
    return (1 - t) * noise + t * data


def step(x: jax.Array, velocity: jax.Array, d: jax.Array) -> jax.Array:
    """x_{t+d} = x_t + d * velocity; arrays [B, H, W, C], `d` [B]."""
    return x + d[:, None, None, None] * velocity


def drop_labels(
    key: jax.Array, label: jax.Array, probability: float, null: int
) -> jax.Array:
    """Replaces each label [B] by `null` with the given probability."""
    dropped = jax.random.bernoulli(key, probability, label.shape)
    return jnp.where(dropped, null, label)


def sample_noise(
    key: jax.Array, numbers: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """The noises of the given numbers, [len(numbers), *shape].

    A noise is a key, not an array: number i is `normal(fold_in(key, i))` wherever and
    in whatever company it is made.
    """
    return jax.vmap(
        lambda number: jax.random.normal(jax.random.fold_in(key, number), shape)
    )(numbers)
