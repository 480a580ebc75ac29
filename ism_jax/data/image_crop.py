"""Decoded images to 8-bit arrays: colour conversion and ADM's centre crop."""

import numpy as np
from PIL import Image

# Transparent pixels are composited onto this colour.
BACKGROUND = 'white'


def center_crop(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """A centred square of side `size`, uint8 [size, size, channels].

    As in ADM (Dhariwal and Nichol, arXiv 2105.05233), the image is halved with a box
    filter while the shorter side is at least 2 `size`, resized with a bicubic filter,
    then cropped. The EXIF orientation is not applied, as in ADM.

    Transparent pixels become white; 16-bit grey keeps its upper 8 bits.

    Args:
      image: image of any size and mode.
      size: side of the square, in pixels.
      channels: 1 (grey) or 3 (RGB).

    Raises:
      ValueError: the image has 32-bit pixels, whose range is unknown.
    """
    image = _convert(image, channels)
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), Image.Resampling.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        image = image.resize(
            tuple(round(x * scale) for x in image.size), Image.Resampling.BICUBIC
        )
    left, top = ((x - size) // 2 for x in image.size)
    return _to_array(image.crop((left, top, left + size, top + size)))


def center_pad(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """The image in the middle of a black square, uint8 [size, size, channels].

    Sides of the image are at most `size`; see `center_crop` for `channels`.
    """
    pixels = _to_array(_convert(image, channels))
    before = [(size - side) // 2 for side in pixels.shape[:2]]
    padding = [
        (start, size - side - start)
        for start, side in zip(before, pixels.shape[:2], strict=True)
    ]
    return np.pad(pixels, [*padding, (0, 0)])


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """The image as 8-bit grey or RGB, without transparency."""
    if image.mode.startswith('I;16'):
        # Pillow would clip all values above 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise ValueError(
            f'the range of pixels of mode {image.mode!r} is unknown; convert them to '
            '8 bits'
        )
    if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
        image = image.convert('RGBA')
        background = Image.new('RGBA', image.size, BACKGROUND)
        image = Image.alpha_composite(background, image)
    return image.convert('L' if channels == 1 else 'RGB')


def _to_array(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array
