"""The command that prepares latents, with a tiny autoencoder."""

from pathlib import Path
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest
import tiny_autoencoder

from ism_jax import prepare_data
from ism_jax.data import sources
from ism_jax.data.source import CorruptImageError
from ism_jax.models import vae

ROOT = Path(__file__).parent.parent


@pytest.fixture
def images(tmp_path):
    random = np.random.default_rng(0)
    for index in range(12):
        path = tmp_path / 'images' / f'class{index % 2}' / f'{index:02d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return tmp_path / 'images'


@pytest.fixture(scope='module')
def autoencoder(tmp_path_factory):
    config = vae.Config(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4
    )
    network = vae.Autoencoder(config)
    path = tmp_path_factory.mktemp('autoencoder')
    tiny_autoencoder.save(path, network, network.init(jax.random.key(0)))
    return path


def _prepare(images, autoencoder, out, **options):
    options = dict(image_size=16, batch_size=8, shards=2) | options
    return prepare_data.prepare(
        f'folder:{images}', str(autoencoder), out, log=lambda line: None, **options
    )


def test_prepared_latents_are_read_by_training(images, autoencoder, tmp_path):
    manifest = _prepare(images, autoencoder, tmp_path / 'out')
    assert manifest['count'] == 12 and manifest['latent_shape'] == [8, 8, 4]
    assert manifest['autoencoder'] == str(autoencoder)
    source = sources.make_source(
        f'latents:{tmp_path / "out"}', image_size=8, channels=4
    )
    assert len(source) == 12 and source.class_names == ('class0', 'class1')
    lines = []
    assert prepare_data.verify(tmp_path / 'out', log=lines.append)
    assert lines[-1] == 'all files are intact'
    (tmp_path / 'out' / 'labels.npy').unlink()
    assert not prepare_data.verify(tmp_path / 'out', log=lines.append)
    assert 'labels.npy' in lines[-2] and 'without --verify' in lines[-1]


def test_unreadable_image_is_named_with_the_flag_that_skips_it(
    images, autoencoder, tmp_path
):
    broken = images / 'class0' / '00.png'
    broken.write_bytes(b'not an image')
    with pytest.raises(CorruptImageError) as caught:
        _prepare(images, autoencoder, tmp_path / 'error')
    message = str(caught.value)
    assert message.startswith(f'{broken} cannot be read')
    assert '--on_corrupt=skip' in message and 'data.on_corrupt' not in message
    manifest = _prepare(images, autoencoder, tmp_path / 'skip', on_corrupt='skip')
    ((file, reason),) = [entry.values() for entry in manifest['skipped']]
    assert file == str(broken) and 'on_corrupt' not in reason


def test_flags_are_refused_in_one_line(tmp_path):
    for flags, message in (
        ((), 'error: give --source and --autoencoder'),
        (
            ('--process_index=2', '--process_count=2'),
            'error: --process_index 2 and --process_count 2 must be given together',
        ),
    ):
        done = subprocess.run(
            [sys.executable, '-m', 'ism_jax.prepare_data', f'--out={tmp_path}', *flags],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith(message)
