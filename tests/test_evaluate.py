"""Evaluation as in the literature: resumable, shared, recorded, and honest of grids."""

import hashlib
import json
import os
from pathlib import Path
import subprocess
import sys

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
from PIL import Image
import pytest

from ism_jax import config as config_lib
from ism_jax import experiment, trained_network
from ism_jax.data import sources
from ism_jax.evaluation import (
    feature_network,
    frechet_distance,
    inception_score,
    kernel_distance,
    metrics,
    precision_recall,
    protocol,
    real_images,
    reference_statistics,
    sample_chunks,
    sample_files,
)
from ism_jax.method import time_grid
from ism_jax.models import inception, sit
from ism_jax.runtime import sharding
from ism_jax.sampling.sampler import batch_split

ROOT = Path(__file__).parent.parent
ALL_OF_INCEPTION = ('fid', 'sfid', 'is', 'pr', 'kid')


class Tiny(nn.Module):
    """What Inception gives, of few numbers."""

    @nn.compact
    def __call__(self, images):
        x = images.astype(jnp.float32).reshape(len(images), -1) / 255
        out = {'features': nn.Dense(5)(x), 'spatial': nn.Dense(3)(x)}
        return out | {'unbiased_logits': nn.Dense(4)(x)}


def _network(distance='FID', side=8):
    params = Tiny().init(jax.random.key(0), jnp.zeros((1, side, side, 3)))['params']
    return feature_network.FeatureNetwork(
        Tiny(), params, name='tiny', distance=distance, checksum='0',
        preprocessing='x / 255', batch_size=16,
    )  # fmt: skip


def _real(count=60):
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    labels = np.arange(count, dtype=np.int32) % 3
    return sources.ArraySource('real', images, labels, ['a', 'b', 'c'])


def _judges(names=ALL_OF_INCEPTION, distance='FID'):
    network = _network(distance)
    given = reference_statistics.load_or_compute(_real(), network)
    return protocol.Judges(tuple(names), {'inception': network}, {'inception': given})


@pytest.fixture(scope='module')
def run():
    """A network that was never trained, of 3 classes."""
    config = config_lib.default()
    config.model.update(hidden_size=16, depth=1, num_heads=2, patch_size=4)
    config.data.update(image_size=8, channels=1)
    model = experiment.make_model(config, 3)
    params = sit.init_params(model, (8, 8, 1), jax.random.key(0))
    # Also the last layer, which starts at 0: samples would be the noise.
    params = jax.tree.map(
        lambda p: p + 0.05 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )
    params = jax.device_put(params, sharding.replicated(sharding.make_mesh()))
    return trained_network.TrainedNetwork(
        config, model, params, 7, ('a', 'b', 'c'), (8, 8, 1)
    )


def _sampler(run, batch_size=8):
    objective = config_lib.make_objective(run.config, 3)
    return experiment.make_sampler(
        run.config, objective, run.apply, run.image_shape, batch_size=batch_size
    )


def _evaluate(run, out, judges=None, sampler=None, **options):
    options = dict(
        steps=(1, 2), guidance=(1.0,), samples=40, labels='balanced', seed=3,
        show=lambda text: None,
    ) | options  # fmt: skip
    return protocol.evaluate_cells(
        run, sampler or _sampler(run), judges or _judges(), out=out, **options
    )


def _direct(run, steps, w, samples=40):
    """Samples of a cell, 8-bit, made at once."""
    batches = _sampler(run, samples).batches(
        run.params, jax.random.key(3), np.arange(samples) % 3, guidance=w,
        schedule=time_grid.dyadic_schedule(steps, 128),
    )  # fmt: skip
    return real_images_of(np.concatenate([np.asarray(x) for x, _ in batches]))


def real_images_of(images):
    values = (np.clip(images.astype(np.float64), -1, 1) + 1) * 127.5
    return np.rint(values).astype(np.uint8)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(protocol, 'CHUNK', 16)


def test_scores_are_those_of_all_samples_together(run, tmp_path, small_chunks):
    records = _evaluate(run, tmp_path)
    assert [record['steps'] for record in records] == [1, 2]
    network, given = (
        _network(),
        reference_statistics.load_or_compute(_real(), _network()),
    )
    seen = network(_direct(run, 2, 1.0))
    found = records[1]['scores']
    mean, covariance = given.moments['features']
    features = seen['features'].astype(np.float64)
    expected = frechet_distance.gaussian_distance(
        features.mean(0), np.cov(features.T), mean, covariance
    )
    np.testing.assert_allclose(found['FID'], expected, rtol=1e-4)
    spatial = seen['spatial'].astype(np.float64)
    expected = frechet_distance.gaussian_distance(
        spatial.mean(0), np.cov(spatial.T), *given.moments['spatial']
    )
    np.testing.assert_allclose(found['sFID'], expected, rtol=1e-4)
    expected = inception_score.inception_score(seen['unbiased_logits'])
    np.testing.assert_allclose(
        [found['IS'], found['IS deviation']], expected, rtol=1e-3
    )
    expected = precision_recall.precision_recall(seen['features'], given.features)
    assert (found['Precision'], found['Recall']) == expected
    expected = kernel_distance.kernel_distance(
        seen['features'], given.features, subset_size=40
    )
    np.testing.assert_allclose(found['KID'], expected[0], rtol=1e-3)
    assert not list(tmp_path.rglob('chunk-*')), 'chunks of finished cells are removed'


def test_a_record_says_everything_that_repeats_it(run, tmp_path):
    record = _evaluate(run, tmp_path, steps=(4,))[0]
    assert record['schedule'] == [0.25] * 4 and record['guidance'] == 1.0
    assert record['samples'] == 40 and record['labels'] == 'balanced'
    assert record['seed'] == 3 and record['trained_steps'] == 7
    assert record['rounding'] == protocol.ROUNDING and record['average'] == 'infer'
    assert record['objective']['name'] == 'ism'
    judge = record['judges']['inception']
    assert judge['weights'] == '0' and len(judge['reference_key']) == 16
    assert {'commit', 'command', 'jax', 'hardware', 'params_sha256'} <= record.keys()
    assert json.loads((tmp_path / 'records.json').read_text()) == [record]


def test_what_was_made_before_a_kill_is_not_made_again(
    run, tmp_path, small_chunks, monkeypatch
):
    whole = _evaluate(run, tmp_path / 'whole', steps=(2,))[0]

    class Killed(Exception):
        pass

    made, make = [], sample_chunks.Chunks.make

    def dies_at_the_third(self, number, *args, **options):
        if len(made) == 2:
            raise Killed
        made.append(number)
        make(self, number, *args, **options)

    monkeypatch.setattr(sample_chunks.Chunks, 'make', dies_at_the_third)
    with pytest.raises(Killed):
        _evaluate(run, tmp_path / 'killed', steps=(2,))
    monkeypatch.setattr(
        sample_chunks.Chunks,
        'make',
        lambda self, n, *a, **o: made.append(n) or make(self, n, *a, **o),
    )
    again = _evaluate(run, tmp_path / 'killed', steps=(2,))[0]
    assert made == [0, 1, 2] and again['scores'] == whole['scores']
    # A finished cell is read, not made.
    assert _evaluate(run, tmp_path / 'killed', steps=(2,)) == [again]
    assert made == [0, 1, 2]
    # Other settings are another cell.
    _evaluate(run, tmp_path / 'killed', steps=(2,), seed=4)
    assert made == [0, 1, 2, 0, 1, 2]


def test_a_damaged_chunk_is_made_again(run, tmp_path, small_chunks):
    whole = _evaluate(run, tmp_path / 'whole', steps=(2,))[0]
    _evaluate(run, tmp_path / 'torn', steps=(2,), process_index=1, process_count=2)
    torn = next((tmp_path / 'torn').rglob('chunk-00001.npz'))
    content = bytearray(torn.read_bytes())
    content[len(content) // 2] ^= 1
    torn.write_bytes(content)
    with pytest.warns(UserWarning, match='chunk-00001.npz is not whole'):
        again = _evaluate(run, tmp_path / 'torn', steps=(2,))[0]
    assert again['scores'] == whole['scores']


def test_processes_share_a_cell(run, tmp_path, small_chunks):
    alone = _evaluate(run, tmp_path / 'alone', steps=(2,))[0]
    shared, told = tmp_path / 'shared', []
    share = dict(steps=(2,), process_count=2, show=told.append)
    assert _evaluate(run, shared, process_index=0, **share) is None
    assert len(list(shared.rglob('chunk-*'))) == 2  # 0 and 2 of 0, 1, 2.
    assert _evaluate(run, shared, process_index=1, **share) is None
    assert 'wait for other processes' in told[-1]
    record = _evaluate(run, shared, process_index=0, **share)[0]
    assert record['scores'] == alone['scores']


def test_kept_samples_are_those_that_were_scored(run, tmp_path, small_chunks):
    record = _evaluate(run, tmp_path, steps=(2,), keep=('npz', 'png'))[0]
    folder = tmp_path / record['cell']
    with np.load(folder / 'samples_40x8x8x3.npz', allow_pickle=False) as file:
        assert file.files == ['arr_0', 'arr_1']  # ADM's layout.
        images, labels = file['arr_0'], file['arr_1']
    assert images.dtype == np.uint8 and images.shape == (40, 8, 8, 3)
    direct = _direct(run, 2, 1.0)
    assert np.abs(images.astype(int) - direct).max() <= 1  # Another batch size.
    np.testing.assert_array_equal(labels, np.arange(40) % 3)
    pictures = sorted((folder / 'png').iterdir())
    assert len(pictures) == 40
    for index in (0, 17, 39):
        picture = np.asarray(Image.open(pictures[index]).convert('RGB'))
        np.testing.assert_array_equal(picture, images[index])
    for place in (folder / 'samples_40x8x8x3.npz', folder / 'png'):
        again = protocol.evaluate_images(
            real_images.open_images(place), _judges(), show=lambda text: None
        )
        assert again['scores'] == record['scores']
        assert again['images_sha256'] and 'FID' in protocol.table([again])


def test_samples_wanted_later_are_made_later(run, tmp_path, small_chunks):
    without = _evaluate(run, tmp_path, steps=(2,))[0]
    assert without['kept'] == {}
    later = _evaluate(run, tmp_path, steps=(2,), keep=('npz',))[0]
    assert later['scores'] == without['scores']
    assert (tmp_path / later['cell'] / later['kept']['npz']).exists()


def test_a_grid_over_guidance_says_so(run, tmp_path):
    alone = _evaluate(run, tmp_path, steps=(1,), guidance=(1.0,))
    assert 'grid' not in protocol.table(alone)
    # Also if its cells are asked for one after another.
    later = _evaluate(run, tmp_path, steps=(1, 2), guidance=(2.0,))
    assert [record['guidance_grid'] for record in later] == [[1.0, 2.0], [2.0]]
    shown = protocol.table(later)
    assert '| 1 | 2 (grid of 2) |' in shown and '| 2 | 2 |' in shown
    assert 'Steps 1: a grid over guidance, w = 1, 2.' in shown
    # Chosen with one noise, scored with another.
    other = _evaluate(run, tmp_path, steps=(1,), guidance=(2.0,), seed=4)
    assert 'grid' not in protocol.table(other)


def test_what_cannot_be_measured_is_refused_before_sampling(run, tmp_path):
    judges = _judges()
    bare = reference_statistics.Reference(
        {'features': judges.references['inception'].moments['features']}, None, None,
        'key', 'statistics of a.npz',
    )  # fmt: skip
    bare = protocol.Judges(('sfid',), judges.networks, {'inception': bare})
    cases = [
        (dict(samples=5), "is, which needs at least 10"),
        (dict(judges=bare), "sfid needs statistics of 'spatial'"),
        (dict(judges=protocol.Judges(('pr',), bare.networks, bare.references)),
         'pr needs real images, but statistics of a.npz are known alone'),
        (dict(labels='sorted'), "labels 'sorted' must be one of balanced, uniform"),
        (dict(keep=('jpg',)), "keep = 'jpg' must be one of npz, png"),
        (dict(process_index=2, process_count=2), 'process_index = 2 must be in 0 .. 1'),
    ]  # fmt: skip
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            _evaluate(run, tmp_path, **options)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="'fdd' is unknown; choose among fid, sfid"):
        metrics.networks(['fid', 'fdd'])


def test_samples_with_nan_have_no_score(run, tmp_path):
    broken = run._replace(params=jax.tree.map(lambda p: p * np.nan, run.params))
    with pytest.raises(ValueError, match='steps 1, w 1: images hold .* NaN'):
        _evaluate(broken, tmp_path)


def test_only_the_published_network_scores_fid():
    judges = _judges(distance='FD-mine')
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (20, 8, 8, 3)).astype(np.uint8)
    found = judges.scores(judges.look(images))
    assert list(found) == [
        'FD-mine', 'sFD-mine', 'IS (mine)', 'IS (mine) deviation', 'Precision (mine)',
        'Recall (mine)', 'KID (mine)', 'KID (mine) deviation',
    ]  # fmt: skip


def test_labels_of_samples():
    balanced = protocol.sample_labels('balanced', 50_000, 1000, 0)
    assert (np.bincount(balanced) == 50).all()
    uniform = protocol.sample_labels('uniform', 50_000, 1000, 0)
    counts = np.bincount(uniform, minlength=1000)
    assert 40 < counts.var() < 60 and counts.sum() == 50_000  # Poisson of 50.
    assert (uniform != protocol.sample_labels('uniform', 50_000, 1000, 1)).any()


@pytest.mark.parametrize('count', [6, 24])
def test_samples_are_divided_over_the_devices(run, count):
    sampler = _sampler(run, batch_size=12)  # No multiple of 8.
    options = dict(guidance=1.0, schedule=(0.5, 0.5))
    key, labels = jax.random.key(0), np.arange(count) % 3
    many = list(sampler.batches(run.params, key, labels, **options))
    one = jax.device_put(run.params, jax.devices()[0])
    single = list(_sampler(run, 12).batches(one, key, labels, **options))
    for (a, label_a), (b, label_b) in zip(many, single, strict=True):
        np.testing.assert_array_equal(label_a, label_b)
        np.testing.assert_allclose(a, b, atol=1e-5)
    split, size = batch_split(run.params, 12)
    assert isinstance(split, NamedSharding) and size == 16
    assert not split.is_fully_replicated and len(split.device_set) == 8
    assert batch_split(one, 12) == (None, 12)
    # A part of the samples, by itself.
    tail = list(sampler.batches(run.params, key, labels[3:], first=3, **options))
    np.testing.assert_allclose(
        np.concatenate([x for x, _ in tail]),
        np.concatenate([x for x, _ in many])[3:], atol=1e-5,
    )  # fmt: skip


def test_weights_of_inception_are_fetched_once_and_checked(tmp_path, monkeypatch):
    published = tmp_path / 'published.pth'
    published.write_bytes(b'weights')
    url = published.as_uri()
    with pytest.raises(ValueError, match='is not the published file: its SHA-256'):
        feature_network.fetch_inception(tmp_path / 'cache', url)
    assert not (tmp_path / 'cache').exists()
    digest = hashlib.sha256(b'weights').hexdigest()
    monkeypatch.setattr(inception, 'PUBLISHED_SHA256', digest)
    path = feature_network.fetch_inception(tmp_path / 'cache', url)
    assert path.name == 'pt_inception-2015-12-05-6726825d.pth'
    published.unlink()
    assert feature_network.fetch_inception(tmp_path / 'cache', url) == path
    with pytest.raises(ValueError, match='cannot be fetched .* put the file at'):
        feature_network.fetch_inception(tmp_path / 'other', url)


def test_wide_files_are_written_part_by_part(tmp_path):
    random = np.random.default_rng(0)
    parts = [
        (random.integers(0, 256, (n, 4, 4, 3)).astype(np.uint8), np.full(n, n))
        for n in (3, 1, 2)
    ]
    name = sample_files.write_npz(tmp_path, lambda: iter(parts))
    assert name == 'samples_6x4x4x3.npz' and len(list(tmp_path.iterdir())) == 1
    with np.load(tmp_path / name, allow_pickle=False) as file:
        np.testing.assert_array_equal(
            file['arr_0'], np.concatenate([images for images, _ in parts])
        )
        np.testing.assert_array_equal(file['arr_1'], [3, 3, 3, 1, 2, 2])


def _photographs(folder, count, seed):
    """Crops of a photograph, with a cast of one colour."""
    from sklearn.datasets import load_sample_image

    photograph = load_sample_image('flower.jpg').astype(float)
    random = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        top, left = (random.integers(0, n - 64) for n in photograph.shape[:2])
        crop = photograph[top : top + 64, left : left + 64]
        crop = crop * random.uniform(0.4, 1, 3)[None, None]
        Image.fromarray(crop.astype(np.uint8)).save(folder / f'{number:03}.png')
    return folder


def test_command_line_agrees_with_torch_fidelity(
    tmp_path, inception_file, torch_fidelity
):
    """Both programs from the same pictures and weights to numbers.

    Theirs gets the pictures decoded: its own reading is torchvision's, see the fixture.
    """
    import torch

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, folder):
            self.paths = sorted(folder.iterdir())

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, index):
            picture = np.asarray(Image.open(self.paths[index]))
            return torch.from_numpy(picture.transpose(2, 0, 1).copy())

    samples = _photographs(tmp_path / 'samples', 20, seed=0)
    real = _photographs(tmp_path / 'real', 24, seed=1)
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(samples), input2=Pictures(real),
        cuda=False, verbose=False, cache=False,
        isc=True, fid=True, kid=True, prc=True, kid_subset_size=20,
        feature_extractor='inception-v3-compat', num_workers=0,
        feature_extractor_weights_path=str(inception_file), save_cpu_ram=True,
    )  # fmt: skip
    shown = _command(
        f'--images={samples}', f'--reference={real}', '--metrics=fid,is,kid,pr',
        f'--inception={inception_file}', '--inception_name=random',
        f'--cache_dir={tmp_path / "cache"}', f'--out={tmp_path / "out"}',
    )  # fmt: skip
    assert '| FD-random | IS (random) |' in shown
    record = json.loads((tmp_path / 'out' / 'images.json').read_text())[0]
    pairs = {
        'FD-random': 'frechet_inception_distance',
        'IS (random)': 'inception_score_mean',
        'IS (random) deviation': 'inception_score_std',
        'KID (random)': 'kernel_inception_distance_mean',
        'Precision (random)': 'precision',
        'Recall (random)': 'recall',
    }
    for ours, name in pairs.items():
        print(
            f'{ours}: {record["scores"][ours]:.8g}, torch-fidelity {theirs[name]:.8g}'
        )
        np.testing.assert_allclose(record['scores'][ours], theirs[name], rtol=1e-4)
    assert theirs['frechet_inception_distance'] > 1


def _command(*flags):
    done = subprocess.run(
        [sys.executable, '-m', 'ism_jax.evaluate', *flags], capture_output=True,
        text=True, cwd=ROOT, env=os.environ | {'XLA_FLAGS': ''}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    'flags, message',
    [
        ([], 'give --workdir, a run, or --images'),
        (['--images=a.npz'], 'no metrics: choose among fid, sfid'),
        (['--images=a.npz', '--metrics=fid'], 'a.npz is neither a folder'),
    ],
)
def test_bad_flags_are_refused(flags, message, tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', 'ism_jax.evaluate', *flags], capture_output=True,
        text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and message in done.stderr, done.stderr
