"""The interface of every data source.

A source is a random-access collection of labelled images, as Grain reads it:

    len(source)              number of images
    source[i]                {'image': uint8 [H, W, C], 'label': np.int32}; a source of
                             latents returns a `latents.Record`
    source.draw(i, ...)      example i as training reads it
    source.name_of(i)        name of image i in messages
    source.image_shape       (H, W, C), the same for all images or latents
    source.class_names       one name per class, indexed by the labels
    source.skipped           unreadable images that were replaced, see `SkippedImages`
    source.labels            [N] int32; not for TFDS, where it would read all records
    repr(source)             identical for identical data, in any process; checkpoints
                             store it
"""

from collections.abc import Callable
import contextlib

import numpy as np

from ism_jax.data import pixels


class CorruptImageError(ValueError):
    """An image that cannot be decoded."""


class SkippedImages:
    """The unreadable images that a source replaced; `len` counts each image once.

    Attributes:
      reasons: file -> error message, for the first `LISTED` images.
    """

    LISTED = 100

    def __init__(self):
        self.reasons = {}
        self._indices = set()

    def __len__(self):
        return len(self._indices)

    def add(self, index: int, file: str, reason: str) -> None:
        if len(self._indices) < self.LISTED:
            self.reasons[file] = reason
        self._indices.add(index)


class Source:
    """Base class of the sources; the module's docstring lists their interface."""

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    skipped: SkippedImages

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def draw(
        self, index: int, *, flip: bool, random: Callable[[], np.random.Generator]
    ) -> tuple[np.ndarray, np.int32]:
        """One training example.

        Args:
          index: index of the record.
          flip: mirror the image horizontally.
          random: makes the random generator of this example, for sources that sample.

        Returns:
          Pixels, uint8 [H, W, C] (latents are float32), and the label.
        """
        del random  # Images are not sampled.
        record = self[index]
        image = record['image']
        return image[:, ::-1] if flip else image, np.int32(record['label'])

    def example(self, index: int, random: np.random.Generator) -> np.ndarray:
        """Example `index` without a flip, float32 [H, W, C], for statistics."""
        return pixels.to_float(self.draw(index, flip=False, random=lambda: random)[0])

    def mean_example(self, index: int) -> np.ndarray:
        """Example `index` without a flip or sampling, float32 [H, W, C]."""
        return pixels.to_float(self[index]['image'])

    def name_of(self, index: int) -> str:
        """The name of image `index` by which a user can find it."""
        return f'image {index} of {self!r}'


@contextlib.contextmanager
def decoding(name: str):
    """Reports a decoder's error as a `CorruptImageError` that names the image.

    Errors of the file system pass unchanged: the next attempt may succeed, so skipping
    the image would make the data depend on chance.
    """
    try:
        yield
    except Exception as error:  # Decoders raise any type.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CorruptImageError(
            f'{_printable(name)} cannot be read as an image ({_printable(error)})'
        ) from error


def _printable(text) -> str:
    """Escapes control characters, which a terminal would interpret."""
    return ''.join(
        c if c.isprintable() else c.encode('unicode_escape').decode() for c in str(text)
    )
