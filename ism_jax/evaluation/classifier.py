"""The small image classifier: trained on the real images, cached in a file.

The classifier is part of the metric: scores by two classifiers cannot be compared. It
is a function of the images, the labels and the settings (with their seed), and its file
is named after a hash of all three.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import json

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ism_jax.data import pixels
from ism_jax.evaluation import npz_cache, padded_batches
from ism_jax.models import conv_classifier
from ism_jax.runtime import paths

# Part of the cache key: increase it if the same settings give a different one.
_VERSION = 1
BATCH_SIZE = 250  # For inference.


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the classifier and its training, all part of the cache key.

    Attributes:
      widths: channels of the three convolutions.
      num_features: width F of the features.
      epochs: passes over the training images.
      batch_size: images per training step.
      learning_rate: initial rate of Adam, decayed to 0 by a half cosine.
      max_shift: images are shifted by up to this many pixels in each direction.
      seed: seed of the parameters, the order and the shifts.
    """

    widths: tuple[int, int, int] = (16, 32, 64)
    num_features: int = 64
    epochs: int = 15
    batch_size: int = 100
    learning_rate: float = 3e-3
    max_shift: int = 2
    seed: int = 0


DEFAULT_SETTINGS = Settings()


class TrainedClassifier:
    """A trained classifier: images in, features and logits out.

    Attributes:
      network, params: the `models.conv_classifier` and its parameters.
      accuracy: fraction of the held-out real images that it classifies correctly.
      key: hash of the images, the labels and the settings.
    """

    def __init__(
        self,
        network: conv_classifier.ConvClassifier,
        params,
        *,
        accuracy: float,
        key: str,
    ):
        self.network = network
        self.params = params
        self.accuracy = accuracy
        self.key = key
        self._apply = jax.jit(network.apply)

    def __call__(self, images) -> dict[str, np.ndarray]:
        """Features [N, F] and logits [N, num_classes], float32.

        Args:
          images: [N, H, W, C], floating in [-1, 1] or uint8, N >= 0.
        """

        def extract(batch):
            return self._apply({'params': self.params}, batch)

        return padded_batches.apply(extract, pixels.to_float(images), BATCH_SIZE)


def split(num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training images and of the held-out tenth, both ascending.

    The split is a fixed shuffle, independent of the training seed. It does not take
    every tenth image, because data are often sorted by class or cycle through classes.
    """
    # RandomState, because NumPy guarantees that its stream never changes.
    order = np.random.RandomState(0).permutation(num_images)
    held_out = num_images // 10
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def load_or_train(
    images,
    labels,
    *,
    num_classes: int,
    cache_dir=None,
    settings: Settings = DEFAULT_SETTINGS,
    log: Callable[[str], None] = lambda message: None,
) -> TrainedClassifier:
    """The classifier of these images, from the cache or trained.

    A damaged cache file or a read-only cache folder causes a warning and retraining.

    Args:
      images: real images, [N, H, W, C], floating in [-1, 1] or uint8, N >= 10.
      labels: [N] integers in 0 .. num_classes - 1.
      num_classes: number of classes.
      cache_dir: folder of the file; None for no cache.
      settings: see `Settings`.
      log: called with progress messages.

    Returns:
      The classifier, bit for bit the same whether loaded or trained.
    """
    key = content_key(images, labels, num_classes, settings)
    path = None
    if cache_dir is not None:
        path = paths.to_path(cache_dir) / f'classifier-{key}.npz'
        loaded = _load(path, num_classes, settings, key)
        if loaded is not None:
            log(f'classifier: held-out accuracy {loaded.accuracy:.2%}, from {path}')
            return loaded
    log(f'classifier: training on {len(images)} real images')
    trained = train(images, labels, num_classes=num_classes, settings=settings, key=key)
    log(f'classifier: held-out accuracy {trained.accuracy:.2%}')
    if path is not None:
        _save(path, trained)
    return trained


def content_key(images, labels, num_classes: int, settings: Settings) -> str:
    """Hash of everything that the classifier depends on, 16 hexadecimal digits.

    uint8 images and the same images in [-1, 1] have the same key.
    """
    description = dataclasses.asdict(settings) | {
        'version': _VERSION,
        'num_classes': num_classes,
        'shape': np.shape(images),
    }
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for start in range(0, len(images), 1000):
        digest.update(
            np.ascontiguousarray(pixels.to_float(images[start : start + 1000]))
        )
    digest.update(np.ascontiguousarray(labels, np.int64))
    return digest.hexdigest()[:16]


def train(
    images,
    labels,
    *,
    num_classes: int,
    settings: Settings = DEFAULT_SETTINGS,
    key: str = '',
) -> TrainedClassifier:
    """Trains with Adam on nine tenths of the images and tests on the held-out tenth.

    Arguments are those of `load_or_train`; `key` is that of the result.
    """
    images, labels = np.asarray(images), np.asarray(labels).astype(np.int32)
    chex.assert_rank(images, 4)
    chex.assert_shape(labels, (len(images),))
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
        for start in range(0, steps_per_epoch * batch_size, batch_size):
            batch = order[start : start + batch_size]
            number = epoch * steps_per_epoch + start // batch_size
            params, opt_state = step(
                params, opt_state, number, pixels.to_float(images[batch]), labels[batch]
            )
    trained = TrainedClassifier(network, params, accuracy=float('nan'), key=key)
    predicted = trained(images[held_out])['logits'].argmax(axis=1)
    trained.accuracy = float((predicted == labels[held_out]).mean())
    return trained


def _network(num_classes, settings):
    return conv_classifier.ConvClassifier(
        num_classes, widths=settings.widths, num_features=settings.num_features
    )


def _shift(key, images, max_shift):
    """Shifts each image by a random number of pixels, repeating its edges."""
    padding = ((0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0))
    padded = jnp.pad(images, padding, mode='edge')
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * max_shift + 1)

    def cut(image, corner):
        start = (corner[0], corner[1], 0)
        return jax.lax.dynamic_slice(image, start, images.shape[1:])

    return jax.vmap(cut)(padded, corners)


def _save(path, trained):
    leaves = flax.traverse_util.flatten_dict(trained.params, sep='/')
    arrays = {f'params/{name}': np.asarray(leaf) for name, leaf in leaves.items()}
    npz_cache.write(
        path, trained.key, {'accuracy': np.float64(trained.accuracy)} | arrays
    )


def _load(path, num_classes, settings, key):
    """The cached classifier of `key`, or None."""
    arrays = npz_cache.read(path, key)
    if arrays is None:
        return None
    leaves = {
        name.removeprefix('params/'): leaf
        for name, leaf in arrays.items()
        if name != 'accuracy'
    }
    return TrainedClassifier(
        _network(num_classes, settings),
        jax.device_put(flax.traverse_util.unflatten_dict(leaves, sep='/')),
        accuracy=float(arrays['accuracy']),
        key=key,
    )
