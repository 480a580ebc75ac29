"""A data set as TFDS prepares it, for tests."""

import os


def write_tfds(root, name, version, features, splits):
    """Prepares a data set as TFDS does, of images that are PNG already.

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
