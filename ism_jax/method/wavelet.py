"""Multi-level wavelet distance: squared error, re-weighted over the sub-bands.

iSM (arXiv 2510.21250, section 4.2) counters the frequency bias of shortcut models with
a distance that weights several resolutions. The transform W is linear, so it is applied
once, to the error `e = prediction - target`:

    distance(e) = 1/D sum_b lambda_b ||(W e)_b||^2,     D = H W C,

over the bands b: the approximation of the coarsest level L and three details
(horizontal, vertical, diagonal) of every level L..1, 1 being the finest.

**Parseval.** W is orthonormal (an orthogonal wavelet, periodized), so with all
lambda_b = 1 the distance equals the pixel mean squared error, for any L. It differs
from pixel error only in its weights: an error in band b counts lambda_b times its
pixel error. A constant lies in the approximation, a checkerboard in the finest
diagonal, and for Haar a cosine of k periods over a side of n mostly in the details
around level log2(n / 2k).

Weightings by name, and the distance of four errors of unit mean square, whose pixel
error is 1 (32x32, Haar, L = 5; measured by `tests/method/test_wavelet.py`; cos k is
cos(2 pi k x / 32 + phase) at x = 0, 1, ... with phase 0):

    name              lambda: detail j / approx.  constant  cos 4  cos 8  checker
    uniform           1 / 1                       1         1      1      1
    averaging_mean    1 / 1                       1         1      1      1
    orthonormal_mean  4^j / 4^L                   1024      20     10     4
    nested            j / L                       5         2.0    1.5    1
    detail (default)  z 2^-(j-1)/2 / z 2^-L/2     0.19      0.79   0.94   1.10
    equal_variance    z / Var(target)             depends on the data

Haar bands leak, so the distance of a cosine depends on its phase: for cos 8 it is
10 - 6 sin(2 phase) with `orthonormal_mean` and 1.5 - sin(2 phase) / 2 with `nested`;
for cos 4 it ranges over 14 .. 55 and 1.9 .. 2.7. It is never below pixel error.

`averaging_mean` is the mean over a band of the squared coefficients of the averaging
(not orthonormal) Haar transform: at level j they are 4^j times smaller and 4^j times
fewer, so the two cancel and all weights are 1. `orthonormal_mean` is the mean over a
band of the squared orthonormal coefficients, and `nested` counts the approximation of
every level as well as its details; both give low frequencies more weight than pixel
error does, the opposite of emphasising detail. `detail` halves the weight for every two
levels from the finest to the approximation: natural images have amplitude spectra near
1/f, so coarse bands dominate a pixel error of the velocity by orders of magnitude. The
exponent 1/2 cancels part of this and still leaves a gradient to the approximation,
which holds the layout of the image. `equal_variance` cancels it fully: a band's weight
is the inverse of the variance of the velocity target there. The factor z makes the mean
weight over all coefficients 1, so that white noise counts as in pixel error and
weightings are comparable at one learning rate.

Every weighting is a positive definite quadratic form, so the minimiser of the expected
distance is the conditional mean, as flow matching requires:
grad E distance(p - T) = 2/D W^T Lambda W (p - E T) vanishes only at p = E T.

Biorthogonal wavelets work too, but W is then not orthonormal and Parseval does not
hold: `uniform` is a quadratic form other than pixel error, still positive definite.
"""

from collections.abc import Sequence
import math

import chex
import jax
import jax.numpy as jnp
import jaxwt
import numpy as np
import pywt

WEIGHTINGS = (
    'detail',
    'equal_variance',
    'uniform',
    'averaging_mean',
    'orthonormal_mean',
    'nested',
)
DEFAULT_WEIGHTING = 'detail'
# Weight of a level relative to the next finer one, for `detail`.
DETAIL_DECAY = 0.5**0.5


def parse_weighting(text: str) -> str | list[float]:
    """A weighting's name, or the numbers of '1,2,3'."""
    try:
        return [float(part) for part in str(text).split(',')]
    except ValueError:
        return text


def band_names(levels: int) -> tuple[str, ...]:
    """Bands in order: ('a5', 'h5', 'v5', 'd5', 'h4', ..., 'd1') for 5 levels."""
    details = (f'{o}{level}' for level in range(levels, 0, -1) for o in 'hvd')
    return (f'a{levels}', *details)


def wavelet_names() -> list[str]:
    """The discrete wavelets of PyWavelets, which `decompose` takes."""
    return pywt.wavelist(kind='discrete')


def max_levels(height: int, width: int) -> int:
    """Number of times that both sides of an image can be halved exactly."""
    common = math.gcd(height, width)
    return int(math.log2(common & -common))


def decompose(images: jax.Array, *, wavelet: str, levels: int) -> tuple[jax.Array, ...]:
    """The periodized wavelet transform, in float32.

    Args:
      images: [B, H, W, C] of any float type.
      wavelet: one of `wavelet_names`.
      levels: at most `max_levels(H, W)`.

    Returns:
      One [B, h, w, C] array for each of `band_names(levels)`, the coefficients of
      `pywt.wavedec2(..., mode='periodization')` in the units of `images`.
    """
    chex.assert_rank(images, 4)
    chex.assert_is_divisible(math.gcd(*images.shape[1:3]), 2**levels)
    approximation = images.astype(jnp.float32)
    details = []
    for _ in range(levels):
        height, width = approximation.shape[1:3]
        bands = jnp.einsum(
            'ih,jw,bhwc->bijc',
            _analysis_matrix(wavelet, height),
            _analysis_matrix(wavelet, width),
            approximation,
            # By default TPUs multiply in bfloat16 and GPUs in TF32.
            precision=jax.lax.Precision.HIGHEST,
        )
        low, high = np.s_[:, : height // 2], np.s_[:, height // 2 :]
        left, right = np.s_[:, :, : width // 2], np.s_[:, :, width // 2 :]
        approximation = bands[low][left]
        details = [bands[high][left], bands[low][right], bands[high][right], *details]
    return (approximation, *details)


def _analysis_matrix(wavelet: str, side: int) -> jax.Array:
    """One level in one dimension, [side, side]: low-pass rows, then high-pass rows.

    This is jaxwt's transform of the identity. Products with these matrices take the
    same time for every wavelet; jaxwt's two-dimensional convolutions take 2 (Haar) to
    30 (db4) times as long on a CPU. Caching the matrices gained nothing measurable.
    """
    # jaxwt has no periodization (one coefficient per pixel). It is a circular extension
    # by half a filter, without the coefficients past the ends.
    half = pywt.Wavelet(wavelet).dec_len // 2 - 1
    basis = jnp.pad(
        jnp.eye(side, dtype=jnp.float32), ((0, 0), (half, half)), mode='wrap'
    )
    bands = jaxwt.wavedec(basis, wavelet, mode='zero', level=1)
    return jnp.concatenate([band[:, half : half + side // 2] for band in bands], 1).T


def band_energies(error: jax.Array, *, wavelet: str, levels: int) -> jax.Array:
    """Squared error in each band, [B, H, W, C] -> [B, 1 + 3 levels].

    It is divided by H W C: for an orthogonal wavelet the bands sum to the pixel mean
    squared error.
    """
    bands = decompose(error, wavelet=wavelet, levels=levels)
    energies = [jnp.sum(jnp.square(band), axis=(1, 2, 3)) for band in bands]
    return jnp.stack(energies, axis=1) / math.prod(error.shape[1:])


def target_band_variance(images: jax.Array, *, wavelet: str, levels: int) -> np.ndarray:
    """Variance per coefficient of the velocity target x1 - x0 in each band.

    With independent unit noise and an orthogonal wavelet, this is the variance of each
    coefficient over the images, averaged over the band, plus 1.

    Args:
      images: [B, H, W, C] data in the value range of the network; B in the hundreds.
      wavelet, levels: see `decompose`.

    Returns:
      [1 + 3 levels] in the order of `band_names`.
    """
    bands = decompose(images, wavelet=wavelet, levels=levels)
    return np.asarray([float(jnp.var(band, axis=0).mean()) + 1 for band in bands])


def band_weights(
    weighting: str | Sequence[float],
    *,
    levels: int,
    band_variance: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """The weights lambda_b, one per band.

    Args:
      weighting: one of `WEIGHTINGS`, or a list of positive weights: 1 + 3 levels in the
        order of `band_names`, or 1 + levels (the approximation, then one for the three
        details of each level, coarsest first). With a weight of 0 the conditional mean
        would no longer be the only minimiser.
      levels: L.
      band_variance: from `target_band_variance`, only for 'equal_variance'.

    Returns:
      1 + 3 levels positive numbers in the order of `band_names`.
    """
    level = np.repeat(np.arange(levels, 0, -1), 3)  # Of each detail band.
    if not isinstance(weighting, str):
        weights = np.asarray(weighting, float)
        if len(weights) == 1 + levels:
            weights = np.concatenate([weights[:1], np.repeat(weights[1:], 3)])
    elif weighting in ('uniform', 'averaging_mean'):
        weights = np.ones(1 + 3 * levels)
    elif weighting == 'orthonormal_mean':
        weights = np.concatenate([[4.0**levels], 4.0**level])
    elif weighting == 'nested':
        weights = np.concatenate([[levels], level])
    elif weighting == 'detail':
        weights = DETAIL_DECAY ** np.concatenate([[levels], level - 1])
        weights = _normalised(weights, level, levels)
    else:  # 'equal_variance'
        variance = np.asarray(band_variance, np.float64)
        weights = _normalised(1 / variance, level, levels)
    chex.assert_shape(weights, (1 + 3 * levels,))
    return tuple(float(w) for w in weights)


def _normalised(weights: np.ndarray, level: np.ndarray, levels: int) -> np.ndarray:
    """The weights, scaled so that their mean over all coefficients is 1."""
    share = 4.0 ** -np.concatenate([[levels], level])
    return weights / np.sum(weights * share)
