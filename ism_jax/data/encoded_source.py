"""What the sources of encoded images (PNG, JPEG, ...) share: decoding and errors."""

import abc
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image

from ism_jax.data import image_crop, source

# After this many unreadable images in a row, the data are at fault, not the image.
MAX_SKIPPED_IN_ROW = 100


class EncodedSource(source.Source, abc.ABC):
    """Base class of sources of encoded images, wherever they are stored.

    Images are cropped by `image_crop.center_crop`. A subclass has `encoded` and
    `name_of`.

    Args:
      origin: where the images are, for messages.
      labels: [N] integers.
      class_names: one name per class.
      image_size: side of the cropped images, in pixels.
      channels: 1 (grey) or 3 (RGB).
      on_corrupt: 'error' stops at an unreadable image, 'skip' replaces it with the next
        readable one and counts it in `skipped`.
    """

    def __init__(
        self,
        origin,
        labels: np.ndarray,
        class_names,
        *,
        image_size: int,
        channels: int,
        on_corrupt: Literal['error', 'skip'] = 'error',
    ):
        self.origin = origin
        self.labels = np.asarray(labels, np.int32)
        self.class_names = tuple(class_names)
        self.image_shape = (image_size, image_size, channels)
        self.skipped = source.SkippedImages()
        self._attempts = MAX_SKIPPED_IN_ROW if on_corrupt == 'skip' else 1

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        attempts = min(self._attempts, len(self))
        for candidate in range(index, index + attempts):
            # The first is not wrapped, so that an index past the end is an error.
            chosen = candidate % len(self) if candidate > index else index
            label = self.labels[chosen]
            try:
                return {'image': self._read(chosen), 'label': label}
            except source.CorruptImageError as error:
                last = error
                if self._attempts > 1:
                    self.skipped.add(chosen, self.name_of(chosen), str(error))
        if self._attempts > 1:
            last = source.CorruptImageError(
                f'{attempts} images in a row in {self.origin} cannot be read; the last '
                f'error: {last}'
            )
        raise last

    @abc.abstractmethod
    def encoded(self, index: int) -> Path | BinaryIO:
        """Image `index` as a file in one of the formats that Pillow reads."""

    def _read(self, index: int) -> np.ndarray:
        size, _, channels = self.image_shape
        with (
            source.decoding(self.name_of(index)),
            Image.open(self.encoded(index)) as image,
        ):
            return image_crop.center_crop(image, size, channels)
