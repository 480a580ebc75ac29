"""Grids, PNG files and the figure, pixel by pixel."""

import json

import numpy as np
from PIL import Image
import pytest

from ism_jax.data import pixels
from ism_jax.runtime import files
from ism_jax.sampling import image_grid


def noise(*shape, seed=0):
    return np.random.RandomState(seed).uniform(-1, 1, shape).astype(np.float32)


def test_grid_places_every_image():
    samples = noise(5, 4, 6, 3)
    out = image_grid.grid(samples, columns=2)
    assert out.shape == (3 * 6 + 2, 2 * 8 + 2, 3) and out.dtype == np.uint8
    covered = np.zeros(out.shape[:2], bool)
    for index, sample in enumerate(samples):
        top, left = index // 2 * 6 + 2, index % 2 * 8 + 2
        area = np.s_[top : top + 4, left : left + 6]
        np.testing.assert_array_equal(out[area], pixels.to_uint8(sample))
        covered[area] = True
    assert (out[~covered] == 255).all()


def test_grid_scales_by_repetition_and_keeps_the_padding():
    samples = noise(2, 3, 3, 1)
    out = image_grid.grid(samples, columns=2, scale=4)
    assert out.shape == (12 + 4, 2 * (12 + 2) + 2, 1)
    np.testing.assert_array_equal(out[2:14:4, 16:28:4], pixels.to_uint8(samples[1]))
    np.testing.assert_array_equal(
        out[2:14, 16:28], out[2:14:4, 16:28:4].repeat(4, axis=0).repeat(4, axis=1)
    )


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
        (y, x)
        for y, x in zip(*np.nonzero(corner), strict=True)
        if (windows[y, x, 0] == block).all()
    ]


@pytest.mark.parametrize('channels', [1, 3])
def test_figure_holds_every_sample_pixel_for_pixel(channels):
    steps, guidances = (1, 4), (0.0, 1.5, 3.0)
    samples = noise(2, 3, 4, 8, 8, channels)
    figure = image_grid.steps_by_guidance_figure(samples, steps, guidances, scale=3)
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


def test_figure_of_a_dict_is_that_of_the_array():
    samples = noise(2, 2, 1, 8, 8, 1)
    steps, guidances = (1, 2), (0.0, 1.0)
    cells = {
        (number, w): samples[row, column]
        for row, number in enumerate(steps)
        for column, w in enumerate(guidances)
    }
    np.testing.assert_array_equal(
        image_grid.steps_by_guidance_figure(cells, steps, guidances),
        image_grid.steps_by_guidance_figure(samples, steps, guidances),
    )


def test_figure_needs_a_cell_for_each_pair():
    with pytest.raises(AssertionError):
        image_grid.steps_by_guidance_figure(noise(1, 1, 1, 8, 8, 1), (1, 2), (0.0,))
