"""Random streams do not overlap."""

import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.method import random_streams


def test_streams_of_all_domains_and_numbers_differ():
    seed_key = jax.random.key(0)
    domains = (
        random_streams.INIT,
        random_streams.OBJECTIVE,
        random_streams.NOISE,
        random_streams.SAMPLES,
    )
    assert domains == (0, 1, 2, 3)  # Resumed runs repeat their draws.
    keys = [seed_key, *(jax.random.fold_in(seed_key, domain) for domain in domains)]
    keys += [random_streams.stream(seed_key, d, n) for d in domains for n in range(4)]
    data = {tuple(jax.random.key_data(key).tolist()) for key in keys}
    assert len(data) == len(keys)


def test_noise_depends_on_its_number_alone():
    key = jax.random.key(0)
    two = random_streams.sample_noise(key, jnp.array([5, 2]), (3, 2))
    all_noise = random_streams.sample_noise(key, jnp.arange(6), (3, 2))
    np.testing.assert_array_equal(two, all_noise[jnp.array([5, 2])])
    expected = jax.random.normal(jax.random.fold_in(key, 5), (3, 2))
    np.testing.assert_array_equal(two[0], expected)
