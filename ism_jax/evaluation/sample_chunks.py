"""A large set of samples on disk, chunk by chunk, so that an evaluation can resume.

A folder holds `chunk-00000.npz`, `chunk-00001.npz`, ..., each with the labels and the
features of its samples, and optionally their 8-bit images. Chunk i starts at sample
`i * size`. Each file is written atomically, so that processes can share the work and a
later run can resume it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import warnings

import numpy as np

from ism_jax.data import pixels
from ism_jax.evaluation import padded_batches
from ism_jax.runtime import files, paths

_LABELS, _IMAGES = 'labels', 'images'


class Chunks:
    """The chunks of one folder.

    Args:
      folder: folder of the files; created with the first file.
      labels: [N], of all samples.
      size: samples per chunk; the last may have fewer.
      keep_images: whether chunks hold the images too.

    Attributes:
      count: number of chunks.
    """

    def __init__(self, folder, labels: np.ndarray, size: int, *, keep_images: bool):
        self._keep_images = keep_images
        self._folder = paths.to_path(folder)
        self._labels = np.asarray(labels)
        self._size = size
        self.count = -(-len(self._labels) // size)

    def missing(self) -> list[int]:
        """Indices of the chunks that are not on disk."""
        return [i for i in range(self.count) if not self._path(i).exists()]

    def num_samples(self, index: int) -> int:
        """Number of samples of a chunk."""
        return len(self._labels_of(index))

    def make(
        self,
        index: int,
        sample: Callable[[int, np.ndarray], Iterable[tuple]],
        extract: Callable[[np.ndarray], Mapping[str, np.ndarray]],
        *,
        progress: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Samples and writes one chunk.

        Args:
          index: index of the chunk.
          sample: (index of the first sample, labels [n]) -> batches of (images
            [b, H, W, C] in [-1, 1], labels [b]).
          extract: uint8 images -> features [b, ...] by name.
          progress: called with the size of each finished batch.

        Raises:
          ValueError: a sample contains NaN.
        """
        parts = []
        for images, label in sample(index * self._size, self._labels_of(index)):
            images = pixels.to_uint8(images)
            part = dict(extract(images)) | {_LABELS: np.asarray(label)}
            parts.append(part | ({_IMAGES: images} if self._keep_images else {}))
            progress(len(images))
        files.write_npz(self._path(index), **padded_batches.concatenate(parts))

    def discard_unusable(self) -> None:
        """Removes chunks that are damaged, have other labels, or lack images."""
        for index in range(self.count):
            path = self._path(index)
            if not path.exists():
                continue
            try:
                # Reading a zip archive verifies the checksum of every array.
                with files.open_npz(path) as file:
                    arrays = {name: file[name] for name in file.files}
                usable = np.array_equal(arrays[_LABELS], self._labels_of(index))
                usable &= _IMAGES in arrays or not self._keep_images
            except Exception as error:  # pylint: disable=broad-exception-caught
                paths.raise_if_unreachable(path, error)
                usable = False  # Damaged bytes surface as many kinds of error.
            if not usable:
                warnings.warn(
                    f'{path} is damaged or incomplete: recomputing it', stacklevel=2
                )
                paths.remove_file(path)

    def features(self) -> dict[str, np.ndarray]:
        """The features of all samples by name, in order."""
        parts = []
        for index in range(self.count):
            with files.open_npz(self._path(index)) as file:
                names = [n for n in file.files if n not in (_LABELS, _IMAGES)]
                parts.append({name: file[name] for name in names})
        return padded_batches.concatenate(parts)

    def images(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields images, uint8 [n, H, W, C], and labels [n], chunk by chunk."""
        for index in range(self.count):
            with files.open_npz(self._path(index)) as file:
                yield file[_IMAGES], file[_LABELS]

    def remove(self) -> None:
        """Deletes all chunks."""
        for index in range(self.count):
            paths.remove_file(self._path(index))

    def _labels_of(self, index):
        return self._labels[index * self._size : (index + 1) * self._size]

    def _path(self, index) -> paths.Path:
        return self._folder / f'chunk-{index:05d}.npz'
