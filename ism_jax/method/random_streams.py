"""Random streams: every draw is a function of (seed, domain, number).

`stream` folds the domain, then the number, into the key of the seed.

Sample grids have their own stream, SAMPLES. If they drew from `key(seed)` itself, its
`fold_in(0)` would give both their noise 0 and the parent of the INIT stream.
"""

import jax

# Domains of randomness. Their order is fixed: a checkpoint resumes with the same draws.
INIT, OBJECTIVE, NOISE, SAMPLES, POTENTIALS = range(5)


def stream(seed_key: jax.Array, domain: int, number: int | jax.Array) -> jax.Array:
    """Key of one domain at a number: a step for OBJECTIVE, a pool for NOISE."""
    return jax.random.fold_in(jax.random.fold_in(seed_key, domain), number)


def sample_noise(
    key: jax.Array, numbers: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Standard normal noise by number, [len(numbers), *shape].

    Noise i is `normal(fold_in(key, i), shape)`. It does not depend on the other
    numbers, so any process can recompute it from the key alone.
    """
    return jax.vmap(
        lambda number: jax.random.normal(jax.random.fold_in(key, number), shape)
    )(numbers)
