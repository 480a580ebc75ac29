"""Images in tar files, in the layout of WebDataset.

Members whose names are equal up to the first dot of the file name are one sample:
`cat_36.jpg` with `cat_36.cls`. The tar files are indexed once, when they are opened, by
the standard library; an image is then read at its offset. The readers of the package
webdataset are sequential, which would break the exact resume of a run, and its index,
wids, is no longer part of it.
"""

from concurrent import futures
import hashlib
import io
import json
from pathlib import Path
import tarfile
from typing import NamedTuple

import numpy as np

from ism_jax.data import encoded_source, folder_source, shards

_BLOCK = 512  # The unit of a tar file; two blocks of zeros end it.
_THREADS = 8


class _Sample(NamedTuple):
    name: str
    offset: int
    size: int
    label: int


class TarSource(encoded_source.EncodedSource):
    """A source of uncompressed tar files with one image and one class per sample.

    The class is an integer: the content of the member `.cls`, or else `label` in the
    member `.json`. Other members are ignored.

    Args:
      pattern: see `shards.find_shards`.
      image_size, channels, on_corrupt: see `EncodedSource`.

    Raises:
      ValueError: a missing or truncated file, or a sample without an image or a class.
    """

    def __init__(self, pattern: str, **options):
        self._shards = shards.find_shards(pattern, 'tar')
        with futures.ThreadPoolExecutor(_THREADS) as pool:
            indices = list(pool.map(_read_index, self._shards))
        samples = [sample for index in indices for sample in index]
        if not samples:
            raise ValueError(f'tar:{pattern} holds no samples; correct the pattern')
        lengths = [len(index) for index in indices]
        self._shard_of = np.repeat(np.arange(len(indices), dtype=np.int32), lengths)
        self._names = [sample.name for sample in samples]
        self._places = np.array([(s.offset, s.size) for s in samples], np.int64)
        labels = np.array([sample.label for sample in samples])
        super().__init__(
            f'tar:{pattern}', labels, map(str, range(labels.max() + 1)), **options
        )
        digest = hashlib.sha256('\n'.join(self._names).encode())
        digest.update(self._places[:, 1].tobytes() + self.labels.tobytes())
        self._digest = digest.hexdigest()[:12]

    def encoded(self, index):
        offset, size = self._places[index]
        with self._shards[self._shard_of[index]].open('rb') as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    def name_of(self, index):
        return f'{self._shards[self._shard_of[index]]}/{self._names[index]}'

    def __repr__(self):
        return (
            f'TarSource({self.origin!r}, {len(self)} images, {self.num_classes} '
            f'classes, {self.image_shape}, listing {self._digest})'
        )


def _read_index(path: Path) -> list[_Sample]:
    """The samples of a tar file."""
    try:
        with tarfile.open(path, 'r:') as tar:
            members = [member for member in tar if member.isreg()]
            # The standard library stops without an error at a damaged header, and at
            # the end of a file that was cut between two members.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError('the mark of its end is missing')
            samples = {}
            for member in members:
                folder, _, file = member.name.rpartition('/')
                if not file.startswith('.'):
                    key, _, extension = file.partition('.')
                    parts = samples.setdefault(f'{folder}/{key}', {})
                    parts[extension.lower()] = member
            return [
                _sample(tar, f'{path}/{key.lstrip("/")}', parts)
                for key, parts in samples.items()
            ]
    except tarfile.TarError as error:
        raise ValueError(
            f'{path} is truncated or not an uncompressed tar file ({error}); copy or '
            'download it again'
        ) from error


def _sample(tar: tarfile.TarFile, name: str, parts: dict) -> _Sample:
    """The sample with these members, by extension; `name` is for messages."""
    images = [
        member
        for extension, member in parts.items()
        if folder_source.is_image(f'image.{extension}') and '.' not in extension
    ]
    label = None
    try:
        if 'cls' in parts:
            label = int(tar.extractfile(parts['cls']).read())
        elif 'json' in parts:
            label = json.loads(tar.extractfile(parts['json']).read()).get('label')
    except (ValueError, AttributeError):  # Not a number, not JSON, not an object.
        pass
    if len(images) != 1 or type(label) is not int or label < 0:
        raise ValueError(
            f'{name} has the members {", ".join(sorted(parts))}, but a sample needs '
            'one image and its class from 0 on: an integer in .cls, or as "label" in '
            '.json'
        )
    (image,) = images
    return _Sample(image.name, image.offset_data, image.size, label)
