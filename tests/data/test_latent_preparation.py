"""Preparation of latents: resume, shards of several processes, verification."""

import numpy as np
import pytest

from ism_jax.data import latent_preparation, latents
from ism_jax.data.source import CorruptImageError


class Flaky:
    """An encoder that fails at call number `fail_at`."""

    def __init__(self, encoder, fail_at):
        self.calls, self._encoder, self._fail_at = 0, encoder, fail_at

    def __call__(self, pixels):
        self.calls += 1
        if self.calls == self._fail_at:
            raise KeyboardInterrupt
        return self._encoder(pixels)


@pytest.mark.parametrize('dtype', latents.DTYPES)
def test_posteriors_of_both_flips_are_those_of_the_encoder(
    tmp_path, encode, encoder, prepare, open_images, open_latents, dtype
):
    manifest = prepare(tmp_path / 'out', encoder, dtype=dtype)
    source, images = open_latents(), open_images()
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


def test_resumes_at_the_first_missing_shard(tmp_path, encoder, prepare):
    whole = prepare(tmp_path / 'whole', encoder)
    flaky = Flaky(encoder, fail_at=4)  # In the third shard.
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / 'out', flaky)
    with pytest.raises(ValueError, match='no finished latents'):
        latents.read_manifest(tmp_path / 'out')
    again = Flaky(encoder, fail_at=-1)
    assert prepare(tmp_path / 'out', again) == whole
    assert again.calls == 3 * 2  # The first two shards are kept.
    again.calls = 0
    assert prepare(tmp_path / 'out', again) == whole
    assert not again.calls
    assert not list((tmp_path / 'out').glob('.*'))


def test_processes_share_the_shards(tmp_path, encoder, prepare):
    whole = prepare(tmp_path / 'whole', encoder)
    lines = []
    first, second = (
        prepare(
            tmp_path / 'out',
            encoder,
            process_index=i,
            process_count=2,
            log=lines.append,
        )
        for i in (1, 0)
    )
    assert first is None
    assert any('3 of 5 shards are left' in line for line in lines)
    assert second == whole


def test_other_settings_are_refused(tmp_path, images, encoder, prepare):
    prepare(tmp_path / 'out', encoder)
    with pytest.raises(ValueError, match="dtype: 'float16' -> 'float32'"):
        prepare(tmp_path / 'out', encoder, dtype='float32')
    (images / 'class0' / '00.png').unlink()
    with pytest.raises(ValueError, match='images: 44 -> 43'):
        prepare(tmp_path / 'out', encoder)


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(shards=45), '--shards 45 must be in 1 .. 44'),
        (dict(shards=0), '--shards 0'),
    ],
)
def test_number_of_shards_must_fit_the_images(
    tmp_path, encoder, prepare, options, message
):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / 'out', encoder, **options)
    assert not (tmp_path / 'out').exists()


def test_devices_must_divide_the_batch(encode):
    with pytest.raises(ValueError, match='--batch_size 12 must be a multiple of the 8'):
        latent_preparation.make_encoder(encode, np.float32(0), batch_size=12)


def test_corrupt_images_are_named_or_skipped(tmp_path, images, encoder, prepare):
    truncated = images / 'class1' / '07.png'
    truncated.write_bytes(truncated.read_bytes()[:60])
    (images / 'class2' / '41.png').write_bytes(b'no image')
    with pytest.raises(CorruptImageError, match='07.png cannot be read'):
        prepare(tmp_path / 'error', encoder)
    manifest = prepare(tmp_path / 'skip', encoder, on_corrupt='skip')
    assert manifest['count'] == 42 and sum(manifest['count_per_class']) == 42
    names = [entry['file'] for entry in manifest['skipped']]
    assert names == [str(truncated), str(images / 'class2' / '41.png')]
    assert all(entry['reason'] for entry in manifest['skipped'])
    assert not latent_preparation.verify(tmp_path / 'skip', log=lambda line: None)


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
def test_verify_finds_damage_and_preparing_again_repairs_it(
    tmp_path, encoder, prepare, damage, problem
):
    out, quiet = tmp_path / 'out', lambda line: None
    whole = prepare(out, encoder)
    assert not latent_preparation.verify(out, log=quiet)
    damage(out)
    (found,) = latent_preparation.verify(out, log=quiet)
    assert problem.replace('00003.*', '') in found
    (out / found.partition(':')[0]).unlink(missing_ok=True)
    again = Flaky(encoder, fail_at=-1)
    assert prepare(out, again) == whole
    assert again.calls in (0, 2)  # Only the damaged shard is encoded again.
    assert not latent_preparation.verify(out, log=quiet)
