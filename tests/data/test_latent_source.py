"""The source of prepared latents: statistics, posteriors, damaged folders."""

import itertools
import json

import numpy as np
import pytest

from ism_jax.data import latent_source, latents

SHAPE = (2, 2, 3)


def test_channel_statistics_are_those_of_the_samples(
    tmp_path, encoder, prepare, open_latents
):
    manifest = prepare(tmp_path / 'out', encoder, dtype='float32')
    mean, std = manifest['channel_mean'], manifest['channel_std']
    plain = open_latents()
    normalised = open_latents(latent_mean=mean, latent_std=std)

    def draw(source):
        random = np.random.default_rng(0)
        draws = [
            source.draw(i % 44, flip=i % 88 > 43, random=lambda: random)[0]
            for i in range(44 * 20)
        ]
        return np.stack(draws)

    raw, latents_ = draw(plain) / 0.5, draw(normalised)
    np.testing.assert_allclose(latents_, (raw - mean) / std, atol=1e-4)
    np.testing.assert_allclose(latents_.mean((0, 1, 2)), 0, atol=0.02)
    np.testing.assert_allclose(latents_.std((0, 1, 2)), 1, rtol=0.01)
    assert np.abs(raw.std((0, 1, 2)) - 1).min() > 0.1


def test_damaged_folders_are_refused(tmp_path, encoder, prepare, open_latents):
    out = tmp_path / 'out'
    with pytest.raises(ValueError, match='no manifest.json'):
        open_latents()
    prepare(out, encoder)
    with pytest.raises(ValueError, match='set image_size = 2 and channels = 3'):
        open_latents(image_size=32, channels=4)
    shard = next(out.glob('*00001-of*'))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(
        ValueError, match='00001-of.* is not the file that the manifest describes'
    ):
        open_latents()
    labels = out / 'labels.npy'
    labels.write_bytes(labels.read_bytes()[:-1] + b'x')
    shard.write_bytes(content)
    with pytest.raises(ValueError, match='labels.npy .* is not the file'):
        open_latents()
    manifest = out / 'manifest.json'
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {'version': 99}))
    with pytest.raises(ValueError, match='version 99'):
        open_latents()
    manifest.write_text('{')
    with pytest.raises(ValueError, match='damaged'):
        open_latents()


def test_posterior_sample_is_exact():
    class Fixed:
        def standard_normal(self, shape, dtype):
            return np.full(shape, 2, dtype)

    source = object.__new__(latent_source.LatentSource)
    source.image_shape = SHAPE
    source._mean, source._scale = np.float32(0), np.float32(0.25)
    mean = np.stack([np.zeros(SHAPE), np.ones(SHAPE)]).astype(np.float32)
    log_variance = np.full((2, *SHAPE), 2 * np.log(3), np.float32)
    record = latents.Record(0, mean, log_variance)
    for flip, value in ((False, 1.5), (True, 1.75)):
        drawn = source.sample_posterior(record, flip=flip, random=Fixed())
        np.testing.assert_allclose(drawn, np.full(SHAPE, value), rtol=1e-6)
        assert drawn.dtype == np.float32


@pytest.fixture
def make_latent_loader(tmp_path, encoder, prepare, open_latents, make_loader):
    prepare(tmp_path / 'out', encoder, dtype='float32')
    return lambda **options: make_loader(
        open_latents(), **dict(batch_size=11) | options
    )


def _take(loader, count):
    return list(itertools.islice(loader, count))


def test_each_epoch_samples_the_posterior_with_its_deviation(make_latent_loader):
    loader = make_latent_loader(batches=4, flip=False)
    source = loader.source
    pools = _take(loader, 200)  # One epoch each.
    means = np.stack([source[i].mean[0] for i in range(44)])
    values = [[] for _ in range(44)]
    for pool in pools:
        for value in pool.images.reshape(44, *SHAPE):
            # The means are much further apart than the deviations of about 0.15.
            values[np.abs(value / 0.5 - means).sum((1, 2, 3)).argmin()].append(value)
    assert {len(v) for v in values} == {200}  # Once per epoch.
    for drawn, record in zip(map(np.stack, values), source, strict=False):
        assert len(np.unique(drawn, axis=0)) == 200
        deviation = 0.5 * np.exp(0.5 * record.log_variance[0])
        error = (drawn.mean(0) - 0.5 * record.mean[0]) / deviation
        assert np.abs(error).max() < 0.36  # 5 standard errors.
        np.testing.assert_allclose(drawn.std(0), deviation, rtol=0.3)


def test_flips_use_the_posterior_of_the_mirror_image(make_latent_loader):
    loader = make_latent_loader(batches=4, flip=True)
    source = loader.source
    means = np.stack([source[i].mean for i in range(44)])  # [44, 2, ...]
    flipped = 0
    for pool in _take(loader, 8):
        for value in pool.images.reshape(44, *SHAPE):
            distance = np.abs(value / 0.5 - means).sum((2, 3, 4))
            flipped += np.unravel_index(distance.argmin(), distance.shape)[1]
    assert 120 < flipped < 232  # 176 expected of 352; 6 deviations.


@pytest.mark.parametrize('options', [{}, {'flip': True}, {'classes_per_pool': 2}])
def test_resumed_and_split_loaders_repeat_the_uninterrupted_one(
    make_latent_loader, options
):
    whole = _take(make_latent_loader(batch_size=12, **options), 5)
    resumed = make_latent_loader(batch_size=12, **options)
    resumed.seek(3)
    np.testing.assert_array_equal(next(resumed).images, whole[3].images)
    parts = [
        make_latent_loader(batch_size=12, process_index=i, process_count=2, **options)
        for i in range(2)
    ]
    for pool, *halves in zip(whole, *parts, strict=False):
        joined = np.concatenate([half.images for half in halves], axis=1)
        np.testing.assert_array_equal(joined, pool.images)
        joined = np.concatenate([half.labels for half in halves], axis=1)
        np.testing.assert_array_equal(joined, pool.labels)
