"""Draws letters and digits in colour, from the fonts that come with matplotlib.

    python launch/draw_glyphs.py --out data/glyphs

A data set of 36 classes, A to Z and 0 to 9, for `configs/glyphs.py` and
`configs/ablation_glyphs.py`. It needs no internet. DejaVu, STIX and Computer Modern
have 21 faces with letters, all with free licences; `--fonts` names a folder with other
fonts. Every face draws each character `--variants` times: slightly turned, slanted and
stretched, in any strong colour on a gradient of two pale ones. The defaults give 30,240
images in a minute, the same ones each time.
"""

import argparse
import os
from pathlib import Path
import string

from matplotlib import colors, get_data_path
import numpy as np
from PIL import Image, ImageDraw, ImageFont

MATPLOTLIB_FONTS = Path(get_data_path(), 'fonts')
CHARACTERS = string.ascii_uppercase + string.digits
# Fonts of symbols or of one alphabet only show the same box for many characters, and
# Computer Modern has other symbols in place of letters.
MIN_DISTINCT = 33
SYMBOLS = ('cmex10', 'cmmi10', 'cmsy10')
# Glyphs are drawn at this multiple of their size, then averaged.
OVERSAMPLING = 4
MARGIN = 0.15  # On each side, as a share of the image.
# Largest changes of a glyph's shape, in radians and as shares.
TURN, SLANT, STRETCH = 0.2, 0.15, 0.12
# Ranges of saturation and value. Most of the variance is in the shapes, as otherwise a
# small network learns the colours first, and the characters much later.
FRONT = ((0.7, 1.0), (0.2, 0.7))
BACK = ((0.0, 0.3), (0.9, 1.0))


def usable(path: Path) -> bool:
    """Whether a font shows letters and digits."""
    if path.stem in SYMBOLS:
        return False
    try:
        font = ImageFont.truetype(path, 32)
        masks = [font.getmask(character) for character in CHARACTERS]
    except OSError:
        return False
    shapes = {(mask.size, bytes(mask)) for mask in masks if min(mask.size) > 1}
    return len(shapes) >= MIN_DISTINCT


def glyph(path: Path, character: str, size: int) -> Image.Image:
    """A character that fills the image up to its margins, white on black."""
    side = OVERSAMPLING * size
    left, top, right, bottom = ImageFont.truetype(path, side).getbbox(character)
    scale = (1 - 2 * MARGIN) * side / max(right - left, bottom - top)
    font = ImageFont.truetype(path, max(1, int(side * scale)))
    left, top, right, bottom = font.getbbox(character)
    image = Image.new('L', (side, side))
    corner = ((side - left - right) / 2, (side - top - bottom) / 2)
    ImageDraw.Draw(image).text(corner, character, fill=255, font=font)
    return image


def coverage(image: Image.Image, random: np.random.Generator) -> np.ndarray:
    """The share of each pixel that a turned glyph covers, [size, size, 1] in [0, 1]."""
    turn, slant = random.uniform(-TURN, TURN), random.uniform(-SLANT, SLANT)
    width, height = 1 + random.uniform(-STRETCH, STRETCH, size=2)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = matrix @ np.array([[1 / width, slant], [0, 1 / height]])
    centre = np.full(2, image.width / 2)
    rows = np.column_stack([matrix, centre - matrix @ centre])
    turned = image.transform(
        image.size, Image.Transform.AFFINE, rows.ravel(), Image.Resampling.BILINEAR
    )
    size = image.width // OVERSAMPLING
    small = turned.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small)[..., None] / 255


def coloured(cover: np.ndarray, random: np.random.Generator) -> Image.Image:
    """A glyph in a random colour on a random gradient."""
    shades = [random.uniform(*np.transpose(r)) for r in (FRONT, BACK, BACK)]
    hsv = np.column_stack([random.uniform(size=3), shades])
    front, start, end = colors.hsv_to_rgb(hsv)
    angle = random.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : len(cover) * 1j, -1 : 1 : len(cover) * 1j]
    position = 0.5 + 0.5 * (np.cos(angle) * x + np.sin(angle) * y)
    position = np.clip(position, 0, 1)[..., None]
    pixels = (1 - cover) * ((1 - position) * start + position * end) + cover * front
    return Image.fromarray(np.rint(255 * pixels).astype(np.uint8))


def draw(
    out: str | os.PathLike,
    *,
    fonts: Path = MATPLOTLIB_FONTS,
    characters: str = CHARACTERS,
    size: int = 32,
    variants: int = 40,
) -> str:
    """Writes a folder of images, one subfolder per character; returns a summary.

    Raises:
      ValueError: `fonts` has no font with letters.
    """
    out = Path(out)
    found = (*fonts.rglob('*.ttf'), *fonts.rglob('*.otf'))
    faces = sorted(filter(usable, found), key=lambda path: (path.name, str(path)))
    if not faces:
        raise ValueError(f'--fonts {fonts} has no .ttf or .otf file with letters')
    for character in characters:
        (out / character).mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(faces):
            image = glyph(path, character, size)
            random = np.random.default_rng((number, ord(character)))
            for variant in range(variants):
                drawn = coloured(coverage(image, random), random)
                drawn.save(out / character / f'{number:03}_{variant:03}.png')
    total = len(characters) * len(faces) * variants
    return f'{out}: {total:,} images from {len(faces)} faces'


def main() -> None:
    """Draws the data set that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default='data/glyphs')
    parser.add_argument('--fonts', type=Path, default=MATPLOTLIB_FONTS)
    parser.add_argument('--characters', default=CHARACTERS, help='the classes')
    parser.add_argument('--size', type=int, default=32, help='side of the images')
    parser.add_argument('--variants', type=int, default=40, help='per face')
    try:
        print(draw(**vars(parser.parse_args())))
    except ValueError as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
