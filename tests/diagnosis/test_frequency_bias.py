"""Spectra of images whose power is known."""

import math

import numpy as np
import pytest

from ism_jax.diagnosis import frequency_bias


def test_white_images_have_a_flat_spectrum(normal):
    frequencies, power = frequency_bias.radial_power(normal(200, 32, 24, 2))
    assert frequencies[0] == 0 and frequencies[-1] == 0.5 and len(power) == 13
    np.testing.assert_allclose(power[1:], 1, atol=0.1)  # The first ring has 8 waves.


def test_a_blur_has_its_transfer_function():
    """One bright pixel has a white spectrum, a mean of two pixels a cosine."""
    impulse = np.zeros((1, 32, 32, 1))
    impulse[0, 3, 5] = 32  # Its mean square is 1.
    blurred = (impulse + np.roll(impulse, 1, axis=1)) / 2
    _, white = frequency_bias.radial_power(impulse)
    np.testing.assert_allclose(white, 1, rtol=1e-9)
    frequencies, power = frequency_bias.radial_power(blurred)
    rows = np.fft.fftfreq(32)[:, None]
    transfer = np.cos(np.pi * rows) ** 2 + np.zeros((32, 32))
    radius = np.hypot(rows, rows.T)
    for frequency, value in zip(frequencies, power, strict=True):
        ring = np.abs(radius - frequency) < 1 / 64
        assert value == pytest.approx(transfer[ring].mean(), rel=1e-6)
    ratio = frequency_bias.high_frequency_ratio(frequencies, power, white)
    assert ratio.mean() == pytest.approx(np.log(power[frequencies > 0.25]).mean())
    assert ratio.mean() < -0.3


def test_the_ratio_is_of_high_frequencies_alone(normal):
    images = normal(50, 16, 16, 1)

    def ratio(samples, data):
        frequencies, power = frequency_bias.radial_power(samples)
        _, reference = frequency_bias.radial_power(data)
        return frequency_bias.high_frequency_ratio(frequencies, power, reference)

    np.testing.assert_allclose(ratio(2 * images, images), math.log(4))
    np.testing.assert_allclose(ratio(images, 2 * images), -math.log(4))
    assert np.abs(ratio(images[:25], images[25:])).mean() < 0.1
    np.testing.assert_allclose(ratio(images + 5, images), 0, atol=1e-5)


def test_wavelet_levels_are_coarse_to_fine(normal):
    row, column = np.indices((16, 16))
    checker = np.zeros((1000, 16, 16, 1), np.float32)
    checker += ((-1.0) ** (row + column))[None, :, :, None]
    power = frequency_bias.level_power(checker)
    assert power.shape == (4,)
    np.testing.assert_allclose(power, [0, 0, 0, 4 / 3], atol=1e-6)
    white = frequency_bias.level_power(normal(*checker.shape))
    np.testing.assert_allclose(white, 1, atol=0.1)


def test_constant_images_are_refused():
    with pytest.raises(ValueError, match='lowest power is 0.0'):
        frequency_bias.log_ratio(np.ones(3), np.zeros(3))


def test_samples_without_detail_are_found(subject, network):
    """The network's samples are nearly constant, and the data are white."""
    section = frequency_bias.diagnose(subject('flow_matching', network), 32)
    assert section.grade == 'poor' and section.figure
    assert section.verdict.startswith('far too little fine detail')
    for steps in ('1 step)', '4 steps)', '128 steps)'):
        assert steps in section.number
