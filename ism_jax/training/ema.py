"""Exponential moving averages of parameter trees (twin EMA).

Two averages live in the train state: `target` forgets fast (0.95) and makes the
targets of guidance and self-consistency; `infer` forgets slowly (0.9999) and makes
the samples (iSM, arXiv 2510.21250, section 4.4). One slow average for both is what
shortcut models do; its targets lag far behind the network.
"""

import jax
import jax.numpy as jnp


def warmup_decay(decay: float, num_updates: jax.Array) -> jax.Array:
    """Decay for update number `num_updates` (0 for the first), at most `decay`.

    min(decay, (1 + n) / (10 + n)): the average starts by following the parameters and
    never spans more than about a ninth of the run, so that a short run does not
    sample from its initialisation.
    """
    n = num_updates.astype(jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))


def update(average, params, decay):
    """One step of `average <- decay * average + (1 - decay) * params`, leaf by leaf."""
    # Written as an increment: near decay = 1 it loses less to float32 rounding.
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)
