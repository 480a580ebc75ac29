"""ImageNet's way with tiny parts: prepare, train, sample, as a user would type it.

Two photographs that come with scikit-learn, cropped into two classes, and an
autoencoder of the real architecture with random weights.
"""

import os
from pathlib import Path
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from ism_jax.models import vae

ROOT = Path(__file__).parent.parent
TINY = vae.Config(
    block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4
)


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    """Folders 'images' and 'autoencoder'."""
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp('rehearsal')
    random = np.random.default_rng(0)
    samples = load_sample_images()
    for name, photograph in zip(samples.filenames, samples.images):
        place = folder / 'images' / Path(name).stem
        place.mkdir(parents=True)
        for number in range(40):
            top, left = random.integers(0, np.array(photograph.shape[:2]) - 150)
            crop = Image.fromarray(photograph[top : top + 140, left : left + 150])
            crop.save(place / f'{number:02d}.jpg')
    autoencoder = vae.Autoencoder(TINY)
    params = autoencoder.init(jax.random.key(0))
    vae.save(folder / 'autoencoder', autoencoder, params)
    return folder


def _run(module, *arguments):
    # One device, as on a user's machine.
    environment = os.environ | {'XLA_FLAGS': ''}
    done = subprocess.run(
        [sys.executable, '-m', f'ism_jax.{module}', *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_from_photographs_to_samples(parts):
    prepare = (
        'prepare_data', f'--source=folder:{parts / "images"}', '--image_size=64',
        f'--autoencoder={parts / "autoencoder"}', f'--out={parts / "latents"}',
        '--shards=4', '--batch_size=16',
    )  # fmt: skip
    assert '80 latents (8, 8, 4)' in _run(*prepare)
    assert 'all is as it was written' in _run(
        'prepare_data', f'--out={parts / "latents"}', '--verify'
    )
    train = (
        'train', '--config=configs/imagenet256_ism_xl2.py:runlocal',
        f'--workdir={parts / "run"}',
        f'--config.data.source=latents:{parts / "latents"}',
        f'--config.data.autoencoder={parts / "autoencoder"}',
        '--config.data.image_size=8', '--config.data.channels=4',
        '--config.data.classes_per_pool=2', '--config.model.patch_size=2',
        '--config.wavelet.levels=3', '--config.scores.enabled=False',
        '--config.train.steps=4', '--config.checkpoint.every=4',
        '--config.log.grid_every=4', '--config.log.grid_columns=2',
    )  # fmt: skip
    shown = _run(*train)
    assert 'LatentSource(80 latents (8, 8, 4)' in shown
    grid = np.asarray(Image.open(next((parts / 'run' / 'grids').glob('*1_steps*'))))
    assert grid.ndim == 3 and grid.std() > 1  # Decoded: colour.
    _run(
        'sample', f'--workdir={parts / "run"}', '--steps=1,2', '--guidance=0,1',
        '--labels=0-1', f'--out={parts / "samples"}',
    )  # fmt: skip
    images = np.load(parts / 'samples' / 'samples.npz')['images']
    assert images.shape == (2, 2, 2, 64, 64, 3) and images.std() > 1
