"""Distances of the losses: error [B, H, W, C] -> one value per sample and its parts."""

from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp

from ism_jax.method.wavelet import band_energies, band_names

Distance = Callable[[jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def squared_error(error: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared error over the pixels, [B, H, W, C] -> [B]; it has no parts."""
    return jnp.mean(jnp.square(error), axis=(1, 2, 3)), {}


def pseudo_huber(square: jax.Array, scale: float) -> jax.Array:
    """Pseudo-Huber loss sqrt(e^2 + c^2) - c of squares e^2, with c the scale.

    It is e^2 / 2c for small errors, and its gradient with respect to e is below 1 (iCT,
    arXiv 2310.14189).
    """
    return jnp.sqrt(square + scale**2) - scale


def wavelet_error(
    error: jax.Array, *, wavelet: str, levels: int, weights: Sequence[float]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared error of each sample, weighted over the wavelet bands.

    Args:
      error: [B, H, W, C], prediction - target.
      wavelet: name of a wavelet, see `wavelet.decompose`.
      levels: number of levels.
      weights: one per band, from `wavelet.band_weights`.

    Returns:
      The weighted sum of the band energies [B] and the energies {'band_a5': [B], ...},
      all mean squares (pixel units squared).
    """
    energies = band_energies(error, wavelet=wavelet, levels=levels)
    weights = jnp.asarray(weights, jnp.float32)
    chex.assert_shape(weights, energies.shape[1:])  # A single weight would broadcast.
    names = band_names(levels)
    return (
        jnp.sum(energies * weights[None], axis=1),
        {f'band_{name}': energies[:, i] for i, name in enumerate(names)},
    )
