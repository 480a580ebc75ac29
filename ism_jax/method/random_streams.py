"""Random streams: every draw is a function of (seed, domain, number)."""

import jax

# Domains of randomness under the seed key; each has its own stream.
INIT, OBJECTIVE, NOISE = range(3)


def stream(seed_key: jax.Array, domain: int, number) -> jax.Array:
    """Key of one domain of randomness at a step or pool number."""
    return jax.random.fold_in(jax.random.fold_in(seed_key, domain), number)
