"""The public Python API."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import ism_jax
from ism_jax import config as config_lib
from ism_jax import convert, experiment, generator, trained_network
from ism_jax.models import conditions
from ism_jax.runtime import sharding


@pytest.fixture(scope='module')
def model(small_run):
    return ism_jax.load(small_run)


def test_labels_give_images(model):
    images = model.sample([0, 1, 9], steps=2, guidance=1.0, seed=3)
    assert images.shape == (3, *model.image_shape) == (3, 32, 32, 1)
    assert images.dtype == np.uint8 and images.std() > 1
    assert isinstance(images, np.ndarray)
    assert '10 classes' in repr(model) and 'trained 6 steps' in repr(model)
    # Image i depends on its index, not on the batch.
    alone = model.sample(0, steps=2, guidance=1.0, seed=3)
    assert alone.shape == (1, 32, 32, 1)
    assert np.abs(alone[0].astype(int) - images[0]).max() <= 1
    again = model.sample([0, 1, 9], steps=2, guidance=1.0, seed=3)
    np.testing.assert_array_equal(again, images)


def test_every_argument_changes_the_images(model):
    usual = dict(labels=[3], steps=2, guidance=1.0, seed=0)
    images = [
        model.sample(**usual | change)
        for change in (
            {},
            {'labels': [4]},
            {'labels': [None]},
            {'steps': 8},
            {'guidance': 3.0},
            {'seed': 1},
            {'schedule': (0.5, 0.25, 0.25)},
        )
    ]
    assert len({image.tobytes() for image in images}) == len(images)
    # The documented defaults.
    np.testing.assert_array_equal(
        model.sample([3]), model.sample([3], steps=4, guidance=1.5, seed=0)
    )
    np.testing.assert_array_equal(
        model.sample([3], schedule=(0.5, 0.5), guidance=1.0), images[0]
    )


def test_a_path_ends_at_the_sample(model):
    path = model.path('3', steps=4, guidance=1.0, seed=2)
    assert path.shape == (5, 32, 32, 1)
    sample = model.sample('3', steps=4, guidance=1.0, seed=2)[0].astype(int)
    assert np.abs(path[-1] - sample).max() <= 1
    assert path[0].std() > 60  # Noise: of standard deviation 1, clipped.
    np.testing.assert_array_equal(path[0], model.path(5, steps=1, seed=2)[0])


def test_between_two_seeds(model):
    images = model.between(3, (0, 1), count=5, steps=2, guidance=1.0)
    assert images.shape == (5, 32, 32, 1)
    for end, seed in ((0, 0), (-1, 1)):
        sample = model.sample(3, steps=2, guidance=1.0, seed=seed)[0].astype(int)
        assert np.abs(images[end] - sample).max() <= 1
    same = model.between(3, (4, 4), count=2, steps=1)
    np.testing.assert_array_equal(same[0], same[1])
    with pytest.raises(ValueError, match='count = 1 must be at least 2'):
        model.between(3, (0, 1), count=1)


def test_slerp_interpolates_angles_and_norms():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 1, 8, 8, 3))
    fractions = np.linspace(0, 1, 9)
    points = generator.slerp(a, b, fractions)
    lengths = np.linalg.norm(points.reshape(9, -1), axis=1)
    ends = np.linalg.norm(a), np.linalg.norm(b)
    np.testing.assert_allclose(lengths, (1 - fractions) * ends[0] + fractions * ends[1])
    # Equal angles.
    unit = points.reshape(9, -1) / lengths[:, None]
    angles = np.arccos(np.sum(unit[1:] * unit[:-1], axis=1))
    np.testing.assert_allclose(angles, angles[0], rtol=1e-6)
    np.testing.assert_allclose(generator.slerp(a, a, fractions), np.repeat(a, 9, 0))


def _imm_generator(sampler: str) -> generator.Generator:
    """A small IMM network with random parameters."""
    config = config_lib.with_argument(config_lib.default(), 'imm,runlocal')
    config.objective.sampler = sampler
    model = experiment.make_model(config, num_classes=10)
    params = conditions.init_params(model, (32, 32, 1), jax.random.key(0))
    # Also the last layer: at its initial 0 the samples would be the noise.
    params = jax.tree.map(
        lambda a: a + 0.02 * jax.random.normal(jax.random.key(1), a.shape), params
    )
    params = sharding.replicate(params, sharding.local_mesh())
    names = tuple(map(str, range(10)))
    return generator.Generator(
        trained_network.TrainedNetwork(config, model, params, 0, names, (32, 32, 1))
    )


def test_imm_has_paths_with_pushforward_sampling():
    model = _imm_generator('pushforward')
    assert model.has_paths
    path = model.path(3, steps=2, guidance=1.0, seed=5)
    assert path.shape == (3, 32, 32, 1) and len({x.tobytes() for x in path}) == 3
    sample = model.sample(3, steps=2, guidance=1.0, seed=5)[0].astype(int)
    assert np.abs(path[-1] - sample).max() <= 1


def test_imm_has_no_paths_with_restart_sampling():
    model = _imm_generator('restart')
    assert not model.has_paths
    assert model.sample([3, 4], steps=2).shape == (2, 32, 32, 1)
    reason = "this method's sampler adds noise between steps"
    with pytest.raises(ValueError, match=reason):
        model.path(0)
    with pytest.raises(ValueError, match=reason):
        model.between(0, (0, 1))


def test_labels_are_indices_names_or_none(model):
    named = model.sample(['7', None, np.int64(2)], steps=1)
    np.testing.assert_array_equal(named, model.sample([7, None, 2], steps=1))
    np.testing.assert_array_equal(model.sample('7', steps=1), model.sample(7, steps=1))


def test_the_command_draws_the_same_samples(model, small_run, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'ism_jax.sample',
            f'--workdir={small_run}',
            '--steps=2',
            '--guidance=1',
            '--labels=0-4',
            '--seed=5',
            f'--out={tmp_path}',
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / 'samples.npz') as samples:
        expected = samples['images'][0, 0].astype(int)
    found = model.sample(range(5), steps=2, guidance=1, seed=5)
    assert np.abs(found - expected).max() <= 1  # Batch sizes differ in rounding.


def test_exports_hub_networks_and_earlier_checkpoints_load(
    model, small_run, tmp_path, monkeypatch
):
    convert.write(tmp_path / 'exported', convert.export(small_run))
    expected = model.sample([1, 2], steps=1)
    exported = ism_jax.load(tmp_path / 'exported')
    np.testing.assert_array_equal(exported.sample([1, 2], steps=1), expected)
    assert ism_jax.load(small_run, step=3).trained_steps == 3

    hub = pytest.importorskip('huggingface_hub')
    requests = []

    def download(repository, allow_patterns):
        requests.append((repository, *allow_patterns))
        return str(tmp_path / 'exported')

    monkeypatch.setattr(hub, 'snapshot_download', download)
    fetched = ism_jax.load('somebody/digits')
    np.testing.assert_array_equal(fetched.sample([1, 2], steps=1), expected)
    assert requests == [('somebody/digits', 'model.safetensors', 'config.json')]


def test_many_labels_are_sampled_in_batches(model, monkeypatch):
    monkeypatch.setattr(generator, 'MAX_BATCH', 4)
    labels = np.arange(10) % 10
    images = model.sample(labels, steps=1)
    monkeypatch.undo()
    whole = model.sample(labels, steps=1).astype(int)
    assert np.abs(images - whole).max() <= 1


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(labels=10), r'label 10 must be in 0 .. 9'),
        (dict(labels=[0, -1]), r'label -1 must be in 0 .. 9'),
        (dict(labels=1.5), 'label'),
        (dict(labels=[True]), 'label True must be'),
        (dict(labels='twelve'), "label 'twelve' must be in 0 .. 9, a name"),
        (dict(labels='3 '), "did you mean '3'"),
        (dict(labels=[]), 'is empty'),
        (dict(labels=0, steps=0), r'1 .. 128'),
        (dict(labels=0, steps=129), r'1 .. 128'),
        (dict(labels=0, guidance=4.0), r'guidance = 4.0 must lie in \[0, 3.5\]'),
        (dict(labels=0, guidance=float('nan')), 'guidance = nan must lie in'),
        (dict(labels=0, schedule=(0.3, 0.7)), '0.3'),
    ],
)
def test_bad_arguments_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.sample(**options)


def test_missing_networks_are_refused(tmp_path):
    with pytest.raises(ValueError, match='not a folder or a hub id'):
        ism_jax.load(tmp_path / 'nowhere')
    with pytest.raises(ValueError, match='holds no run'):
        ism_jax.load(tmp_path)
    with pytest.raises(ValueError, match='path https://host/run is a URL'):
        ism_jax.load('https://host/run')
    with pytest.raises(AttributeError, match='no attribute .lood'):
        ism_jax.lood  # noqa: B018


def test_sampling_imports_no_heavy_packages(small_run):
    """Packages that only training, data sets or figures need."""
    code = (
        'import sys, ism_jax; ism_jax.load(sys.argv[1]).sample([0], steps=1); '
        'heavy = {"tensorflow", "tensorflow_datasets", "ott", "matplotlib", "clu", '
        '"torch", "transformers"}; print(sorted(heavy & sys.modules.keys()))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, str(small_run)], capture_output=True, text=True
    )
    assert done.stdout.strip() == '[]', done.stderr
