"""Contracts of `ism_jax.sampling.image_grid`."""

import json

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from ism_jax.data import pixels
from ism_jax.runtime import files
from ism_jax.sampling import image_grid


def noise(*shape, seed=0):
    return np.random.RandomState(seed).uniform(-1, 1, shape).astype(np.float32)


def test_every_8_bit_value_survives_the_round_trip():
    values = np.arange(256, dtype=np.uint8)
    floats = pixels.from_uint8(values)
    assert floats.dtype == np.float32
    assert (floats[0], floats[255]) == (-1, 1)
    np.testing.assert_array_equal(pixels.to_uint8(floats), values)
    np.testing.assert_array_equal(pixels.to_uint8(jnp.asarray(floats)), values)


def test_halves_are_rounded_to_even():
    candidates = (np.arange(0.5, 255) / 127.5 - 1).astype(np.float32)
    scaled = (candidates + np.float32(1)) * np.float32(127.5)
    halves = scaled % 1 == 0.5
    # Both an even and an odd number below the half, or the rule is not seen.
    assert {0, 1} == set(np.floor(scaled[halves]) % 2)
    expected = [round(float(value)) for value in scaled[halves]]
    np.testing.assert_array_equal(pixels.to_uint8(candidates[halves]), expected)


def test_values_beyond_the_range_are_clipped_not_wrapped():
    values = np.array([-np.inf, -1.5, -1.004, 1.004, 7, np.inf], np.float32)
    np.testing.assert_array_equal(pixels.to_uint8(values), [0, 0, 0, 255, 255, 255])


def test_bfloat16_is_taken():
    values = jnp.array([-1, 0, 1], jnp.bfloat16)
    np.testing.assert_array_equal(pixels.to_uint8(values), [0, 128, 255])


@pytest.mark.parametrize(
    'array, message',
    [
        (np.array([0.0, np.nan]), '1 NaN of 2'),
        (np.array([0, 255]), 'int64'),
        (np.array([True]), 'bool'),
    ],
)
def test_what_is_no_image_is_refused(array, message):
    with pytest.raises(ValueError, match=message):
        pixels.to_uint8(array)
    with pytest.raises(ValueError, match='uint8 is expected'):
        pixels.from_uint8(array)


def test_grid_places_every_image():
    samples = noise(5, 4, 6, 3)
    out = image_grid.grid(samples, columns=2, padding=1, background=7)
    assert out.shape == (3 * 5 + 1, 2 * 7 + 1, 3) and out.dtype == np.uint8
    seen = np.zeros(out.shape[:2], bool)
    for index, sample in enumerate(samples):
        top, left = index // 2 * 5 + 1, index % 2 * 7 + 1
        place = np.s_[top : top + 4, left : left + 6]
        np.testing.assert_array_equal(out[place], pixels.to_uint8(sample))
        seen[place] = True
    assert (out[~seen] == 7).all()


def test_grid_scales_by_repetition_and_keeps_the_padding():
    samples = noise(2, 3, 3, 1)
    out = image_grid.grid(samples, columns=2, padding=2, scale=4)
    assert out.shape == (12 + 4, 2 * (12 + 2) + 2, 1)
    np.testing.assert_array_equal(out[2:14:4, 16:28:4], pixels.to_uint8(samples[1]))
    np.testing.assert_array_equal(
        out[2:14, 16:28], out[2:14:4, 16:28:4].repeat(4, axis=0).repeat(4, axis=1)
    )


@pytest.mark.parametrize(
    'field, arguments',
    [
        ('columns = 0', {'columns': 0}),
        ('padding = -1', {'columns': 1, 'padding': -1}),
        ('scale = 0', {'columns': 1, 'scale': 0}),
    ],
)
def test_grid_names_the_field_at_fault(field, arguments):
    with pytest.raises(ValueError, match=field):
        image_grid.grid(noise(1, 4, 4, 1), **arguments)


@pytest.mark.parametrize('shape', [(4, 4, 1), (0, 4, 4, 1)])
def test_grid_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match='N, H, W, C'):
        image_grid.grid(noise(*shape), 1)


@pytest.mark.parametrize('shape', [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
def test_png_keeps_pixels_and_metadata(tmp_path, shape):
    array = pixels.to_uint8(noise(*shape))
    path = tmp_path / 'new' / 'image.png'
    image_grid.write_png(path, array, {'config': {'w': 0.5}, 'note': 'α = β'})
    with Image.open(path) as image:
        np.testing.assert_array_equal(
            np.asarray(image), array.reshape(shape[:2] if shape[2:] == (1,) else shape)
        )
        assert json.loads(image.text['config']) == {'w': 0.5}
        assert image.text['note'] == 'α = β'


def test_png_refuses_what_it_cannot_hold(tmp_path):
    path = tmp_path / 'image.png'
    for array in (noise(4, 4, 3), pixels.to_uint8(noise(4, 4, 2)), np.uint8(3)):
        with pytest.raises(ValueError, match='to_uint8'):
            image_grid.write_png(path, array)
    with pytest.raises(ValueError, match='80 characters'):
        image_grid.write_png(path, np.zeros((4, 4), np.uint8), {'x' * 80: ''})
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / 'file'
    files.write_bytes(path, b'old')

    def fail(*_):
        raise OSError('disk full')

    monkeypatch.setattr(files.os, 'replace', fail)
    with pytest.raises(OSError, match='disk full'):
        files.write_bytes(path, b'new')
    assert path.read_bytes() == b'old'
    assert list(tmp_path.iterdir()) == [path]


def positions(figure, block):
    """Upper left corners at which `block` occurs in `figure`, pixel by pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(figure, block.shape)
    corner = (windows[..., 0, 0, 0] == block[0, 0, 0]).squeeze(-1)
    return [
        (y, x) for y, x in zip(*np.nonzero(corner)) if (windows[y, x, 0] == block).all()
    ]


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('title', ['', 'A title'])
def test_figure_shows_every_sample_pixel_for_pixel(channels, title):
    steps, guidances = (1, 4), (0.0, 1.5, 3.0)
    samples = noise(2, 3, 4, 8, 8, channels)
    figure = image_grid.steps_by_guidance_figure(
        samples, steps, guidances, scale=3, title=title
    )
    assert figure.dtype == np.uint8 and figure.shape[2] == 3
    found = {}
    for row, column, number in np.ndindex(2, 3, 4):
        block = image_grid.upscale(pixels.to_uint8(samples[row, column, number]), 3)
        block = block.repeat(3 // channels, axis=2)
        (found[row, column, number],) = positions(figure, block)
    # Steps run downwards and guidance to the right.
    assert found[0, 0, 0][0] == found[0, 2, 0][0] < found[1, 0, 0][0]
    assert found[0, 0, 0][1] == found[1, 0, 0][1] < found[0, 1, 0][1]
    # The labels are there: left of the rows and above the columns.
    top, left = found[0, 0, 0]
    assert figure[top : top + 48, : left - 4].min() < 128
    assert figure[: top - 4, left:].min() < 128
    # And nothing is cut off at the border.
    border = [figure[0], figure[-1], figure[:, 0], figure[:, -1]]
    assert all((line == 255).all() for line in border)


def test_figure_of_a_dict_may_lack_cells():
    samples = noise(2, 2, 1, 8, 8, 1)
    steps, guidances = (1, 2), (0.0, 1.0)
    cells = {
        (step, guidance): samples[row, column]
        for row, step in enumerate(steps)
        for column, guidance in enumerate(guidances)
    }
    whole = image_grid.steps_by_guidance_figure(samples, steps, guidances)
    np.testing.assert_array_equal(
        image_grid.steps_by_guidance_figure(cells, steps, guidances), whole
    )
    del cells[2, 0.0]
    part = image_grid.steps_by_guidance_figure(cells, steps, guidances)
    assert part.shape == whole.shape and (part != whole).any()


def test_figure_refuses_cells_that_do_not_fit():
    cell = noise(1, 8, 8, 1)
    with pytest.raises(ValueError, match=r'\(8, 0.0\).* not among'):
        image_grid.steps_by_guidance_figure({(8, 0.0): cell}, (1,), (0.0,))
    with pytest.raises(ValueError, match='none twice'):
        image_grid.steps_by_guidance_figure({(1, 0.0): cell}, (1, 1), (0.0,))
    with pytest.raises(ValueError, match=r'\[2, 1, N, H, W, C\]'):
        image_grid.steps_by_guidance_figure(cell[None, None], (1, 2), (0.0,))
    with pytest.raises(ValueError, match='equally many'):
        image_grid.steps_by_guidance_figure(
            {(1, 0.0): cell, (2, 0.0): noise(2, 8, 8, 1)}, (1, 2), (0.0,)
        )
