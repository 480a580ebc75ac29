"""EMA updates against a hand-written recursion."""

import jax.numpy as jnp
import numpy as np

from ism_jax.training import ema


def test_ema_follows_a_hand_written_recursion():
    constant = hand = 1.0
    warm = hand_warm = 1.0
    for n, value in enumerate([2.0, -1.0, 0.5, 3.0]):
        constant = ema.update({'a': constant}, {'a': value}, 0.95)['a']
        hand = 0.95 * hand + 0.05 * value
        decay = ema.warmup_decay(0.9999, jnp.int32(n))
        warm = ema.update(warm, value, decay)
        hand_warm = (1 + n) / (10 + n) * hand_warm + 9 / (10 + n) * value
    np.testing.assert_allclose(constant, hand, rtol=1e-6)
    np.testing.assert_allclose(warm, hand_warm, rtol=1e-6)
    np.testing.assert_allclose(ema.warmup_decay(0.9999, jnp.int32(10**7)), 0.9999)
