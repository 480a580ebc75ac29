"""Loaders, image folders and prepared latents for the tests of data."""

import functools

import numpy as np
from PIL import Image
import pytest

from ism_jax.data import latent_preparation, pool_loader, sources


@pytest.fixture
def make_loader():
    loaders = []

    def make(source, **options):
        options = dict(batches=2, batch_size=8, seed=3) | options
        loaders.append(pool_loader.PoolLoader(source, **options))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


@pytest.fixture
def animals(tmp_path):
    """A folder of 6 images in 2 classes."""
    rng = np.random.default_rng(0)
    path = tmp_path / 'animals'
    for name in ('dogs', 'cats'):
        (path / name).mkdir(parents=True)
        for i in range(3):
            array = rng.integers(0, 255, (20 + i, 30, 3), np.uint8)
            Image.fromarray(array).save(path / name / f'{i}.png')
    return path


@pytest.fixture
def images(tmp_path):
    """A folder of 44 images of 8x8 in 3 classes."""
    random = np.random.default_rng(0)
    for index in range(44):
        path = tmp_path / 'images' / f'class{index % 3}' / f'{index:02d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return tmp_path / 'images'


def _encode(params, pixels):
    blocks = pixels.reshape(len(pixels), 2, 4, 2, 4, 3).mean((2, 4))
    return blocks + params, blocks[:, :, :1] * np.ones((1, 1, 2, 1)) - 8


@pytest.fixture(scope='session')
def encode():
    """Block means, and a log-variance that differs for the mirror image."""
    return _encode


@pytest.fixture(scope='session')
def encoder():
    return latent_preparation.make_encoder(_encode, np.float32(0.25), batch_size=8)


@pytest.fixture
def open_images(images):
    return functools.partial(
        sources.make_source, f'folder:{images}', image_size=8, channels=3
    )


@pytest.fixture
def prepare(open_images):
    """Prepares latents of `images` with shape (2, 2, 3)."""

    def run(out, encoder, **options):
        about = {
            'scaling_factor': 0.5,
            'latent_shape': [2, 2, 3],
            'autoencoder': 'test',
        }
        options = dict(shards=5, batch_size=8, log=lambda line: None) | options
        return latent_preparation.prepare(
            open_images(), encoder, out, about=about, **options
        )

    return run


@pytest.fixture
def open_latents(tmp_path):
    """Opens the latents in `tmp_path / 'out'`."""
    return functools.partial(
        sources.make_source, f'latents:{tmp_path / "out"}', image_size=2, channels=3
    )
