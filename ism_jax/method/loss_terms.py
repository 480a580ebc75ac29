"""Terms of a loss: the distance of predictions to their targets, with its metrics."""

import chex
import jax

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
