"""The terms of a loss and their metrics."""

import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.method.loss_terms import loss_terms

PREDICTION = jnp.arange(12.0).reshape(3, 2, 2, 1)
TARGET = jnp.ones((3, 2, 2, 1))


def _distance(error):
    values = jnp.mean(error**2, axis=(1, 2, 3))
    return values, {'half': 0.5 * values}


def test_errors_and_metrics_of_each_term():
    empty = PREDICTION[:0]
    errors, metrics = loss_terms(
        _distance, a=(PREDICTION, TARGET), b=(TARGET, TARGET), c=(empty, empty)
    )
    expected = np.mean((np.arange(12.0) - 1).reshape(3, 4) ** 2, axis=1)
    np.testing.assert_allclose(errors['a'], expected)
    np.testing.assert_array_equal(errors['b'], 0)
    assert list(metrics) == ['a/loss', 'a/half', 'b/loss', 'b/half']
    np.testing.assert_allclose(metrics['a/loss'], expected.mean())
    np.testing.assert_allclose(metrics['a/half'], expected.mean() / 2)


def test_no_gradient_flows_into_a_target():
    loss = lambda *pair: loss_terms(_distance, a=pair)[0]['a'].sum()
    prediction, target = jax.grad(loss, argnums=(0, 1))(PREDICTION, TARGET)
    np.testing.assert_allclose(prediction, (PREDICTION - TARGET) / 2)
    np.testing.assert_array_equal(target, 0)
