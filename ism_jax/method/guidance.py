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


def power_law_guidance(
    key: jax.Array, num: int, guidance_max: float, beta: float
) -> jax.Array:
    """`num` scales w in [0, guidance_max] with density proportional to (1 + w)^-beta.

    beta = 0 is uniform in w, and beta = 1 is uniform in log(1 + w) (improved MeanFlow,
    arXiv 2512.02012).
    """
    u = jax.random.uniform(key, (num,))
    if beta == 1:
        return jnp.expm1(u * np.log1p(guidance_max))
    # The inverse of the distribution function, which is linear in (1 + w)^(1 - beta).
    power = 1 - beta
    top = np.float32((1 + guidance_max) ** power - 1)
    return (1 + u * top) ** (1 / power) - 1


def sample_interval(key: jax.Array, num: int) -> jax.Array:
    """Guidance intervals [num, 2]: start ~ U(0, 1/2) and end ~ U(1/2, 1).

    The distribution of improved MeanFlow (arXiv 2512.02012).
    """
    return jax.random.uniform(key, (num, 2), maxval=0.5) + jnp.array([[0.0, 0.5]])


def interval_guidance(
    w: jax.Array, t: jax.Array, start: float | jax.Array, end: float | jax.Array = 1.0
) -> jax.Array:
    """The guidance scale that acts at time t: w where start <= t <= end, else 0.

    The network is conditioned on w itself at every t, so that a single step from t = 0
    can apply the guidance of the rest of the path.
    """
    return jnp.where((t >= start) & (t <= end), w, 0.0)


def guided_velocity(
    velocity: jax.Array, conditional: jax.Array, unconditional: jax.Array, w: jax.Array
) -> jax.Array:
    """Velocity + w (conditional - unconditional); all [B, H, W, C] except w [B].

    With velocity = x1 - x0 this is the target of intrinsic guidance: x1 - x0 gives the
    conditional velocity, and the teacher only the direction of guidance.
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
    apply,
    params,
    x,
    t,
    d,
    label: jax.Array,
    w: jax.Array,
    null: int,
    guided: np.ndarray | None = None,
) -> jax.Array:
    """s(c) + w (s(c) - s(null)), [B, H, W, C], in one call on up to 2 B samples.

    The network `apply(params, x, t, d, w, label)` is conditioned on w = 0; x is
    [B, H, W, C], and t, d, w and label are [B]. If `guided` are the indices of some
    samples, the others have s(c), and do not run without a label.
    """
    some = lambda array: array if guided is None else array[guided]
    append = lambda array: jnp.concatenate([array, some(array)])
    labels = jnp.concatenate([label, some(jnp.full_like(label, null))])
    velocity = apply(
        params, append(x), append(t), append(d), jnp.zeros(len(labels)), labels
    )
    conditional, unconditional = velocity[: len(x)], velocity[len(x) :]
    if guided is not None:
        unconditional = conditional.at[guided].set(unconditional)
    return guided_velocity(conditional, conditional, unconditional, w)
