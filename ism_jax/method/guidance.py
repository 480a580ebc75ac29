"""Intrinsic guidance: the strength is an input of the network.

Classifier-free guidance extrapolates from the unconditional to the conditional
velocity at every sampling step, with two network calls. Here the network learns that
extrapolation itself, as a function of its input `w`, so that sampling takes one call
whatever the guidance, and the scale does not compound when steps are composed (iSM,
arXiv 2510.21250, section 4.1). In classifier-free guidance scales g of other papers,
`g = 1 + w`.
"""

import jax
import jax.numpy as jnp
import numpy as np


def guidance_values(
    guidance_max: float, guidance_step: float, *, include_zero: bool
) -> np.ndarray:
    """The strengths that training draws from: {0, step, 2 step, ..., max}."""
    count = round(guidance_max / guidance_step)
    return np.arange(
        0 if include_zero else 1, count + 1, dtype=np.float32
    ) * np.float32(guidance_step)


def sample_guidance(key: jax.Array, num: int, values: np.ndarray) -> jax.Array:
    """Draws [num] strengths uniformly from `values`."""
    return jax.random.choice(key, jnp.asarray(values), (num,))


def interval_guidance(w: jax.Array, t: jax.Array, interval: float) -> jax.Array:
    """Guidance that acts at time t: `w` from `interval` on, 0 before it.

    The network is shown `w` itself at every t, so that a single step from t = 0 can
    carry the guidance of the rest of the path. An interval of 0 guides everywhere.
    """
    return jnp.where(t >= interval, w, 0.0)


def guided_velocity(
    velocity: jax.Array,
    conditional: jax.Array,
    unconditional: jax.Array,
    w: jax.Array,
) -> jax.Array:
    """velocity + w (conditional - unconditional), all [B, H, W, C] but `w` [B].

    The target of intrinsic guidance with velocity = x1 - x0: the data's own velocity
    carries the condition, the teacher gives only the direction of guidance.
    """
    return velocity + w[:, None, None, None] * (conditional - unconditional)


def classifier_free_velocity(
    apply, params, x, t, d, label: jax.Array, w: jax.Array, null: int
) -> jax.Array:
    """s(null) + (1 + w) (s(c) - s(null)): classifier-free guidance, in one call.

    Ho and Salimans, arXiv 2207.12598. The network itself is not told `w`.

    Args:
      apply, params: the network and its parameters.
      x: [B, H, W, C]; t, d, label, w: [B].
      null: label of no class.
    """
    double = lambda array: jnp.concatenate([array, array])
    labels = jnp.concatenate([label, jnp.full_like(label, null)])
    both = apply(
        params, double(x), double(t), double(d), jnp.zeros(2 * w.shape[0]), labels
    )
    conditional, unconditional = jnp.split(both, 2)
    return guided_velocity(conditional, conditional, unconditional, w)
