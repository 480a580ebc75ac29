"""The wavelet distance against PyWavelets, Parseval and a two-point distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pywt

from ism_jax.method import loss_distance, wavelet

SHAPE = (32, 32, 1)
decompose, band_energies = (
    jax.jit(function, static_argnames=('wavelet', 'levels'))
    for function in (wavelet.decompose, wavelet.band_energies)
)
wavelet_error = jax.jit(
    loss_distance.wavelet_error, static_argnames=('wavelet', 'levels', 'weights')
)


def _images(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _weights(name, levels=5, **options):
    return wavelet.band_weights(name, levels=levels, **options)


@pytest.mark.parametrize(
    'family,levels,shape',
    [
        ('haar', 5, (2, 32, 32, 3)),
        ('db2', 3, (2, 32, 16, 1)),
        ('db4', 5, (1, 32, 32, 1)),
        ('sym5', 2, (2, 16, 16, 2)),
        ('coif1', 4, (1, 16, 16, 1)),
        ('bior2.2', 3, (2, 24, 24, 1)),
        ('rbio3.1', 2, (1, 8, 16, 1)),
        ('dmey', 2, (1, 8, 8, 1)),  # A filter of 62 taps wraps several times.
        ('db38', 4, (1, 16, 16, 4)),  # 76 taps.
    ],
)
def test_coefficients_equal_pywavelets(family, levels, shape):
    images = _images(shape)
    ours = decompose(images, wavelet=family, levels=levels)
    theirs = pywt.wavedec2(
        images.astype(np.float64),
        family,
        mode='periodization',
        level=levels,
        axes=(1, 2),
    )
    theirs = [theirs[0], *(band for level in theirs[1:] for band in level)]
    assert len(ours) == len(theirs) == len(wavelet.band_names(levels))
    for name, a, b in zip(wavelet.band_names(levels), ours, theirs, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


@pytest.mark.parametrize('family', ['haar', 'db3', 'sym4', 'coif2'])
def test_uniform_is_pixel_error(family):
    error = _images((3, 32, 32, 4))
    weights = _weights('uniform', 3)
    distance, _ = wavelet_error(error, wavelet=family, levels=3, weights=weights)
    np.testing.assert_allclose(distance, (error**2).mean((1, 2, 3)), rtol=1e-5)


def test_parseval_fails_for_a_biorthogonal_wavelet():
    error = _images((3, 32, 32, 1))
    energies = band_energies(error, wavelet='bior2.2', levels=3)
    ratio = np.asarray(energies.sum(1)) / (error**2).mean((1, 2, 3))
    assert np.abs(ratio - 1).min() > 0.05


def _unit_errors():
    """Unit mean square errors: constant, cosines of 4 and 8 periods, checkerboard."""
    x = np.arange(32) / 32
    rows = [np.ones(32), *(np.sqrt(2) * np.cos(2 * np.pi * k * x) for k in (4, 8))]
    images = [np.broadcast_to(row, (32, 32)) for row in rows]
    images.append((-1.0) ** np.add.outer(np.arange(32), np.arange(32)))
    return np.stack(images)[..., None].astype(np.float32)


@pytest.mark.parametrize(
    'name,expected',
    [
        ('uniform', [1, 1, 1, 1]),
        ('averaging_mean', [1, 1, 1, 1]),
        ('orthonormal_mean', [1024, 20.2, 10, 4]),
        ('nested', [5, 1.98, 1.5, 1]),
        ('detail', [0.194, 0.795, 0.937, 1.098]),
    ],
)
def test_distance_of_each_weighting_at_a_frequency(name, expected):
    distance, _ = wavelet_error(
        _unit_errors(), wavelet='haar', levels=5, weights=_weights(name)
    )
    np.testing.assert_allclose(distance, expected, rtol=0.01)


@pytest.mark.parametrize('phase', [0.0, 0.3, 1.0, 2.5])
def test_cosine_of_eight_periods_by_hand(phase):
    """Levels 1 and 2 hold (1 + sin(2 phase)) / 2 and (1 - sin(2 phase)) / 2 of it."""
    row = np.sqrt(2) * np.cos(np.pi / 2 * np.arange(32) + phase)
    error = np.broadcast_to(row[:, None], (32, 32))[None, :, :, None]
    expected = {
        'orthonormal_mean': 10 - 6 * np.sin(2 * phase),
        'nested': 1.5 - np.sin(2 * phase) / 2,
    }
    for name, value in expected.items():
        distance, _ = wavelet_error(
            error, wavelet='haar', levels=5, weights=_weights(name)
        )
        np.testing.assert_allclose(distance[0], value, rtol=1e-5)


def test_averaging_mean_is_the_mean_of_averaging_haar():
    """Computed from block means, without the transform."""
    error = _images((1, 8, 8, 1))
    expected, block = 0.0, error[0, :, :, 0].astype(np.float64)
    for _ in range(3):
        p, q = block[::2, ::2], block[::2, 1::2]
        r, s = block[1::2, ::2], block[1::2, 1::2]
        for detail in (p + q - r - s, p - q + r - s, p - q - r + s):
            expected += np.mean((detail / 4) ** 2)
        block = (p + q + r + s) / 4
    expected += np.mean(block**2)
    distance, _ = wavelet_error(
        error, wavelet='haar', levels=3, weights=_weights('averaging_mean', 3)
    )
    np.testing.assert_allclose(distance[0], expected, rtol=1e-5)


def test_default_favours_detail_and_is_not_pixel_error():
    weights = dict(
        zip(wavelet.band_names(5), _weights(wavelet.DEFAULT_WEIGHTING), strict=True)
    )
    assert weights['d1'] > weights['h3'] > weights['h5'] > weights['a5'] > 0
    assert weights['d1'] / weights['a5'] > 2
    noise = _images((64, *SHAPE))
    distance, _ = wavelet_error(
        noise, wavelet='haar', levels=5, weights=tuple(weights.values())
    )
    # White noise counts as in pixel error; a single image does not.
    np.testing.assert_allclose(distance.mean(), (noise**2).mean(), rtol=0.02)
    relative = np.asarray(distance) / (noise**2).mean((1, 2, 3))
    assert relative.std() > 1e-3


def test_equal_variance_gives_every_coefficient_equal_weight():
    scale = np.linspace(3, 0.1, 32)[None, :, None, None].astype(np.float32)
    images = np.cumsum(_images((256, *SHAPE)) * scale, axis=1)
    variance = wavelet.target_band_variance(images, wavelet='haar', levels=5)
    weights = _weights('equal_variance', band_variance=variance)
    target = images - _images(images.shape, seed=1)
    target -= target.mean(0, keepdims=True)
    energies = band_energies(target, wavelet='haar', levels=5).mean(0)
    coefficients = 4.0 ** -np.array([5] + [j for j in range(5, 0, -1) for _ in 'hvd'])
    per_coefficient = np.asarray(energies) * np.asarray(weights) / coefficients
    # All but the coarsest bands, which hold too few coefficients for 256 images.
    np.testing.assert_allclose(per_coefficient[4:] / per_coefficient[-1], 1, rtol=0.15)
    assert max(variance) / min(variance) > 10


@pytest.mark.parametrize('name', ['detail', 'nested', 'orthonormal_mean'])
def test_the_conditional_mean_is_the_minimiser(name):
    """Targets are one of two images, with probabilities 0.3 and 0.7."""
    targets = _images((2, 8, 8, 1))
    probability = jnp.array([0.3, 0.7])
    weights = _weights(name, 3)

    def expected_distance(prediction):
        distance, _ = wavelet_error(
            prediction[None] - targets, wavelet='haar', levels=3, weights=weights
        )
        return jnp.sum(probability * distance)

    mean = 0.3 * targets[0] + 0.7 * targets[1]
    assert jnp.abs(jax.grad(expected_distance)(mean)).max() < 1e-5
    for seed in range(5):
        other = mean + 0.1 * _images(mean.shape, seed=seed + 10)
        assert expected_distance(other) > expected_distance(mean)
    assert jnp.abs(jax.grad(expected_distance)(targets[0])).max() > 1e-3


def test_gradient_is_the_weighted_transform_and_back():
    """2/D W^T Lambda W e, by PyWavelets' inverse (W is orthogonal)."""
    error = _images((1, 16, 16, 1))
    weights = _weights('detail', 3)

    def distance(error):
        return wavelet_error(error, wavelet='db2', levels=3, weights=weights)[0][0]

    options = dict(wavelet='db2', mode='periodization')
    bands = pywt.wavedec2(error[0, :, :, 0].astype(np.float64), level=3, **options)
    scaled = [bands[0] * weights[0]]
    for i, level in enumerate(bands[1:]):
        scaled.append(
            tuple(b * w for b, w in zip(level, weights[1 + 3 * i :], strict=False))
        )
    expected = 2 / error.size * pywt.waverec2(scaled, **options)
    actual = jax.grad(distance)(error)[0, :, :, 0]
    np.testing.assert_allclose(actual, expected, atol=1e-7)
    # The gradient of the squared error differs.
    assert np.abs(actual - 2 / error.size * error[0, :, :, 0]).max() > 1e-4


def test_gradients_are_finite_for_zero_and_huge_errors():
    weights = _weights('detail')
    distance = functools.partial(
        wavelet_error, wavelet='haar', levels=5, weights=weights
    )
    for scale in (0.0, 1e-20, 1e15):
        error = scale * jnp.ones((1, *SHAPE))
        gradient = jax.grad(lambda e: distance(e)[0].sum())(error)
        assert jnp.isfinite(gradient).all()
        assert (jnp.abs(gradient).max() > 0) == (scale > 0)


def test_jit_with_static_arguments():
    error = _images((2, 16, 16, 2))
    options = dict(wavelet='db2', levels=2, weights=_weights('detail', 2))
    got = wavelet_error(error, **options)
    expected = loss_distance.wavelet_error(error, **options)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), got, expected
    )
    # The static arguments are read: other weights and levels give other values.
    other = options | dict(levels=1, weights=(1.0, 2.0, 2.0, 2.0))
    bands = wavelet_error(error, **other)[1]
    assert list(bands) == ['band_a1', 'band_d1', 'band_h1', 'band_v1']
    assert not np.allclose(wavelet_error(error, **other)[0], got[0])


def test_bfloat16_errors_are_summed_in_float32():
    error = jnp.asarray(_images((2, *SHAPE)), jnp.bfloat16)
    energies = band_energies(error, wavelet='haar', levels=5)
    assert energies.dtype == jnp.float32
    exact = jnp.square(error.astype(jnp.float32)).mean((1, 2, 3))
    np.testing.assert_allclose(energies.sum(1), exact, rtol=1e-5)


def test_explicit_weights():
    per_level = _weights((1, 2, 3), 2)
    assert per_level == (1, 2, 2, 2, 3, 3, 3)
    assert _weights((7, 1, 2, 3, 4, 5, 6), 2) == (7, 1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    'height, width, levels', [(32, 32, 5), (28, 28, 2), (24, 64, 3), (31, 32, 0)]
)
def test_levels_halve_both_sides_exactly(height, width, levels):
    assert wavelet.max_levels(height, width) == levels


def test_wavelet_names_are_pywavelets():
    assert {'haar', 'db38', 'bior2.2', 'dmey'} <= set(wavelet.wavelet_names())


def test_a_wrong_number_of_weights_does_not_broadcast():
    error = _images((1, 8, 8, 1))
    with pytest.raises(AssertionError):
        wavelet_error(error, wavelet='haar', levels=2, weights=(1.0,))
    with pytest.raises(AssertionError):
        _weights((1, 2), 5)


def test_images_of_another_rank_or_size_are_refused():
    for shape in ((8, 8, 1), (1, 12, 8, 1)):
        with pytest.raises(AssertionError):
            decompose(_images(shape), wavelet='haar', levels=3)
