"""Image data sets in the layout of Hugging Face `datasets`: Parquet files, or the hub.

`datasets` copies the Parquet files into an Arrow file in its cache once, from which any
image is read without the others. The copy is as large as the images.
"""

import bisect
import hashlib
import importlib.util
import io
import itertools
from pathlib import Path

import numpy as np

from ism_jax.data import encoded_source, shards
from ism_jax.runtime import paths


class HuggingFaceSource(encoded_source.EncodedSource):
    """A source of the rows of a Hugging Face data set.

    The image is the column of type `Image`, or of structs with `bytes` and `path`, and
    the label that of type `ClassLabel`, or else of integers; among several, the ones
    named 'image' and 'label'.

    Args:
      name: the source's name, for messages.
      dataset: a `datasets.Dataset`.
      files: (name, number of rows) of the files of the data set, in order; () for none.
      image_size, channels, on_corrupt: see `EncodedSource`.

    Raises:
      ValueError: no such columns, or a row without a class.
    """

    def __init__(self, name: str, dataset, files=(), **options):
        import datasets

        features = dataset.features
        image = _column(name, features, 'image', _is_image)
        label = _column(name, features, 'label', _is_class, _is_integer)
        labels = dataset.data.column(label).to_numpy()
        if isinstance(features[label], datasets.ClassLabel):
            classes = features[label].names
        else:
            classes = [str(i) for i in range(int(np.nanmax(labels)) + 1)]
        self._ends = list(itertools.accumulate(rows for _, rows in files))
        self._files = [file for file, _ in files]
        self._column = image
        self._rows = dataset.select_columns(image).cast_column(
            image, datasets.Image(decode=False)
        )
        known = (labels >= 0) & (labels < len(classes))  # False for missing labels.
        super().__init__(name, np.where(known, labels, 0), classes, **options)
        if not known.all():
            row = int(np.argmin(known))
            raise ValueError(
                f'{self.name_of(row)} has no class, its {label!r} is {labels[row]}; '
                'choose another split'
            )
        self._digest = _digest(dataset.data.column(image), self.labels)

    def encoded(self, index):
        row = self._rows[int(index)][self._column]
        if row['bytes'] is None:
            return Path(row['path'])
        return io.BytesIO(row['bytes'])

    def name_of(self, index):
        if not self._files:
            return f'row {index} of {self.origin}'
        number = bisect.bisect_right(self._ends, index)
        first = self._ends[number - 1] if number else 0
        return f'row {index - first} of {self._files[number]}'

    def __repr__(self):
        return (
            f'HuggingFaceSource({self.origin!r}, {len(self)} images, '
            f'{self.num_classes} classes, {self.image_shape}, listing {self._digest})'
        )


def open_parquet(pattern: str, *, data_dir: str = '', **options) -> HuggingFaceSource:
    """Opens Parquet files.

    Args:
      pattern: see `shards.find_shards`; local or in a bucket.
      data_dir: local folder of the cache of `datasets`; '' for its default.
      **options: image_size, channels, on_corrupt; see `EncodedSource`.

    Raises:
      ValueError: a missing or truncated file, or see `HuggingFaceSource`.
    """
    name = f'parquet:{pattern}'
    _require_datasets(name)
    import datasets
    import pyarrow
    from pyarrow import parquet

    files = []
    for path in shards.find_shards(pattern, 'parquet', tuple(paths.CLIENTS)):
        try:
            with path.open('rb') as file:
                files.append((str(path), parquet.read_metadata(file).num_rows))
        except pyarrow.ArrowInvalid as error:
            raise ValueError(
                f'{path} is truncated or not a Parquet file ({error}); copy or '
                'download it again'
            ) from error
    try:
        dataset = datasets.load_dataset(
            'parquet',
            data_files={'train': [file for file, _ in files]},
            split='train',
            cache_dir=data_dir or None,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(
            f'{name} cannot be read ({error.__cause__ or error}); all its files need '
            'the same columns, and the cache of datasets needs as much space as they do'
        ) from error
    return HuggingFaceSource(name, dataset, files, **options)


def open_hub(
    name: str, *, split: str, data_dir: str = '', **options
) -> HuggingFaceSource:
    """Opens a data set of the Hugging Face hub, or a folder in the layout of one.

    Args:
      name: such as 'ylecun/mnist', or a path.
      split: such as 'train'.
      data_dir: folder of the cache of `datasets`; '' for its default.
      **options: image_size, channels, on_corrupt; see `EncodedSource`.

    Raises:
      ValueError: no such data set or split, or see `HuggingFaceSource`.
    """
    _require_datasets(f'hf:{name}')
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split, cache_dir=data_dir or None)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(
            f'hf:{name} cannot be opened ({error}); correct its name and split, or '
            'download its Parquet files and use parquet:PATTERN'
        ) from error
    return HuggingFaceSource(f'hf:{name}/{split}', dataset, **options)


def _require_datasets(name: str) -> None:
    if importlib.util.find_spec('datasets') is None:
        raise ValueError(
            f'{name} needs the package datasets: run `pip install datasets`'
        )


def _is_image(feature) -> bool:
    import datasets

    stored = isinstance(feature, dict) and feature.keys() == {'bytes', 'path'}
    return stored or isinstance(feature, datasets.Image)


def _is_class(feature) -> bool:
    import datasets

    return isinstance(feature, datasets.ClassLabel)


def _is_integer(feature) -> bool:
    return 'int' in (getattr(feature, 'dtype', None) or '')


def _column(name: str, features, usual: str, *kinds) -> str:
    """The column of the image or the label.

    Args:
      name: name of the source, for the message.
      features: type by column.
      usual: the name by which one of several is chosen.
      *kinds: predicates of types, the preferred one first.
    """
    found = [[c for c in features if kind(features[c])] for kind in kinds]
    named = [c for columns in found for c in columns if c == usual][:1]
    for columns in (named, *found):
        if len(columns) == 1:
            return columns[0]
    listed = ', '.join(f'{c} ({feature})' for c, feature in features.items())
    raise ValueError(
        f'{name} has the columns {listed}; exactly one must hold images and one their '
        f'classes, or one be named {usual!r}: rename it with datasets.rename_column'
    )


def _digest(images, labels: np.ndarray) -> str:
    """Identifies the rows by the sizes of their images and their labels.

    Args:
      images: chunked Arrow array of structs with `bytes`.
      labels: [N] int32.
    """
    from pyarrow import compute

    sizes = compute.binary_length(compute.struct_field(images, 'bytes'))
    sizes = compute.fill_null(sizes, -1).to_numpy().astype(np.int64)
    return hashlib.sha256(sizes.tobytes() + labels.tobytes()).hexdigest()[:12]
