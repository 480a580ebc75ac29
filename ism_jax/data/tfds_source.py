"""Image data sets of TensorFlow Datasets (TFDS), read without TensorFlow."""

import difflib
import functools
import importlib.util
import subprocess
import sys

import numpy as np
from PIL import Image

from ism_jax.data import image_crop, source

# Prepares a data set in another process; the arguments are its name and the folder.
_PREPARE = """
import sys
import tensorflow_datasets as tfds
builder = tfds.builder(
    sys.argv[1], data_dir=sys.argv[2] or None, file_format='array_record')
builder.download_and_prepare(file_format='array_record')
"""


class TfdsSource(source.Source):
    """A source of any TFDS image data set, through its ArrayRecord files.

    The first use prepares the data set in another process, because preparation imports
    TensorFlow and reading does not. If several training processes share a file system,
    prepare it beforehand.

    The image and the label are the features that the data set names as its supervised
    keys, or those named 'image' and 'label', or the only ones of their types. Images of
    one common size up to `image_size` are padded with black; all others are cropped
    by `image_crop.center_crop`.

    Args:
      name: TFDS name, such as 'cifar10' or 'NAME/CONFIG:VERSION'.
      image_size: side of the images, in pixels.
      channels: 1 (grey) or 3 (RGB).
      data_dir: TFDS's folder; '' for TFDS's default.
      split: 'train', 'test', 'train[:90%]', ...

    Raises:
      ValueError: an unknown data set or split, a failed preparation, or features that
        are not one 8-bit image and one class.
    """

    def __init__(
        self,
        name: str,
        *,
        image_size: int,
        channels: int,
        data_dir: str = '',
        split: str = 'train',
    ):
        import tensorflow_datasets as tfds

        builder = _prepared_builder(name, data_dir)
        features = builder.info.features
        self._image = _feature(builder.info, tfds.features.Image, 'image')
        self._label = _feature(builder.info, tfds.features.ClassLabel, 'label')
        self.class_names = tuple(features[self._label].names)
        self.name = f'{builder.info.full_name}/{split}'
        self.image_shape = (image_size, image_size, channels)
        self.skipped = source.SkippedImages()
        sides = features[self._image].shape[:2]
        self._pads = None not in sides and max(sides) <= image_size
        try:
            self._records = builder.as_data_source(split=split)
        except ValueError as error:
            raise ValueError(f'tfds:{name} has no split {split!r}: {error}') from error

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        with source.decoding(self.name_of(index)):
            record = self._records[index]
        image, label = record[self._image], record[self._label]
        # TFDS labels the images of some test sets -1.
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f'{self.name_of(index)} has no class, its label is {label}; choose '
                'another split'
            )
        image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        size, _, channels = self.image_shape
        fit = image_crop.center_pad if self._pads else image_crop.center_crop
        return {'image': fit(image, size, channels), 'label': np.int32(label)}

    def __repr__(self):
        return f'TfdsSource({self.name!r}, {len(self)} images, {self.image_shape})'


def _prepared_builder(name: str, data_dir: str):
    """The TFDS builder of a data set, which is prepared first where necessary."""
    import tensorflow_datasets as tfds

    open_builder = functools.partial(
        tfds.builder, name, data_dir=data_dir or None, file_format='array_record'
    )
    try:
        builder = open_builder()
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f' (did you mean {close[0]!r}?)' if close else ''
        raise ValueError(
            f'tfds:{name} is unknown to TFDS{hint} and not prepared in '
            f'{data_dir or "its default folder"}; see '
            'https://www.tensorflow.org/datasets/catalog'
        ) from error
    if builder.is_prepared():
        return builder
    if importlib.util.find_spec('tensorflow') is None:
        raise ValueError(
            f'tfds:{name} is not prepared in {data_dir or "its default folder"}, and '
            'only preparing needs TensorFlow: run `pip install tensorflow-cpu` '
            '(`tensorflow` on macOS), then this command again'
        )
    done = subprocess.run([sys.executable, '-c', _PREPARE, name, data_dir])
    if done.returncode:
        raise ValueError(
            f'tfds:{name} could not be prepared in {data_dir!r} (the error is printed '
            'above); if it needs a manual download or has its own builder, run `tfds '
            f'build --file_format=array_record {name}` first'
        )
    return open_builder()


def _feature(info, kind, usual: str) -> str:
    """The key of the data set's image or label.

    Args:
      info: info of the TFDS data set.
      kind: the feature's type; only images of 8 bits count.
      usual: the name by which one of several is chosen.
    """
    # Sorted, because TFDS restores them in any order.
    features = sorted(info.features.items())
    found = [
        key
        for key, feature in features
        if isinstance(feature, kind)
        and (usual != 'image' or feature.np_dtype == np.uint8)
    ]
    supervised = [key for key in info.supervised_keys or () if key in found]
    for keys in (supervised, [key for key in found if key == usual], found):
        if len(keys) == 1:
            return keys[0]
    bits = ' with 8 bits' if usual == 'image' else ''
    raise ValueError(
        f'tfds:{info.name} has {len(found)} features of type {kind.__name__}{bits} '
        f'among {[key for key, _ in features]}, but exactly one, or one named '
        f'{usual!r}, is needed; choose another data set'
    )
