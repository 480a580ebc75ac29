r"""Draws letters and digits in colour, from the fonts of this machine.

    apt-get install fonts-aenigma fonts-urw-base35 fonts-texgyre fonts-lato \
        fonts-averia-gwf fonts-averia-sans-gwf fonts-averia-serif-gwf \
        fonts-dejavu fonts-freefont-ttf fonts-linuxlibertine fonts-croscore
    python launch/draw_glyphs.py --fonts /usr/share/fonts --out data/glyphs

A data set of 36 classes, A to Z and 0 to 9, for experiments without internet
(`configs/ablation_glyphs.py`): thousands of shapes, in any colour on a gradient of any
two colours. Every font draws each character `--colourings` times. The fonts named above
give about 45,000 images of 32x32 in a minute; the same fonts give the same images.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
import string

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = string.ascii_uppercase + string.digits
# Fonts of symbols or of one alphabet only show the same box for many characters.
MIN_DISTINCT = 33
# Glyphs are drawn at this multiple of their size, then averaged.
OVERSAMPLING = 4
MARGIN = 0.1  # On each side, as a share of the image.
# Smallest L1 distance of the glyph's colour from the background's, in [0, 3].
MIN_CONTRAST = 1.0


def usable(path: Path) -> bool:
    """Whether a font shows letters and digits."""
    try:
        font = ImageFont.truetype(path, 32)
        masks = [font.getmask(character) for character in CHARACTERS]
    except OSError:
        return False
    shapes = {(mask.size, bytes(mask)) for mask in masks if min(mask.size) > 1}
    return len(shapes) >= MIN_DISTINCT


def coverage(path: Path, character: str, size: int) -> np.ndarray:
    """The share of each pixel that the glyph covers, [size, size] in [0, 1]."""
    side = OVERSAMPLING * size
    left, top, right, bottom = ImageFont.truetype(path, side).getbbox(character)
    scale = (1 - 2 * MARGIN) * side / max(right - left, bottom - top)
    font = ImageFont.truetype(path, max(1, int(side * scale)))
    left, top, right, bottom = font.getbbox(character)
    image = Image.new('L', (side, side))
    corner = ((side - left - right) / 2, (side - top - bottom) / 2)
    ImageDraw.Draw(image).text(corner, character, fill=255, font=font)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX)) / 255


def coloured(cover: np.ndarray, random: np.random.Generator) -> Image.Image:
    """A glyph in a random colour on a random gradient."""
    while True:
        glyph, start, end = random.uniform(size=(3, 3))
        if min(abs(glyph - start).sum(), abs(glyph - end).sum()) >= MIN_CONTRAST:
            break
    angle = random.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : len(cover) * 1j, -1 : 1 : len(cover) * 1j]
    position = np.clip(0.5 + 0.5 * (np.cos(angle) * x + np.sin(angle) * y), 0, 1)
    position, cover = position[..., None], cover[..., None]
    pixels = (1 - cover) * ((1 - position) * start + position * end) + cover * glyph
    return Image.fromarray(np.rint(255 * pixels).astype(np.uint8))


def glyphs(
    fonts: list[Path], size: int, colourings: int
) -> Iterator[tuple[str, str, Image.Image]]:
    """Yields class, file name and image."""
    for number, path in enumerate(fonts):
        for character in CHARACTERS:
            cover = coverage(path, character, size)
            random = np.random.default_rng((number, ord(character)))
            for colouring in range(colourings):
                yield character, f'{number:04}_{colouring}.png', coloured(cover, random)


def main() -> None:
    """Draws the data set that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--fonts', type=Path, default='/usr/share/fonts')
    parser.add_argument('--out', type=Path, default='data/glyphs')
    parser.add_argument('--size', type=int, default=32, help='side of the images')
    parser.add_argument('--colourings', type=int, default=2, help='per glyph')
    options = parser.parse_args()
    found = (*options.fonts.rglob('*.ttf'), *options.fonts.rglob('*.otf'))
    fonts = sorted(filter(usable, found), key=lambda path: (path.name, str(path)))
    if not fonts:
        parser.error(f'--fonts {options.fonts} has no .ttf or .otf file with letters')
    for character in CHARACTERS:
        (options.out / character).mkdir(parents=True, exist_ok=True)
    total = 0
    for character, name, image in glyphs(fonts, options.size, options.colourings):
        image.save(options.out / character / name)
        total += 1
    print(f'{options.out}: {total:,} images from {len(fonts)} fonts')


if __name__ == '__main__':
    main()
