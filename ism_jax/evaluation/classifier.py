"""Trains the classifier of small images on the real ones, and keeps it on disk.

The classifier is part of the metric: scores of two classifiers cannot be compared.
It is a function of the images, the labels and the settings (with their seed), and its
file is named after all of them.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import warnings

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ism_jax.data import pixels
from ism_jax.models import conv_classifier
from ism_jax.runtime import files

# Part of the file's name: raise it when the same settings make another classifier.
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of the network and its training; any change makes another classifier.

    Attributes:
      widths: channels of the three convolutions.
      num_features: width F of the features.
      epochs: passes over the training images.
      batch_size: of training.
      learning_rate: of Adam at its start, falling to 0 as a half cosine.
      max_shift: images are shifted by up to so many pixels in each direction.
      seed: of the parameters, the order and the shifts.
    """

    widths: tuple[int, int, int] = (16, 32, 64)
    num_features: int = 64
    epochs: int = 15
    batch_size: int = 100
    learning_rate: float = 3e-3
    max_shift: int = 2
    seed: int = 0

    def __post_init__(self):
        for field in ('num_features', 'epochs', 'batch_size'):
            if getattr(self, field) < 1:
                raise ValueError(f'{field} = {getattr(self, field)} must be at least 1')
        if self.max_shift < 0:
            raise ValueError(f'max_shift = {self.max_shift} must be at least 0')


class TrainedClassifier:
    """A trained classifier: a feature function, see `scores.FeatureFunction`.

    Attributes:
      network, params: of `models.classifier`.
      accuracy: share of the held-out real images that it reads rightly.
      key: hash of the images, the labels and the settings; record it with each score.
    """

    def __init__(
        self,
        network: conv_classifier.ConvClassifier,
        params,
        *,
        accuracy: float,
        key: str,
        batch_size: int = 250,
    ):
        self.network = network
        self.params = params
        self.accuracy = accuracy
        self.key = key
        self._batch_size = batch_size
        self._apply = jax.jit(network.apply)

    def __call__(self, images) -> dict[str, np.ndarray]:
        """Features [N, F] and logits [N, num_classes], float32, of any N.

        Args:
          images: [N, S, S, C], floating in [-1, 1] or uint8.
        """
        parts = []
        for start in range(0, max(len(images), 1), self._batch_size):
            batch = _floating(images[start : start + self._batch_size])
            kept = len(batch)
            # Filled up, so that one batch size is compiled.
            padding = ((0, self._batch_size - kept), (0, 0), (0, 0), (0, 0))
            out = self._apply({'params': self.params}, np.pad(batch, padding))
            parts.append({name: np.asarray(out[name])[:kept] for name in out})
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def split(num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training images and of the held-out tenth, both ascending.

    A fixed shuffle, whatever the seed of the training. Not every tenth image: data
    often come sorted by, or cycling through, the classes.

    Raises:
      ValueError: fewer than 10 images.
    """
    if num_images < 10:
        raise ValueError(
            f'{num_images} images cannot be split into nine parts to train on and one '
            'to hold out: at least 10 are needed'
        )
    # RandomState, because NumPy promises that its stream never changes.
    order = np.random.RandomState(0).permutation(num_images)
    held_out = num_images // 10
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def load_or_train(
    images,
    labels,
    *,
    num_classes: int,
    cache_dir=None,
    settings: Settings = Settings(),
    report: Callable[[str], None] = lambda message: None,
) -> TrainedClassifier:
    """The classifier of these images: from its file, or trained and then filed.

    A file that is missing, truncated or damaged, or a directory that cannot be written
    to, costs a training but is never fatal.

    Args:
      images: real images, [N, S, S, C], floating in [-1, 1] or uint8, S divisible by 4.
      labels: [N] integers in 0 .. num_classes - 1.
      num_classes: number of classes.
      cache_dir: directory of the file; None for no file.
      settings: see `Settings`.
      report: is told in words what is done.

    Returns:
      The classifier, the same from the file as from the training.

    Raises:
      ValueError: images and labels disagree, or a label is out of range.
    """
    images, labels = _check(images, labels, num_classes)
    key = content_key(images, labels, num_classes, settings)
    path = None
    if cache_dir is not None:
        path = pathlib.Path(cache_dir) / f'classifier-{key}.npz'
        loaded = _load(path, images.shape[1:], num_classes, settings, key)
        if loaded is not None:
            report(f'classifier: held-out accuracy {loaded.accuracy:.2%}, from {path}')
            return loaded
    report(f'classifier: training on {len(images)} real images')
    trained = train(images, labels, num_classes=num_classes, settings=settings, key=key)
    report(f'classifier: held-out accuracy {trained.accuracy:.2%}')
    if path is not None:
        _save(path, trained)
    return trained


def content_key(images, labels, num_classes: int, settings: Settings) -> str:
    """Hash of all that the classifier depends on, 16 hexadecimal digits.

    uint8 images and the same in [-1, 1] have the same key.
    """
    about = dataclasses.asdict(settings) | {
        'version': _VERSION,
        'num_classes': num_classes,
        'shape': np.shape(images),
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for start in range(0, len(images), 1000):
        digest.update(np.ascontiguousarray(_floating(images[start : start + 1000])))
    digest.update(np.ascontiguousarray(labels, np.int64))
    return digest.hexdigest()[:16]


def train(
    images, labels, *, num_classes: int, settings: Settings = Settings(), key: str = ''
) -> TrainedClassifier:
    """Trains by Adam on nine tenths of the images and measures on the held-out tenth.

    Args:
      images, labels, num_classes, settings: as for `load_or_train`.
      key: name of the result.

    Raises:
      ValueError: as `load_or_train`.
    """
    images, labels = _check(images, labels, num_classes)
    train_indices, held_out = split(len(images))
    batch_size = min(settings.batch_size, len(train_indices))
    steps_per_epoch = len(train_indices) // batch_size
    network = _network(num_classes, settings)
    init_key, shift_key = jax.random.split(jax.random.key(settings.seed))
    example = jnp.zeros((1, *images.shape[1:]))
    params = jax.jit(network.init)(init_key, example)['params']
    learning_rate = optax.cosine_decay_schedule(
        settings.learning_rate, settings.epochs * steps_per_epoch
    )
    optimizer = optax.adam(learning_rate)
    opt_state = optimizer.init(params)

    def loss(params, batch, label):
        logits = network.apply({'params': params}, batch)['logits']
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    @jax.jit
    def step(params, opt_state, number, batch, label):
        key = jax.random.fold_in(shift_key, number)
        batch = _shift(key, batch, settings.max_shift)
        gradient = jax.grad(loss)(params, batch, label)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state

    for epoch in range(settings.epochs):
        order = np.random.RandomState([settings.seed, epoch]).permutation(train_indices)
        for place in range(steps_per_epoch):
            batch = order[place * batch_size : (place + 1) * batch_size]
            number = epoch * steps_per_epoch + place
            params, opt_state = step(
                params, opt_state, number, _floating(images[batch]), labels[batch]
            )
    trained = TrainedClassifier(network, params, accuracy=float('nan'), key=key)
    read = trained(images[held_out])['logits'].argmax(axis=1)
    trained.accuracy = float((read == labels[held_out]).mean())
    return trained


def _network(num_classes, settings):
    return conv_classifier.ConvClassifier(
        num_classes, widths=settings.widths, num_features=settings.num_features
    )


def _floating(images):
    """float32 in [-1, 1]."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return pixels.from_uint8(images)
    return images.astype(np.float32)


def _shift(key, images, max_shift):
    """Each image moved by its own whole number of pixels; edges are continued."""
    padding = ((0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0))
    padded = jnp.pad(images, padding, mode='edge')
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * max_shift + 1)

    def cut(image, corner):
        start = (corner[0], corner[1], 0)
        return jax.lax.dynamic_slice(image, start, images.shape[1:])

    return jax.vmap(cut)(padded, corners)


def _check(images, labels, num_classes):
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            f'images have shape {images.shape} and labels {labels.shape}: '
            '[N, S, S, C] and [N] are expected'
        )
    if images.dtype != np.uint8 and images.dtype.kind in 'biuc':
        raise ValueError(
            f'images of type {images.dtype}: floating in [-1, 1] or uint8 is expected'
        )
    if labels.dtype.kind not in 'iu':
        raise ValueError(f'labels of type {labels.dtype}: integers are expected')
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f'labels run from {labels.min()} to {labels.max()}: 0 .. '
            f'{num_classes - 1} is expected for num_classes = {num_classes}'
        )
    return images, labels.astype(np.int32)


def _save(path, trained):
    leaves = flax.traverse_util.flatten_dict(trained.params, sep='/')
    out = io.BytesIO()
    np.savez(
        out,
        key=np.array(trained.key),
        accuracy=np.float64(trained.accuracy),
        **{f'params/{name}': np.asarray(leaf) for name, leaf in leaves.items()},
    )
    try:
        files.write_bytes(path, out.getvalue())
    except OSError as error:
        warnings.warn(
            f'classifier file {os.fspath(path)} cannot be written ({error}): the next '
            'run will train it again; give a cache directory that can be written to',
            stacklevel=3,
        )


def _load(path, image_shape, num_classes, settings, key):
    """The classifier filed under `key`, or None."""
    if not path.exists():
        return None
    network = _network(num_classes, settings)
    example = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    init = jax.eval_shape(network.init, jax.random.key(0), example)['params']
    expected = flax.traverse_util.flatten_dict(init, sep='/')
    try:
        # A zip archive: every array has a checksum, which reading verifies.
        with np.load(path, allow_pickle=False) as file:
            if str(file['key']) != key:
                raise ValueError(f'it holds the classifier {file["key"]}')
            accuracy = float(file['accuracy'])
            leaves = {name: file[f'params/{name}'] for name in expected}
        for name, leaf in leaves.items():
            if (leaf.shape, leaf.dtype) != (expected[name].shape, expected[name].dtype):
                raise ValueError(f'{name} is {leaf.dtype} {leaf.shape}')
    # Damaged bytes surface as many kinds of error: zip, zlib, header, key, value.
    except Exception as error:  # pylint: disable=broad-exception-caught
        warnings.warn(
            f'classifier file {os.fspath(path)} cannot be read '
            f'({type(error).__name__}: {error}): training it again and replacing it',
            stacklevel=3,
        )
        return None
    params = flax.traverse_util.unflatten_dict(leaves, sep='/')
    return TrainedClassifier(
        network, jax.device_put(params), accuracy=accuracy, key=key
    )
