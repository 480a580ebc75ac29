"""Learning-rate schedules, clipping and weight decay, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.training import optimizer


def test_learning_rates():
    rate = optimizer.learning_rate(
        peak=1.0, schedule='cosine', warmup_steps=10, num_steps=110
    )
    values = [float(rate(n)) for n in (0, 9, 10, 60, 110)]
    np.testing.assert_allclose(values, [0.1, 0.91, 1.0, 0.5, 0.0], atol=1e-6)
    for name, end in (('constant', 1.0), ('linear', 0.0)):
        rate = optimizer.learning_rate(
            peak=1.0, schedule=name, warmup_steps=0, num_steps=10
        )
        assert float(rate(0)) == 1.0 and float(rate(10)) == end


def test_clipping_by_norm_and_weight_decay_of_kernels():
    params = {'kernel': jnp.ones(4), 'bias': jnp.ones(4)}
    big = {'kernel': 100 * jnp.ones(4), 'bias': jnp.zeros(4)}
    options = dict(b1=0.0, b2=0.0, eps=1.0)
    constant = lambda _: 1.0

    def update(grad, **more):
        tx = optimizer.adamw(
            constant, **options | dict(weight_decay=0.0, clip_norm=0.0) | more
        )
        return tx.update(grad, tx.init(params), params)[0]

    # g / (|g| + 1): 100 / 101 unclipped, 0.5 / 1.5 when clipped to norm 1.
    np.testing.assert_allclose(update(big)['kernel'], -100 / 101, rtol=1e-5)
    np.testing.assert_allclose(update(big, clip_norm=1.0)['kernel'], -1 / 3, rtol=1e-5)
    zero = jax.tree.map(jnp.zeros_like, params)
    decayed = update(zero, weight_decay=0.1)
    np.testing.assert_allclose(decayed['kernel'], -0.1, rtol=1e-6)
    np.testing.assert_array_equal(decayed['bias'], 0)
