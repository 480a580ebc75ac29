"""Guidance: label dropout, classifier-free guidance and intrinsic guidance.

Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) extrapolates from the
unconditional to the conditional velocity,

    s_w(c) = s(null) + (1 + w) (s(c) - s(null)) = s(c) + w (s(c) - s(null)),

with two network calls per sampling step. In intrinsic guidance (iSM, arXiv 2510.21250,
section 4.1) the network learns s_w as a function of its input w. Sampling then takes
one call per step at any w, and guidance does not compound when steps are composed.

The guidance scale w is 0 without guidance; papers that write g for 1 + w start at 1.
"""

import jax
import jax.numpy as jnp
import numpy as np


def drop_labels(
    key: jax.Array, label: jax.Array, probability: float, null: int
) -> jax.Array:
    """Labels [B], each replaced by the null label with the given probability."""
    dropped = jax.random.bernoulli(key, probability, label.shape)
    return jnp.where(dropped, null, label)


def guidance_values(
    guidance_max: float, guidance_step: float, *, include_zero: bool
) -> np.ndarray:
    """The guidance scales w used in training: [0,] step, 2 step, ..., max."""
    count = round(guidance_max / guidance_step)
    return np.arange(
        0 if include_zero else 1, count + 1, dtype=np.float32
    ) * np.float32(guidance_step)


def sample_guidance(key: jax.Array, num: int, values: np.ndarray) -> jax.Array:
    """`num` guidance scales w, drawn uniformly from `values`."""
    return jax.random.choice(key, jnp.asarray(values), (num,))


def interval_guidance(w: jax.Array, t: jax.Array, interval: float) -> jax.Array:
    """The guidance scale that acts at time t: w where t >= interval, else 0.

    The network is conditioned on w itself at every t, so that a single step from t = 0
    can apply the guidance of the rest of the path. An interval of 0 guides everywhere.
    """
    return jnp.where(t >= interval, w, 0.0)


def guided_velocity(
    velocity: jax.Array, conditional: jax.Array, unconditional: jax.Array, w: jax.Array
) -> jax.Array:
    """Velocity + w (conditional - unconditional); all [B, H, W, C] except w [B].

    With velocity = x1 - x0 this is the target of intrinsic guidance: the pair gives the
    conditional velocity, and the teacher gives only the direction of guidance.
    """
    return velocity + w[:, None, None, None] * (conditional - unconditional)


def optional_guidance(apply, params, x, t, d, label, w, null: int) -> jax.Array:
    """`classifier_free_velocity` if any w is not 0; otherwise one call on B samples."""
    return jax.lax.cond(
        jnp.any(w != 0),
        lambda: classifier_free_velocity(apply, params, x, t, d, label, w, null),
        lambda: apply(params, x, t, d, jnp.zeros_like(w), label),
    )


def classifier_free_velocity(
    apply, params, x, t, d, label: jax.Array, w: jax.Array, null: int
) -> jax.Array:
    """s(c) + w (s(c) - s(null)), [B, H, W, C], in one call on 2 B samples.

    The network `apply(params, x, t, d, w, label)` is conditioned on w = 0; x is
    [B, H, W, C], and t, d, w and label are [B].
    """
    double = lambda array: jnp.concatenate([array, array])
    labels = jnp.concatenate([label, jnp.full_like(label, null)])
    both = apply(
        params, double(x), double(t), double(d), jnp.zeros(2 * w.shape[0]), labels
    )
    conditional, unconditional = jnp.split(both, 2)
    return guided_velocity(conditional, conditional, unconditional, w)
