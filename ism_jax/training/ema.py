"""Exponential moving averages of parameter trees (twin EMA).

The train state has two of them: the target EMA (`target`, decay 0.95) makes the targets
of guidance and self-consistency, and sampling uses the inference EMA (`infer`, 0.9999;
iSM, arXiv 2510.21250, section 4.4). Shortcut models use one slow EMA for both, whose
targets lag far behind the network.
"""

import jax
import jax.numpy as jnp


def warmup_decay(decay: float, num_updates: jax.Array) -> jax.Array:
    """Decay of update n = `num_updates` (0 for the first): min(decay, (1+n) / (10+n)).

    The EMA starts close to the parameters and never spans more than about a ninth of
    the run, so that a short run does not sample from its initialisation.
    """
    n = num_updates.astype(jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))


def update(ema, params, decay):
    """`decay * ema + (1 - decay) * params`, leaf by leaf."""
    # As an increment, which loses less to float32 rounding near decay = 1.
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), ema, params)
