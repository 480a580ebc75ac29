"""Many samples, part by part on disk: what is made once survives a kill.

A folder holds `chunk-00000.npz` and so on, each with the labels of its samples, what
the feature networks see in them, and their 8-bit images where these are to be kept.
Chunk i is of the samples from number `i * size`; each is written whole or not at all,
so that several processes can share the work, and a later one can go on with it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import io
from pathlib import Path
import warnings

import numpy as np

from ism_jax.data import pixels
from ism_jax.runtime import files

_LABELS, _IMAGES = 'labels', 'images'


class Chunks:
    """The chunks of a folder.

    Args:
      folder: for them; made when the first is written.
      labels: [N], of all samples.
      size: samples of a chunk; the last may have fewer.
      keep_images: whether chunks hold the images too.
    """

    def __init__(self, folder, labels: np.ndarray, size: int, *, keep_images: bool):
        if size < 1:
            raise ValueError(f'size = {size} of a chunk must be at least 1')
        self._keep_images = keep_images
        self._folder = Path(folder)
        self._labels = np.asarray(labels)
        self._size = size
        self.count = -(-len(self._labels) // size)

    def missing(self) -> list[int]:
        """Numbers of the chunks that are not there."""
        return [i for i in range(self.count) if not self._path(i).exists()]

    def samples(self, number: int) -> int:
        """How many samples a chunk has."""
        return len(self._of(number))

    def make(
        self,
        number: int,
        sample: Callable[[int, np.ndarray], Iterable[tuple]],
        look: Callable[[np.ndarray], Mapping[str, np.ndarray]],
        *,
        progress: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Makes and writes one chunk.

        Args:
          number: of the chunk.
          sample: from the number of the first sample and all labels to batches of
            (images [b, H, W, C] in [-1, 1], labels [b]).
          look: from uint8 images to arrays [b, ...] by name.
          progress: is told how many samples were made.

        Raises:
          ValueError: a sample with NaN.
        """
        parts = []
        for images, label in sample(number * self._size, self._of(number)):
            images = pixels.to_uint8(images)
            part = dict(look(images)) | {_LABELS: np.asarray(label)}
            parts.append(part | ({_IMAGES: images} if self._keep_images else {}))
            progress(len(images))
        out = io.BytesIO()
        np.savez(out, **{n: np.concatenate([p[n] for p in parts]) for n in parts[0]})
        files.write_bytes(self._path(number), out.getvalue())

    def discard_unusable(self) -> list[int]:
        """Removes chunks that cannot be read, are of other samples, or lack images.

        Returns:
          Their numbers.
        """
        removed = []
        for number in range(self.count):
            path = self._path(number)
            if not path.exists():
                continue
            try:
                # A zip archive: every array has a checksum, which reading verifies.
                with np.load(path, allow_pickle=False) as file:
                    arrays = {name: file[name] for name in file.files}
                whole = np.array_equal(arrays[_LABELS], self._of(number))
                whole &= _IMAGES in arrays or not self._keep_images
            except Exception:  # pylint: disable=broad-exception-caught
                whole = False  # Damaged bytes surface as many kinds of error.
            if not whole:
                warnings.warn(f'{path} is not whole: it is made again', stacklevel=2)
                path.unlink()
                removed.append(number)
        return removed

    def outputs(self) -> dict[str, np.ndarray]:
        """What was seen in all samples, by name, in their order."""
        parts = []
        for number in range(self.count):
            with np.load(self._path(number), allow_pickle=False) as file:
                names = [n for n in file.files if n not in (_LABELS, _IMAGES)]
                parts.append({name: file[name] for name in names})
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    def images(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images, uint8 [n, H, W, C], and labels, chunk by chunk."""
        for number in range(self.count):
            with np.load(self._path(number), allow_pickle=False) as file:
                yield file[_IMAGES], file[_LABELS]

    def remove(self) -> None:
        """Removes all chunks."""
        for number in range(self.count):
            self._path(number).unlink(missing_ok=True)

    def _of(self, number):
        return self._labels[number * self._size : (number + 1) * self._size]

    def _path(self, number) -> Path:
        return self._folder / f'chunk-{number:05d}.npz'
