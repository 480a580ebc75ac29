"""Image grids, PNG files, and the figure of samples by steps and guidance."""

from collections.abc import Mapping, Sequence
import io
import json
import math

import chex
import numpy as np
from PIL import Image, PngImagePlugin

from ism_jax.data import pixels
from ism_jax.runtime import files

_DPI = 100
# Side in pixels at which the content of a sample is easy to recognize.
READABLE_SIDE = 64
PADDING = 2  # Pixels between and around the images of a grid.
BACKGROUND = 255


def grid(images, columns: int, *, scale: int = 1) -> np.ndarray:
    """Tiles images row by row.

    Args:
      images: [N, H, W, C], floating in [-1, 1] or uint8, N >= 1.
      columns: images per row; the rest of the last row is background.
      scale: integer factor by which images are enlarged (nearest neighbour).

    Returns:
      uint8 [rows (H scale + PADDING) + PADDING, columns (W scale + PADDING) + PADDING,
      C].

    Raises:
      ValueError: an image holds NaN.
    """
    images = upscale(pixels.to_uint8(images), scale)
    chex.assert_rank(images, 4)
    number, height, width, channels = images.shape
    rows = math.ceil(number / columns)
    row_height, column_width = height + PADDING, width + PADDING
    shape = (rows * row_height + PADDING, columns * column_width + PADDING, channels)
    out = np.full(shape, BACKGROUND, np.uint8)
    for index, image in enumerate(images):
        top = index // columns * row_height + PADDING
        left = index % columns * column_width + PADDING
        out[top : top + height, left : left + width] = image
    return out


def step_count(number: int) -> str:
    """'1 step', '2 steps', ..."""
    return f'{number} step{"s" * (number != 1)}'


def readable_scale(side: int) -> int:
    """The factor that enlarges small images to about `READABLE_SIDE` pixels."""
    return max(1, READABLE_SIDE // side)


def upscale(images: np.ndarray, scale: int) -> np.ndarray:
    """[..., H, W, C] to [..., H scale, W scale, C] by nearest neighbour."""
    return images.repeat(scale, axis=-3).repeat(scale, axis=-2)


def write_png(
    path, array, metadata: Mapping | None = None, seconds: Sequence[float] | None = None
) -> None:
    """Writes the file of `png_bytes` atomically; its folder is created."""
    files.write_bytes(path, png_bytes(array, metadata, seconds))


def png_bytes(
    array, metadata: Mapping | None = None, seconds: Sequence[float] | None = None
) -> bytes:
    """The content of a PNG file.

    Args:
      array: uint8 [H, W] or [H, W, C], C = 1, 3 or 4; with `seconds` [F, H, W, C].
      metadata: text chunks of the file, name to value; values other than strings are
        written as JSON. Names have 1 to 79 Latin-1 characters. Pillow's
        `Image.open(path).text` and `identify -verbose` print them.
      seconds: for an animation, how long each of its F frames is shown.
    """
    array = np.asarray(array)
    assert array.dtype == np.uint8, f'{array.dtype} is not uint8'
    chunks = PngImagePlugin.PngInfo()
    for name, value in (metadata or {}).items():
        chunks.add_text(name, value if isinstance(value, str) else json.dumps(value))
    frames = [array] if seconds is None else array
    if frames[0].ndim == 3 and frames[0].shape[2] == 1:
        frames = [frame[..., 0] for frame in frames]
    first, *others = [Image.fromarray(np.ascontiguousarray(f)) for f in frames]
    animation = {}
    if others:
        milliseconds = [round(1000 * s) for s in seconds]
        animation = dict(
            save_all=True, append_images=others, duration=milliseconds, loop=0
        )
    out = io.BytesIO()
    first.save(out, 'PNG', pnginfo=chunks, **animation)
    return out.getvalue()


def steps_by_guidance_figure(
    images,
    steps: Sequence[int],
    guidances: Sequence[float],
    *,
    columns: int | None = None,
    scale: int = 2,
) -> np.ndarray:
    """Draws a labelled table of samples: steps downwards, guidance to the right.

    Every pixel of a sample is `scale` by `scale` pixels of the figure, without
    smoothing. Use the same labels and noise in every cell, to make cells comparable.

    Args:
      images: [S, G, N, H, W, C] in [-1, 1] or uint8, C = 1 or 3; or a dict from
        (steps, guidance) to [N, H, W, C].
      steps: S numbers of steps, top to bottom.
      guidances: G guidance scales w, left to right.
      columns: samples per row of a cell; by default about as many as rows.
      scale: see above.

    Returns:
      uint8 [H', W', 3], for `write_png`.
    """
    # Imported here: it takes half a second, and sampling alone does not need it.
    from matplotlib import figure as figures
    from matplotlib.backends import backend_agg

    if isinstance(images, Mapping):
        images = [[images[number, w] for w in guidances] for number in steps]
    images = np.asarray(images)
    chex.assert_shape(images, (len(steps), len(guidances), None, None, None, None))
    columns = columns or math.ceil(images.shape[2] ** 0.5)
    cells = [[grid(cell, columns, scale=scale) for cell in row] for row in images]
    height, width = cells[0][0].shape[:2]

    # All lengths are whole pixels: matplotlib would otherwise resample the samples.
    left, right, top, gap, bottom = 108, 16, 58, 16, 16
    cells_width = len(guidances) * (width + gap) - gap
    total_width = left + right + max(cells_width, 150)
    total_height = top + len(steps) * (height + gap) - gap + bottom
    figure = figures.Figure(
        figsize=(total_width / _DPI, total_height / _DPI), dpi=_DPI, facecolor='white'
    )

    def text(x, y, content, **style):
        style = {'ha': 'center', 'va': 'center', 'size': 11} | style
        figure.text(x / total_width, 1 - y / total_height, content, **style)

    center = left + max(cells_width, 130) / 2
    text(center, top - 40, 'guidance scale w', size=9, color='0.35')
    for column, w in enumerate(guidances):
        text(left + column * (width + gap) + width / 2, top - 14, f'{w:g}')
    for row, number in enumerate(steps):
        y = top + row * (height + gap)
        text(left - 14, y + height / 2, step_count(number), ha='right')
        for column, cell in enumerate(cells[row]):
            x = left + column * (width + gap)
            rgb = np.broadcast_to(cell, (height, width, 3))
            figure.figimage(rgb, x, total_height - y - height)
    canvas = backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
