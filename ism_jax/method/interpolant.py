"""The straight path x_t = (1 - t) x0 + t x1 from noise x0 to data x1."""

import jax


def interpolate(noise: jax.Array, data: jax.Array, t: jax.Array) -> jax.Array:
    """x_t = (1 - t) x0 + t x1; arrays [B, H, W, C], `t` [B]."""
    t = t[:, None, None, None]
    return (1 - t) * noise + t * data


def step(x: jax.Array, velocity: jax.Array, d: jax.Array) -> jax.Array:
    """x_{t+d} = x_t + d * velocity; arrays [B, H, W, C], `d` [B]."""
    return x + d[:, None, None, None] * velocity
