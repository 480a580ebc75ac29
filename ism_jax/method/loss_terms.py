"""Terms of a loss: the distance of predictions to their targets, with its metrics."""

from collections.abc import Mapping
import math

import chex
import jax
import jax.numpy as jnp

from ism_jax.method.loss_distance import Distance


def loss_terms(
    distance: Distance, **terms: tuple[jax.Array, jax.Array]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Errors distance(prediction - sg(target)) and metrics of the terms of a loss.

    Args:
      distance: error [B, H, W, C] -> values [B] and their parts {name: [B]}.
      **terms: name=(prediction, target), both [B_name, H, W, C].

    Returns:
      errors {name: [B_name]} and the metrics of `term_metrics` with the mean error as
      the loss. Terms without samples (B_name = 0) are left out of both.
    """
    errors, metrics = {}, {}
    for name, (prediction, target) in terms.items():
        chex.assert_equal_shape([prediction, target])
        if prediction.shape[0]:
            errors[name], parts = distance(prediction - jax.lax.stop_gradient(target))
            metrics |= term_metrics(name, errors[name].mean(), parts)
    return errors, metrics


def term_metrics(
    name: str, loss: jax.Array, parts: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """{'name/loss': loss, 'name/part': mean of the part, ...}, scalars."""
    means = {f'{name}/{part}': values.mean() for part, values in parts.items()}
    return {f'{name}/loss': loss, **means}


def adaptive_loss(
    errors: Mapping[str, jax.Array], shape: tuple[int, ...], *, power: float, eps: float
) -> jax.Array:
    """Sum over all terms of |e|^2 / sg( |e|^2 + eps )^power, divided by B; a scalar.

    The adaptive weight of MeanFlow (arXiv 2505.13447, equation 22); 0 is no weight.

    Args:
      errors: {name: mean of e^2 over a sample, [B_name]}, see `loss_terms`.
      shape: (B, H, W, C) of the batch.
      power: exponent of the weight.
      eps: added to |e|^2, the sum over a sample.
    """
    size, dimension = shape[0], math.prod(shape[1:])

    def weighted_sum(square):
        weight = jax.lax.stop_gradient(square + eps) ** power
        return jnp.sum(square / weight)

    return sum(weighted_sum(dimension * error) / size for error in errors.values())
