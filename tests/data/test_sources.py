"""Names of the sources, and what opening them imports."""

import importlib.util
import os
from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest
from sharded_files import write_parquet, write_tar
from tfds_files import png, write_small_mnist

from ism_jax.data import sources


@pytest.mark.parametrize(
    'name,options,message',
    [
        ('minst', {}, "'minst' is not .* source .did you mean 'mnist'.*'folder:PATH'"),
        ('Fashion-MNIST', {}, "did you mean 'fashion_mnist'"),
        ('foldr:/x', {}, "did you mean 'folder:PATH'"),
        ('xyz', {}, r"'xyz' is not a data source; choose 'mnist'.* or 'latents:PATH'"),
        ('', {}, r"'' is not a data source; choose 'mnist'"),
        ('mnist:x', {}, "'mnist:x' is not a data source .did you mean 'mnist'"),
        ('folder:', {}, "'folder:' is not .* .did you mean 'folder:PATH'"),
        ('tfds', {}, "'tfds' is not .* .did you mean 'tfds:NAME'"),
        ('mnist', dict(channels=3), 'mnist are grey: .* 1 channel, not channels = 3'),
        ('mnist', dict(split='test'), "'mnist' has no split 'test', only 'train'"),
        ('folder:/x', dict(split='test'), "'folder:/x' has no split 'test'"),
        ('fashion_mnist', dict(split='dev'), "'dev', only 'train' and 'test'"),
    ],
)
def test_bad_names_splits_and_channels_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        sources.make_source(name, **dict(image_size=32, channels=1) | options)


READ_ALL = """
import sys
from ism_jax.data import pool_loader, sources
for name in ('mnist', 'tfds:mnist', *sys.argv[2:]):
    source = sources.make_source(name, image_size=32, channels=1, data_dir=sys.argv[1])
    loader = pool_loader.PoolLoader(source, batches=2, batch_size=4, seed=0, flip=True)
    for pool, _ in zip(loader, range(3)):
        assert pool.images.shape == (2, 4, 32, 32, 1)
    loader.close()
    print(name, [m for m in sys.modules if m.split('.')[0] == 'tensorflow'])
"""


def test_reading_never_imports_tensorflow(animals, tmp_path):
    write_small_mnist(tmp_path / 'tfds')
    images = [(png(np.zeros((8, 8), np.uint8)).read(), 0)] * 4
    names = [f'folder:{animals}', write_tar(tmp_path / 'tar', images, (4,))]
    if importlib.util.find_spec('datasets'):
        names.append(write_parquet(tmp_path / 'parquet', images, ('a',), (4,)))
    result = subprocess.run(
        [sys.executable, '-c', READ_ALL, str(tmp_path / 'tfds'), *names],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {'PYTHONPATH': str(Path(sources.__file__).parents[2])},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert len(lines) == 2 + len(names), lines
    assert all(line.endswith(' []') for line in lines), lines
