"""Images for people: 8-bit conversion, grids, PNG files, the figure of the README."""

from collections.abc import Mapping, Sequence
import io
import json
import math

import numpy as np
from PIL import Image, PngImagePlugin

from ism_jax.data import pixels
from ism_jax.runtime import files

_DPI = 100
# A side at which a person sees what is on a picture.
READABLE_SIDE = 64


def grid(
    images, columns: int, padding: int = 2, *, scale: int = 1, background: int = 255
) -> np.ndarray:
    """Images side by side, row by row.

    Args:
      images: [N, H, W, C], floating in [-1, 1] or uint8, N at least 1.
      columns: images in a row; the last row is filled with background.
      padding: pixels of background between and around images; not scaled.
      scale: how many pixels wide and high each pixel becomes (nearest neighbour).
      background: its 8-bit value.

    Returns:
      uint8 [rows (H scale + padding) + padding, columns (W scale + padding) + padding,
      C].

    Raises:
      ValueError: an argument is out of the range given above.
    """
    images = pixels.to_uint8(images)
    if images.ndim != 4 or not len(images):
        raise ValueError(
            f'images have shape {images.shape}: [N, H, W, C] with N of at least 1 is '
            'expected; add the missing axis'
        )
    arguments = (('columns', columns, 1), ('padding', padding, 0), ('scale', scale, 1))
    for name, value, least in arguments:
        if value < least:
            raise ValueError(f'{name} = {value} must be at least {least}')
    images = upscale(images, scale)
    number, height, width, channels = images.shape
    rows = math.ceil(number / columns)
    tall, wide = height + padding, width + padding
    shape = (rows * tall + padding, columns * wide + padding, channels)
    out = np.full(shape, background, np.uint8)
    for index, image in enumerate(images):
        top = index // columns * tall + padding
        left = index % columns * wide + padding
        out[top : top + height, left : left + width] = image
    return out


def readable_scale(side: int) -> int:
    """Factor that brings small images to about `READABLE_SIDE` pixels."""
    return max(1, READABLE_SIDE // side)


def upscale(images: np.ndarray, scale: int) -> np.ndarray:
    """[..., H, W, C] to [..., H scale, W scale, C] by nearest neighbour."""
    return images.repeat(scale, axis=-3).repeat(scale, axis=-2)


def write_png(path, array, metadata: Mapping | None = None) -> None:
    """Writes a PNG file, whole or not at all.

    Args:
      path: of the file; its directory is made.
      array: uint8 [H, W] or [H, W, C], C of 1 (grey), 3 (RGB) or 4 (with opacity).
      metadata: text chunks of the file, name to value; values that are no strings are
        written as JSON. Names have 1 to 79 Latin-1 characters. `Image.open(path).text`
        of Pillow and `identify -verbose` show them.

    Raises:
      ValueError: the array is no such image, or a name is too long.
    """
    array = np.asarray(array)
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ValueError(
            f'array of type {array.dtype} and shape {array.shape}: uint8 [H, W] or '
            '[H, W, 1, 3 or 4] is expected; use to_uint8 and grid'
        )
    chunks = PngImagePlugin.PngInfo()
    for name, value in (metadata or {}).items():
        # Pillow writes longer names, which readers then refuse.
        if not 1 <= len(name) <= 79:
            raise ValueError(
                f'metadata name {name!r} has {len(name)} characters: PNG allows 1 to '
                '79; shorten it'
            )
        chunks.add_text(name, value if isinstance(value, str) else json.dumps(value))
    if channels == 1:
        array = array.reshape(array.shape[:2])
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(out, 'PNG', pnginfo=chunks)
    files.write_bytes(path, out.getvalue())


def steps_by_guidance_figure(
    images,
    steps: Sequence[int],
    guidances: Sequence[float],
    *,
    columns: int | None = None,
    scale: int = 2,
    title: str = '',
) -> np.ndarray:
    """A labelled table of samples: number of steps downwards, guidance to the right.

    Every pixel of a sample is `scale` pixels of the figure, without smoothing. Give
    each cell the same labels and noise, so that the eye compares like with like.

    Args:
      images: [S, G, N, H, W, C] in [-1, 1] or uint8, C of 1 or 3; or a dict from
        (steps, guidance) to [N, H, W, C], missing cells being left empty.
      steps: S numbers of steps, top to bottom.
      guidances: G strengths w, left to right.
      columns: samples in a row of a cell; by default about as many as rows.
      scale: see above.
      title: of the figure; '' for none.

    Returns:
      uint8 [H', W', 3], for `write_png`.

    Raises:
      ValueError: shapes disagree with steps and guidances, or no cell has images.
    """
    # Here, because it takes half a second to import and samples need none.
    from matplotlib import figure as figures
    from matplotlib.backends import backend_agg

    cells = _cells(images, steps, guidances)
    shapes = sorted({np.shape(cell) for cell in cells.values()})
    if len(shapes) > 1 or len(shapes[0]) != 4 or shapes[0][3] not in (1, 3):
        raise ValueError(
            f'cells have the shapes {shapes}: one shape [N, H, W, 1 or 3] for all is '
            'expected; show equally many samples in each'
        )
    columns = columns or math.ceil(shapes[0][0] ** 0.5)
    blocks = {
        cell: grid(samples, columns, padding=2, scale=scale)
        for cell, samples in cells.items()
    }
    height, width = next(iter(blocks.values())).shape[:2]

    # All lengths are pixels, and each cell gets exactly its own: matplotlib would
    # otherwise resample the samples.
    left, right, between, bottom = 108, 16, 16, 16
    top = 58 + (30 if title else 0)
    samples_width = len(guidances) * (width + between) - between
    # Room for the title (about 9 pixels a letter) beside few or small samples.
    total_width = left + right + max(samples_width, 150, 9 * len(title) - left)
    total_height = top + len(steps) * (height + between) - between + bottom
    figure = figures.Figure(
        figsize=(total_width / _DPI, total_height / _DPI), dpi=_DPI, facecolor='white'
    )

    def text(x, y, content, **style):
        style = {'ha': 'center', 'va': 'center', 'size': 11} | style
        figure.text(x / total_width, 1 - y / total_height, content, **style)

    if title:
        text(total_width / 2, 22, title, size=12, weight='bold')
    center = left + max(samples_width, 130) / 2
    text(center, top - 40, 'guidance strength w', size=9, color='0.35')
    for column, guidance in enumerate(guidances):
        x = left + column * (width + between) + width / 2
        text(x, top - 14, f'{guidance:g}')
    for row, number in enumerate(steps):
        y = top + row * (height + between)
        label = f'{number} step' if number == 1 else f'{number} steps'
        text(left - 14, y + height / 2, label, ha='right')
        for column, guidance in enumerate(guidances):
            block = blocks.get((number, guidance))
            if block is None:
                continue
            x = left + column * (width + between)
            rgb = np.broadcast_to(block, (height, width, 3))
            figure.figimage(rgb, x, total_height - y - height)
    canvas = backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _cells(images, steps, guidances):
    """{(steps, guidance): [N, H, W, C]} of either form of images."""
    wanted = [(number, guidance) for number in steps for guidance in guidances]
    if len(set(wanted)) != len(wanted) or not wanted:
        raise ValueError(
            f'steps = {list(steps)} and guidances = {list(guidances)} must each hold '
            'at least one value, and none twice'
        )
    if isinstance(images, Mapping):
        unknown = sorted(set(images) - set(wanted))
        if unknown or not images:
            raise ValueError(
                f'images have the cells {sorted(images)}, of which {unknown} are not '
                f'among steps = {list(steps)} and guidances = {list(guidances)}'
            )
        return {cell: np.asarray(images[cell]) for cell in wanted if cell in images}
    images = np.asarray(images)
    if images.ndim != 6 or images.shape[:2] != (len(steps), len(guidances)):
        raise ValueError(
            f'images have shape {images.shape}: [{len(steps)}, {len(guidances)}, N, H, '
            'W, C] is expected for these steps and guidances'
        )
    return dict(zip(wanted, images.reshape(-1, *images.shape[2:])))
