"""A feature network of few numbers, in place of Inception."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.data import array_source
from ism_jax.evaluation import feature_network, metrics, reference_statistics


class Tiny(nn.Module):
    """The outputs of Inception, with few features."""

    @nn.compact
    def __call__(self, images):
        x = images.astype(jnp.float32).reshape(len(images), -1) / 255
        out = {'features': nn.Dense(5)(x), 'spatial': nn.Dense(3)(x)}
        return out | {'unbiased_logits': nn.Dense(4)(x)}


def _tiny_network(distance='FID', checksum='0', scale=1.0):
    params = Tiny().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))['params']
    return feature_network.FeatureNetwork(
        Tiny(), jax.tree.map(lambda p: scale * p, params), name='tiny',
        distance=distance, checksum=checksum, preprocessing='x / 255', batch_size=16,
    )  # fmt: skip


@pytest.fixture
def tiny_network():
    """Makes a feature network of images of 8 x 8 pixels."""
    return _tiny_network


@pytest.fixture(scope='session')
def real_source():
    """60 real images of 3 classes."""
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (60, 8, 8, 3)).astype(np.uint8)
    labels = np.arange(60, dtype=np.int32) % 3
    return array_source.ArraySource('real', images, labels, ['a', 'b', 'c'])


@pytest.fixture
def tiny_metrics(real_source):
    """Makes a metric set of `tiny_network` and `real_source`."""

    def make(names=('fid', 'sfid', 'is', 'pr', 'kid'), distance='FID'):
        network = _tiny_network(distance)
        reference = reference_statistics.load_or_compute(real_source, network)
        return metrics.MetricSet(
            tuple(names), {'inception': network}, {'inception': reference}
        )

    return make
