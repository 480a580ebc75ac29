"""Multi-level wavelet distance: squared error, re-weighted over the sub-bands.

iSM (arXiv 2510.21250, section 4.2) answers the frequency bias of shortcut models with
a distance that looks at several resolutions. The transform W is linear, so it is taken
once, of the error `e = prediction - target`:

    distance(e) = 1/D sum_b lambda_b ||(W e)_b||^2,     D = H W C,

over the bands b: the approximation of the coarsest level L and three details
(horizontal, vertical, diagonal) of every level L..1, 1 being the finest.

**Parseval.** Here W is orthonormal (an orthogonal wavelet, periodized), so with all
lambda_b = 1 this *is* the pixel mean squared error, whatever the levels. A wavelet
distance differs from pixel error in its weights alone. An error that lives in band b
counts lambda_b times what pixel error makes of it; a constant lives in the
approximation, a checkerboard in the finest diagonal, and for Haar a cosine of k
periods over a side of n mostly in the details around level log2(n / 2k).

Weightings by name, with the value of an error of unit mean square relative to its
pixel error, 1 (measured for 32x32, Haar, L = 5; `tests/method/test_wavelet.py` repeats it;
cos k is cos(2 pi k x / 32 + phase) at x = 0, 1, ... with phase 0):

    name              lambda: detail j / approx.  constant  cos 4  cos 8  checker
    uniform           1 / 1                       1         1      1      1
    averaging_mean    1 / 1                       1         1      1      1
    orthonormal_mean  4^j / 4^L                   1024      20     10     4
    nested            j / L                       5         2.0    1.5    1
    detail (default)  z 2^-(j-1)/2 / z 2^-L/2     0.19      0.79   0.94   1.10
    equal_variance    z / Var(target)             depends on the data

Haar bands leak, so a cosine's value depends on its phase: cos 8 makes 10 - 6 sin(2
phase) of `orthonormal_mean` and 1.5 - sin(2 phase) / 2 of `nested`, and cos 4 ranges
over 14 .. 55 and 1.9 .. 2.7. The direction does not: neither falls below pixel error,
at any phase.

`averaging_mean` is the mean over a band's coefficients of the averaging (not
orthonormal) Haar transform: its coefficients at level j are 2^j times smaller, its
bands 4^j times shorter, so the two cancel and it changes nothing. `orthonormal_mean`
is the mean over a band of the orthonormal coefficients, and `nested` counts the
approximation of every level beside its details; both count low frequencies *more*
than pixel error does, the opposite of supervising detail. `detail` halves the weight
with every two levels from the finest to the approximation: natural images have
amplitude spectra near 1/f, so that coarse bands dominate a pixel error of the velocity
by orders of magnitude; the exponent 1/2 takes back part of that and leaves the
approximation, which holds the image's layout, a gradient of its own.
`equal_variance` takes it back wholly: a band's weight is the inverse of the variance
of the velocity target there. z makes white noise count 1 (the mean weight over
coefficients), so that weightings compare at one learning rate.

Every weighting is a positive definite quadratic form, so the minimiser of the expected
distance is the conditional mean, as flow matching needs:
grad E distance(p - T) = 2/D W^T Lambda W (p - E T) vanishes only at p = E T.

Biorthogonal wavelets work too, but Parseval does not hold: W is not orthonormal, and
`uniform` is a quadratic form other than pixel error (still positive definite).
"""

from collections.abc import Sequence
import difflib
import math

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
# Weight of a level relative to the next finer one, in `detail`.
DETAIL_DECAY = 0.5**0.5


def band_names(levels: int) -> tuple[str, ...]:
    """Bands in order: ('a5', 'h5', 'v5', 'd5', 'h4', ..., 'd1') for 5 levels."""
    details = (f'{o}{level}' for level in range(levels, 0, -1) for o in 'hvd')
    return (f'a{levels}', *details)


def check(*, wavelet: str, levels: int, image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless the wavelet exists and the size allows the levels."""
    known = pywt.wavelist(kind='discrete')
    if wavelet not in known:
        close = difflib.get_close_matches(wavelet, known, n=3, cutoff=0.3)
        raise ValueError(
            f'wavelet.name = {wavelet!r} is not a discrete wavelet of PyWavelets; '
            f'did you mean {" or ".join(close) or "haar"}? '
            "pywt.wavelist(kind='discrete') lists them all"
        )
    height, width, _ = image_shape
    most = int(math.log2(math.gcd(height, width) & -math.gcd(height, width)))
    if not 1 <= levels <= most:
        raise ValueError(
            f'wavelet.levels = {levels} must lie in 1 .. {most} for {height}x{width} '
            'images: each level halves both sides exactly'
            + (
                ''
                if most
                else '; pad the images to an even side or set wavelet.enabled = False'
            )
        )


def decompose(images: jax.Array, *, wavelet: str, levels: int) -> tuple[jax.Array, ...]:
    """The periodized wavelet transform, in float32.

    Args:
      images: [B, H, W, C]; H and W multiples of 2 ** levels. Any float type.
      wavelet: name of a discrete wavelet of PyWavelets.
      levels: number of levels.

    Returns:
      One [B, h, w, C] array for each of `band_names(levels)`; the coefficients of
      `pywt.wavedec2(..., mode='periodization')`, in the units of `images`.

    Raises:
      ValueError: images of another rank, and see `check`.
    """
    if images.ndim != 4:
        raise ValueError(
            f'images have shape {images.shape}; give [batch, height, width, channels]'
        )
    check(wavelet=wavelet, levels=levels, image_shape=images.shape[1:])
    approximation = images.astype(jnp.float32)
    details = []
    for _ in range(levels):
        height, width = approximation.shape[1:3]
        bands = jnp.einsum(
            'ih,jw,bhwc->bijc',
            _analysis_matrix(wavelet, height),
            _analysis_matrix(wavelet, width),
            approximation,
            # Else TPUs would multiply in bfloat16, and GPUs in TF32.
            precision=jax.lax.Precision.HIGHEST,
        )
        low, high = np.s_[:, : height // 2], np.s_[:, height // 2 :]
        left, right = np.s_[:, :, : width // 2], np.s_[:, :, width // 2 :]
        approximation = bands[low][left]
        details = [bands[high][left], bands[low][right], bands[high][right], *details]
    return (approximation, *details)


def _analysis_matrix(wavelet: str, side: int) -> jax.Array:
    """One level in one dimension, [side, side]: low-pass rows, then high-pass rows.

    jaxwt's transform of the identity. Its two-dimensional convolutions take two (Haar)
    to thirty times (db4) as long on a CPU; the two products with these matrices take
    the same time for every wavelet. Caching the matrices gained nothing measurable.
    """
    # jaxwt has no periodization (as many coefficients as pixels). It is a circular
    # extension by half a filter, of which the coefficients past the ends are dropped.
    half = pywt.Wavelet(wavelet).dec_len // 2 - 1
    basis = jnp.pad(
        jnp.eye(side, dtype=jnp.float32), ((0, 0), (half, half)), mode='wrap'
    )
    bands = jaxwt.wavedec(basis, wavelet, mode='zero', level=1)
    return jnp.concatenate([band[:, half : half + side // 2] for band in bands], 1).T


def band_energies(error: jax.Array, *, wavelet: str, levels: int) -> jax.Array:
    """Squared error in each band, [B, H, W, C] -> [B, 1 + 3 levels].

    Divided by H W C, so that for an orthogonal wavelet the bands sum to the pixel mean
    squared error.
    """
    bands = decompose(error, wavelet=wavelet, levels=levels)
    energies = [jnp.sum(jnp.square(band), axis=(1, 2, 3)) for band in bands]
    return jnp.stack(energies, axis=1) / math.prod(error.shape[1:])


def wavelet_distance(
    error: jax.Array, *, wavelet: str, levels: int, weights: Sequence[float]
) -> tuple[jax.Array, jax.Array]:
    """Weighted squared error of each sample.

    Args:
      error: [B, H, W, C], prediction - target.
      wavelet, levels: see `decompose`.
      weights: one for each band, of `band_weights`.

    Returns:
      distances [B] and band energies [B, 1 + 3 levels], both mean squares (pixel
      units squared); distances are the energies times the weights, summed.

    Raises:
      ValueError: another number of weights than bands, and see `decompose`.
    """
    energies = band_energies(error, wavelet=wavelet, levels=levels)
    weights = jnp.asarray(weights, jnp.float32)
    # One weight would broadcast over all bands in silence.
    if weights.shape != energies.shape[1:]:
        raise ValueError(
            f'weights have shape {weights.shape}; for levels = {levels} give '
            f'{1 + 3 * levels} of them, of band_weights'
        )
    return jnp.sum(energies * weights[None], axis=1), energies


def target_band_variance(images: jax.Array, *, wavelet: str, levels: int) -> np.ndarray:
    """Variance per coefficient of the velocity target x1 - x0 in each band.

    With independent unit noise, and an orthogonal wavelet, it is the variance of the
    data's coefficients plus 1: each coefficient's about its own mean over the images,
    then the mean over the band.

    Args:
      images: [B, H, W, C] data in the range that the network sees; B of hundreds.
      wavelet, levels: see `decompose`.

    Returns:
      [1 + 3 levels] in the order of `band_names`, for `band_weights`.

    Raises:
      ValueError: see `decompose`.
    """
    bands = decompose(images, wavelet=wavelet, levels=levels)
    return np.asarray([float(jnp.var(band, axis=0).mean()) + 1 for band in bands])


def band_weights(
    weighting: str | Sequence[float],
    *,
    wavelet: str,
    levels: int,
    image_shape: tuple[int, int, int],
    band_variance: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """The weights lambda_b, one for each band.

    Args:
      weighting: a name of `WEIGHTINGS`, or a list of positive weights: 1 + 3 levels
        of them in the order of `band_names`, or 1 + levels (the approximation, then
        one for the three details of each level, coarsest first).
      wavelet, levels: see `decompose`.
      image_shape: (H, W, C).
      band_variance: of `target_band_variance`, for 'equal_variance'; others ignore it.

    Returns:
      1 + 3 levels positive weights, without unit, in the order of `band_names`.

    Raises:
      ValueError: unknown name, a list of another length, a weight that is not
        positive and finite, `band_variance` missing or unfit where it is needed, or
        what `check` refuses.
    """
    check(wavelet=wavelet, levels=levels, image_shape=image_shape)
    level = np.repeat(np.arange(levels, 0, -1), 3)  # Of each detail band.
    if not isinstance(weighting, str):
        return _explicit_weights(weighting, levels)
    if weighting in ('uniform', 'averaging_mean'):
        weights = np.ones(1 + 3 * levels)
    elif weighting == 'orthonormal_mean':
        weights = np.concatenate([[4.0**levels], 4.0**level])
    elif weighting == 'nested':
        weights = np.concatenate([[levels], level])
    elif weighting == 'detail':
        weights = DETAIL_DECAY ** np.concatenate([[levels], level - 1])
        weights = _normalised(weights, level, levels)
    elif weighting == 'equal_variance':
        if band_variance is None:
            raise ValueError(
                "wavelet.weighting = 'equal_variance' needs band_variance, of "
                'target_band_variance(images)'
            )
        variance = np.asarray(band_variance, np.float64)
        if variance.shape != (1 + 3 * levels,) or not all(
            0 < v < math.inf for v in variance
        ):
            raise ValueError(
                f'band_variance = {band_variance} must be {1 + 3 * levels} positive '
                f'numbers for wavelet.levels = {levels}; take '
                'target_band_variance(images) with the same levels'
            )
        weights = _normalised(1 / variance, level, levels)
    else:
        raise ValueError(
            f'wavelet.weighting = {weighting!r} is unknown; choose one of '
            f'{", ".join(WEIGHTINGS)}, or a list of weights'
        )
    return tuple(float(w) for w in weights)


def _explicit_weights(weighting, levels: int) -> tuple[float, ...]:
    weights = tuple(float(w) for w in weighting)
    if len(weights) == 1 + levels and levels:
        weights = (weights[0], *(w for w in weights[1:] for _ in range(3)))
    if len(weights) != 1 + 3 * levels:
        raise ValueError(
            f'wavelet.weighting = {list(weighting)} has {len(weighting)} weights; for '
            f'wavelet.levels = {levels} give {1 + levels} (approximation, then levels '
            f'{levels} .. 1) or {1 + 3 * levels} (in the order '
            f'{", ".join(band_names(levels))})'
        )
    if not all(0 < w < math.inf for w in weights):
        raise ValueError(
            f'wavelet.weighting = {list(weighting)} must be positive and finite: '
            'with a weight of 0 the minimiser would no longer be the conditional mean; '
            'give a small one, such as 0.01'
        )
    return weights


def _normalised(weights: np.ndarray, level: np.ndarray, levels: int) -> np.ndarray:
    """Scales weights so that their mean over all coefficients is 1."""
    share = 4.0 ** -np.concatenate([[levels], level])
    return weights / np.sum(weights * share)
