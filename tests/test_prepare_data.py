"""Preparation of latents, their files, and training's reading of them."""

import itertools
import json

import numpy as np
from PIL import Image
import pytest

from ism_jax import prepare_data
from ism_jax.data import latents, pool_loader, sources

SHAPE = (2, 2, 3)
ABOUT = {'scaling_factor': 0.5, 'latent_shape': list(SHAPE), 'autoencoder': 'test'}


def encode(params, images):
    """Block means, and a log-variance that tells the mirror image apart."""
    blocks = images.reshape(len(images), 2, 4, 2, 4, 3).mean((2, 4))
    return blocks + params, blocks[:, :, :1] * np.ones((1, 1, 2, 1)) - 8


class Flaky:
    """An encoder that fails at a call."""

    def __init__(self, encoder, fail_at):
        self.calls, self._encoder, self._fail_at = 0, encoder, fail_at

    def __call__(self, pixels):
        self.calls += 1
        if self.calls == self._fail_at:
            raise KeyboardInterrupt
        return self._encoder(pixels)


@pytest.fixture(scope='module')
def encoder():
    return prepare_data.make_encoder(encode, np.float32(0.25), batch_size=8)


@pytest.fixture
def folder(tmp_path):
    """44 images in 3 classes."""
    random = np.random.default_rng(0)
    for index in range(44):
        path = tmp_path / 'images' / f'class{index % 3}' / f'{index:02d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return tmp_path / 'images'


def open_folder(folder):
    return sources.make_source(f'folder:{folder}', image_size=8, channels=3)


def run(folder, out, encoder, **options):
    options = dict(shards=5, batch_size=8, show=lambda line: None) | options
    return prepare_data.prepare(
        open_folder(folder), encoder, out, about=ABOUT, **options
    )


@pytest.mark.parametrize('dtype', latents.DTYPES)
def test_posteriors_of_both_flips_are_what_the_encoder_gives(
    folder, tmp_path, encoder, dtype
):
    manifest = run(folder, tmp_path / 'out', encoder, dtype=dtype)
    source = sources.make_source(
        f'latents:{tmp_path / "out"}', image_size=2, channels=3
    )
    images = open_folder(folder)
    assert len(source) == len(images) == manifest['count'] == 44
    assert manifest['count_per_class'] == [15, 15, 14]
    tolerance = {'float16': 1e-3, 'float32': 1e-6}[dtype]
    for index in range(44):
        record, image = source[index], images[index]
        assert record.label == image['label'] == source.labels[index]
        for flip in (0, 1):
            pixels = image['image'].astype(np.float32) / 127.5 - 1
            pixels = pixels[:, ::-1] if flip else pixels
            mean, log_variance = encode(np.float32(0.25), pixels[None])
            np.testing.assert_allclose(record.mean[flip], mean[0], atol=tolerance)
            np.testing.assert_allclose(
                record.log_variance[flip], log_variance[0], rtol=tolerance
            )
        assert not np.allclose(record.mean[0], record.mean[1], atol=0.01)


def test_statistics_of_channels_are_those_of_what_is_drawn(folder, tmp_path, encoder):
    out = tmp_path / 'out'
    manifest = run(folder, out, encoder, dtype='float32')
    mean, std = manifest['channel_mean'], manifest['channel_std']
    options = dict(image_size=2, channels=3)
    plain = sources.make_source(f'latents:{out}', **options)
    normalised = sources.make_source(
        f'latents:{out}', latent_mean=mean, latent_std=std, **options
    )

    def draw(source):
        random = np.random.default_rng(0)
        return np.stack([
            source.draw(source[i % 44], flip=i % 88 > 43, random=random)
            for i in range(44 * 20)
        ])  # fmt: skip

    raw, latents_ = draw(plain) / 0.5, draw(normalised)
    np.testing.assert_allclose(latents_, (raw - mean) / std, atol=1e-4)
    np.testing.assert_allclose(latents_.mean((0, 1, 2)), 0, atol=0.02)
    np.testing.assert_allclose(latents_.std((0, 1, 2)), 1, rtol=0.01)
    assert np.abs(raw.std((0, 1, 2)) - 1).min() > 0.1


def test_goes_on_where_it_was_stopped(folder, tmp_path, encoder):
    whole = run(folder, tmp_path / 'whole', encoder)
    flaky = Flaky(encoder, fail_at=4)  # In the third shard.
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / 'out', flaky)
    with pytest.raises(ValueError, match='no finished latents'):
        latents.read_manifest(tmp_path / 'out')
    again = Flaky(encoder, fail_at=-1)
    assert run(folder, tmp_path / 'out', again) == whole
    assert again.calls == 3 * 2  # The first two shards are not made again.
    again.calls = 0
    assert run(folder, tmp_path / 'out', again) == whole
    assert not again.calls
    assert not list((tmp_path / 'out').glob('.*'))


def test_processes_share_the_shards(folder, tmp_path, encoder):
    whole = run(folder, tmp_path / 'whole', encoder)
    lines = []
    first, second = (
        run(
            folder, tmp_path / 'out', encoder, process_index=i, process_count=2,
            show=lines.append,
        )
        for i in (1, 0)
    )  # fmt: skip
    assert first is None
    assert any('3 of 5 shards are left' in line for line in lines)
    assert second == whole


def test_other_settings_are_refused(folder, tmp_path, encoder):
    run(folder, tmp_path / 'out', encoder)
    with pytest.raises(ValueError, match="dtype: 'float16' -> 'float32'"):
        run(folder, tmp_path / 'out', encoder, dtype='float32')
    (folder / 'class0' / '00.png').unlink()
    with pytest.raises(ValueError, match='images: 44 -> 43'):
        run(folder, tmp_path / 'out', encoder)


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(shards=45), '--shards 45 must be in 1 .. 44'),
        (dict(shards=0), '--shards 0'),
        (dict(dtype='bfloat16'), "--dtype 'bfloat16' must be one of"),
        (dict(on_corrupt='ignore'), "--on_corrupt 'ignore'"),
        (dict(process_index=2, process_count=2), '--process_index 2'),
    ],
)
def test_options_that_cannot_work_are_named(
    folder, tmp_path, encoder, options, message
):
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / 'out', encoder, **options)
    assert not (tmp_path / 'out').exists()


def test_devices_must_divide_the_batch():
    with pytest.raises(ValueError, match='--batch_size 12 must be a multiple of the 8'):
        prepare_data.make_encoder(encode, np.float32(0), batch_size=12)


def test_corrupt_images_are_named_or_left_out(folder, tmp_path, encoder):
    truncated = folder / 'class1' / '07.png'
    truncated.write_bytes(truncated.read_bytes()[:60])
    (folder / 'class2' / '41.png').write_bytes(b'no image')
    with pytest.raises(sources.CorruptImageError, match='07.png cannot be read .*skip'):
        run(folder, tmp_path / 'error', encoder)
    manifest = run(folder, tmp_path / 'skip', encoder, on_corrupt='skip')
    assert manifest['count'] == 42 and sum(manifest['count_per_class']) == 42
    names = [entry['file'] for entry in manifest['skipped']]
    assert names == [str(truncated), str(folder / 'class2' / '41.png')]
    assert all(entry['reason'] for entry in manifest['skipped'])
    assert not prepare_data.verify(tmp_path / 'skip', show=lambda line: None)


def test_values_that_are_not_finite_are_refused():
    record = latents.Record(0, np.full((2, *SHAPE), 1e5), np.zeros((2, *SHAPE)))
    with pytest.raises(ValueError, match='mean .* not finite in float16.*float32'):
        latents.pack(record, 'float16')
    back = latents.unpack(latents.pack(record, 'float32'), SHAPE, 'float32')
    np.testing.assert_array_equal(back.mean, record.mean.astype(np.float32))
    with pytest.raises(ValueError, match='bytes is not one of latents'):
        latents.unpack(latents.pack(record, 'float32'), SHAPE, 'float16')


def _flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    'damage,problem',
    [
        (lambda out: _flip_a_byte(next(out.glob('*00003-of*'))), 'not the bytes'),
        (lambda out: next(out.glob('*00003-of*')).unlink(), '00003.*missing'),
        (lambda out: _flip_a_byte(out / 'labels.npy'), 'labels.npy: not the file'),
    ],
)
def test_verify_finds_damage_and_preparing_again_mends_it(
    folder, tmp_path, encoder, damage, problem
):
    out, quiet = tmp_path / 'out', lambda line: None
    whole = run(folder, out, encoder)
    assert not prepare_data.verify(out, show=quiet)
    damage(out)
    (found,) = prepare_data.verify(out, show=quiet)
    assert problem.replace('00003.*', '') in found
    (out / found.partition(':')[0]).unlink(missing_ok=True)
    again = Flaky(encoder, fail_at=-1)
    assert run(folder, out, again) == whole
    assert again.calls in (0, 2)  # Only what was damaged is made again.
    assert not prepare_data.verify(out, show=quiet)


def test_damaged_folders_are_refused_by_training(folder, tmp_path, encoder):
    out = tmp_path / 'out'

    def load():
        return sources.make_source(f'latents:{out}', image_size=2, channels=3)

    with pytest.raises(ValueError, match='no manifest.json'):
        load()
    run(folder, out, encoder)
    with pytest.raises(ValueError, match='set data.image_size = 2, data.channels = 3'):
        sources.make_source(f'latents:{out}', image_size=32, channels=4)
    shard = next(out.glob('*00001-of*'))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match='but the manifest says'):
        load()
    manifest = out / 'manifest.json'
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {'version': 99}))
    with pytest.raises(ValueError, match='version 99'):
        load()
    manifest.write_text('{')
    with pytest.raises(ValueError, match='damaged'):
        load()


# Training's side.


@pytest.fixture
def make_loader(folder, tmp_path, encoder):
    run(folder, tmp_path / 'out', encoder, dtype='float32')
    loaders = []

    def make(source=None, **options):
        source = source or sources.make_source(
            f'latents:{tmp_path / "out"}', image_size=2, channels=3
        )
        options = dict(batches=2, batch_size=11, seed=3) | options
        loaders.append(pool_loader.PoolLoader(source, **options))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def _take(loader, count):
    return list(itertools.islice(loader, count))


def test_posterior_is_sampled_afresh_with_its_deviation(make_loader):
    loader = make_loader(batches=4, flip=False)
    source = loader.source
    pools = _take(loader, 200)  # An epoch each.
    means = np.stack([source[i].mean[0] for i in range(44)])
    values = [[] for _ in range(44)]
    for pool in pools:
        for value in pool.images.reshape(44, *SHAPE):
            # Means lie much further apart than a few deviations of 0.3 times 0.5.
            values[np.abs(value / 0.5 - means).sum((1, 2, 3)).argmin()].append(value)
    assert {len(v) for v in values} == {200}  # Once an epoch.
    for drawn, record in zip(map(np.stack, values), (source[i] for i in range(44))):
        assert len(np.unique(drawn, axis=0)) == 200
        deviation = 0.5 * np.exp(0.5 * record.log_variance[0])
        error = (drawn.mean(0) - 0.5 * record.mean[0]) / deviation
        assert np.abs(error).max() < 0.36  # 5 standard errors.
        np.testing.assert_allclose(drawn.std(0), deviation, rtol=0.3)


def test_draw_is_exact():
    class Fixed:
        def standard_normal(self, shape, dtype):
            return np.full(shape, 2, dtype)

    source = object.__new__(sources.LatentSource)
    source.image_shape = SHAPE
    source._mean, source._scale = np.float32(0), np.float32(0.25)
    mean = np.stack([np.zeros(SHAPE), np.ones(SHAPE)]).astype(np.float32)
    log_variance = np.full((2, *SHAPE), 2 * np.log(3), np.float32)
    record = latents.Record(0, mean, log_variance)
    for flip, value in ((False, 1.5), (True, 1.75)):
        drawn = source.draw(record, flip=flip, random=Fixed())
        np.testing.assert_allclose(drawn, np.full(SHAPE, value), rtol=1e-6)
        assert drawn.dtype == np.float32


def test_flips_take_the_mirror_images_posterior(make_loader):
    loader = make_loader(batches=4, flip=True)
    source = loader.source
    means = np.stack([source[i].mean for i in range(44)])  # [44, 2, ...]
    flipped = 0
    for pool in _take(loader, 8):
        for value in pool.images.reshape(44, *SHAPE):
            distance = np.abs(value / 0.5 - means).sum((2, 3, 4))
            flipped += np.unravel_index(distance.argmin(), distance.shape)[1]
    assert 120 < flipped < 232  # 176 expected of 352; 6 deviations.


@pytest.mark.parametrize('options', [{}, {'flip': True}, {'classes_per_pool': 2}])
def test_resumed_and_split_loaders_repeat_the_whole_one(make_loader, options):
    whole = _take(make_loader(batch_size=12, **options), 5)
    resumed = make_loader(batch_size=12, **options)
    resumed.seek(3)
    np.testing.assert_array_equal(next(resumed).images, whole[3].images)
    parts = [
        make_loader(batch_size=12, process_index=i, process_count=2, **options)
        for i in range(2)
    ]
    for pool, *halves in zip(whole, *parts):
        joined = np.concatenate([half.images for half in halves], axis=1)
        np.testing.assert_array_equal(joined, pool.images)
        joined = np.concatenate([half.labels for half in halves], axis=1)
        np.testing.assert_array_equal(joined, pool.labels)


# Pools of few classes.


def _indexed(size, classes):
    images = np.zeros((size, 2, 2, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(size) // 256
    images[:, 0, 1, 0] = np.arange(size) % 256
    labels = np.random.default_rng(1).integers(0, classes, size)
    names = [str(c) for c in range(classes)]
    return sources.ArraySource('indexed', images, labels, names)


def _indices(pool):
    pixels = np.rint((pool.images + 1) * 127.5).astype(int)
    return pixels[..., 0, 0, 0] * 256 + pixels[..., 0, 1, 0]


def test_grouped_pools_hold_few_classes_and_lose_no_image(make_loader):
    source = _indexed(3000, classes=50)
    options = dict(batches=8, batch_size=32)
    grouped = _take(make_loader(source, classes_per_pool=8, **options), 24)
    plain = _take(make_loader(source, **options), 24)
    stream = np.concatenate([_indices(pool).ravel() for pool in grouped])
    for epoch in (stream[:3000], stream[3000:6000]):
        # A pool may straddle two epochs, and deals within itself.
        assert len(np.intersect1d(epoch, np.arange(3000))) >= 3000 - 256
    assert (np.bincount(stream[: 256 * 23]) >= 1).all()
    assert np.bincount(stream, minlength=3000).max() <= 3

    def largest(pool):
        return np.sort(np.bincount(pool.labels.ravel(), minlength=50))[::-1]

    # Chunks of 32, and what is left over of a class.
    assert np.mean([(largest(p) >= 25).sum() for p in grouped]) > 5
    assert max((largest(p) >= 25).sum() for p in plain) == 0
    for pool in grouped[:4]:
        np.testing.assert_array_equal(
            pool.labels.ravel(), source.labels[_indices(pool).ravel()]
        )
        # Dealt: the batches hold the pool's classes in like shares.
        counts = np.stack([np.bincount(row, minlength=50) for row in pool.labels])
        assert counts.max() <= 14  # 4 expected of a chunk of 32.
    orders = {tuple(_indices(pool).ravel()) for pool in grouped}
    assert len(orders) == 24


def test_grouping_needs_labels_and_a_count(make_loader):
    with pytest.raises(ValueError, match='classes_per_pool = -1'):
        make_loader(_indexed(50, 2), classes_per_pool=-1)
    source = _indexed(50, 2)
    del source.labels
    with pytest.raises(ValueError, match='needs all labels ahead'):
        make_loader(source, classes_per_pool=2)
