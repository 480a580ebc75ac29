"""TFDS data sets for tests."""

import io
import os

import numpy as np
from PIL import Image


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, 'PNG')
    file.seek(0)
    return file


def write_tfds(root, name, version, features, splits):
    """Prepares a data set as TFDS does, from images that are already encoded.

    Encoding arrays would import TensorFlow.
    """
    import tensorflow_datasets as tfds

    folder = os.path.join(root, name, version)
    os.makedirs(folder)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name=name,
            version=tfds.core.Version(version),
            data_dir=folder,
            module_name=name,
        ),
        features=tfds.features.FeaturesDict(features),
        supervised_keys=('picture', 'fine') if 'fine' in features else None,
    )
    writer = tfds.core.SequentialWriter(
        info, max_examples_per_shard=4, file_format='array_record'
    )
    writer.initialize_splits(list(splits))
    writer.add_examples(splits)
    writer.close_all()


def write_small_mnist(root):
    """10 images of 28x28; image i has the grey value 20 i + 10, 20 i + 11 in 'test'."""
    import tensorflow_datasets as tfds

    features = {
        'image': tfds.features.Image(shape=(28, 28, 1)),
        'label': tfds.features.ClassLabel(num_classes=10),
    }
    splits = {
        split: [
            {'image': png(np.full((28, 28), 20 * i + extra, np.uint8)), 'label': i}
            for i in range(10)
        ]
        for split, extra in (('train', 10), ('test', 11))
    }
    write_tfds(root, 'mnist', '3.0.1', features, splits)
