"""The 8-bit rule: exact round trip, rounding to even, clipping."""

import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.data import pixels


def test_every_8_bit_value_survives_the_round_trip():
    values = np.arange(256, dtype=np.uint8)
    floats = pixels.to_float(values)
    assert floats.dtype == np.float32
    assert (floats[0], floats[255]) == (-1, 1)
    np.testing.assert_array_equal(pixels.to_uint8(floats), values)
    np.testing.assert_array_equal(pixels.to_uint8(jnp.asarray(floats)), values)


def test_halves_are_rounded_to_even():
    candidates = (np.arange(0.5, 255) / 127.5 - 1).astype(np.float32)
    scaled = (candidates + np.float32(1)) * np.float32(127.5)
    halves = scaled % 1 == 0.5
    # Both an even and an odd number below the half, or the test sees no rounding.
    assert {0, 1} == set(np.floor(scaled[halves]) % 2)
    expected = [round(float(value)) for value in scaled[halves]]
    np.testing.assert_array_equal(pixels.to_uint8(candidates[halves]), expected)


def test_values_out_of_range_are_clipped_not_wrapped():
    values = np.array([-np.inf, -1.5, -1.004, 1.004, 7, np.inf], np.float32)
    np.testing.assert_array_equal(pixels.to_uint8(values), [0, 0, 0, 255, 255, 255])


def test_bfloat16_is_converted():
    values = jnp.array([-1, 0, 1], jnp.bfloat16)
    np.testing.assert_array_equal(pixels.to_uint8(values), [0, 128, 255])


def test_nan_is_refused():
    with pytest.raises(ValueError, match='1 of 2 image values are NaN'):
        pixels.to_uint8(np.array([0.0, np.nan]))


@pytest.mark.parametrize('array', [np.array([0, 255]), np.array([True])])
def test_other_types_are_asserted(array):
    with pytest.raises(AssertionError, match='is not'):
        pixels.to_uint8(array)
