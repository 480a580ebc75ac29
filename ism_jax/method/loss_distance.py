"""The distances of the losses: error [B, H, W, C] -> values [B] and their parts."""

import jax.numpy as jnp

from ism_jax.method import wavelet


def squared_error(error):
    """Pixel mean squared error, [B, H, W, C] -> [B]."""
    return jnp.mean(jnp.square(error), axis=(1, 2, 3)), {}


def wavelet_error(error, *, weights, levels: int, **options):
    """`wavelet.wavelet_distance`, with the bands' energies by name."""
    distance, energies = wavelet.wavelet_distance(
        error, weights=weights, levels=levels, **options
    )
    names = wavelet.band_names(levels)
    return distance, {f'band_{n}': energies[:, i] for i, n in enumerate(names)}
