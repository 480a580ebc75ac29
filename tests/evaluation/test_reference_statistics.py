"""Reference statistics: from every kind of origin, cached, and never from a pickle."""

import numpy as np
from PIL import Image
import pytest

from ism_jax.data import array_source
from ism_jax.evaluation import frechet_distance, reference_statistics


class Counted:
    """A feature network that counts its images."""

    def __init__(self, network):
        self.network = network
        self.count = 0

    def __getattr__(self, name):
        return getattr(self.network, name)

    def __call__(self, images):
        self.count += len(images)
        return self.network(images)


@pytest.fixture
def make_network(tiny_network):
    """Makes a counted network whose distance is not FID."""

    def make(distance='FD-tiny', checksum='0'):
        return Counted(tiny_network(distance, checksum))

    return make


def _images(count=37, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)


def _write_folder(folder, images, classes=3):
    for number, image in enumerate(images):
        # The order of the names is that of the images.
        path = folder / f'class_{number * classes // len(images)}' / f'{number:03}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def _source(images):
    labels = np.zeros(len(images), np.int32)
    return array_source.ArraySource('test', images, labels, ['only'])


def _origins(tmp_path, images):
    np.savez(tmp_path / 'batch.npz', arr_0=images, arr_1=np.zeros(len(images)))
    np.savez_compressed(tmp_path / 'small.npz', arr_0=images)
    return {
        'source': _source(images),
        'folder': _write_folder(tmp_path / 'images', images),
        'npz': tmp_path / 'batch.npz',
        'compressed': tmp_path / 'small.npz',
    }


def _adm(path, images=None, seed=1, **change):
    """An NPZ file laid out as ADM's reference batches; None leaves an array out."""
    rng = np.random.default_rng(seed)
    arrays = {} if images is None else {'arr_0': images}
    for mean, covariance, size in (('mu', 'sigma', 5), ('mu_s', 'sigma_s', 3)):
        factor = rng.normal(size=(size, size))
        arrays |= {mean: rng.normal(size=size), covariance: factor @ factor.T}
    arrays = {k: v for k, v in (arrays | change).items() if v is not None}
    np.savez(path, **arrays)
    return arrays


@pytest.mark.parametrize('kind', ['source', 'folder', 'npz', 'compressed'])
def test_statistics_are_of_the_features_of_the_images(
    kind, tmp_path, monkeypatch, make_network
):
    monkeypatch.setattr(reference_statistics, '_BATCH', 10)
    images = _images()
    network = make_network()
    found = reference_statistics.load_or_compute(
        _origins(tmp_path, images)[kind], network
    )
    out = network(images)
    assert set(found.moments) == {'features', 'spatial'}
    for name, (mean, covariance) in found.moments.items():
        expected = out[name].astype(np.float64)
        np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-9)
        np.testing.assert_allclose(covariance, np.cov(expected.T), rtol=1e-9)
    np.testing.assert_array_equal(found.features, out['features'])
    assert found.count == 37


def test_distance_is_between_samples_and_images(tmp_path, make_network):
    network = make_network()
    found = reference_statistics.load_or_compute(_source(_images()), network)
    for output in ('features', 'spatial'):
        samples = network(_images(50, seed=1))[output].astype(np.float64)
        statistics = frechet_distance.FeatureStatistics(samples.shape[1])
        statistics.update(samples)
        mean, covariance = found.moments[output]
        assert found.distance(statistics, output) == pytest.approx(
            frechet_distance.gaussian_distance(
                samples.mean(0), np.cov(samples.T), mean, covariance
            )
        )


def test_kept_features_are_of_images_throughout(tmp_path, monkeypatch, make_network):
    monkeypatch.setattr(reference_statistics, '_BATCH', 10)
    images, network = _images(), make_network()
    found = reference_statistics.load_or_compute(
        _source(images), network, kept_features=12
    )
    out = network(images)['features']
    rows = [int(np.abs(out - row[None]).sum(1).argmin()) for row in found.features]
    np.testing.assert_array_equal(out[rows], found.features)
    assert len(set(rows)) == 12 and rows == sorted(rows)
    assert min(rows) < 10 and max(rows) >= 27  # Not from one class.
    assert found.count == 37


def test_is_computed_once(tmp_path, make_network):
    folder = _write_folder(tmp_path / 'images', _images())
    cache, network, lines = tmp_path / 'cache', make_network(), []
    options = dict(cache_dir=cache, log=lines.append)
    first = reference_statistics.load_or_compute(folder, network, **options)
    assert network.count == 37 and 'from 37 images' in lines[0]
    folder.rename(tmp_path / 'moved')  # The same images.
    again = reference_statistics.load_or_compute(tmp_path / 'moved', network, **options)
    assert network.count == 37 and 'reference-' in lines[-1]
    assert again.key == first.key and again.count == first.count
    np.testing.assert_array_equal(again.features, first.features)
    for output in first.moments:
        for a, b in zip(again.moments[output], first.moments[output], strict=True):
            np.testing.assert_array_equal(a, b)


def test_key_depends_on_images_network_and_options(tmp_path, make_network):
    images = _images()
    changed = images.copy()
    changed[20, 3, 3, 0] ^= 1
    origins = _origins(tmp_path, images)
    folder = _write_folder(tmp_path / 'changed', changed)
    np.savez(tmp_path / 'changed.npz', arr_0=changed)
    keys = [
        reference_statistics.load_or_compute(origin, network, **options).key
        for origin, network, options in (
            (origins['source'], make_network(), {}),
            (_source(changed), make_network(), {}),
            (origins['source'], make_network(checksum='1'), {}),
            (origins['source'], make_network(), dict(kept_features=5)),
            (origins['folder'], make_network(), {}),
            (origins['folder'], make_network(), dict(image_size=8)),
            (folder, make_network(), {}),
            (origins['npz'], make_network(), {}),
            (tmp_path / 'changed.npz', make_network(), {}),
        )
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'changed', 'another'])
def test_damaged_files_are_recomputed(tmp_path, damage, make_network):
    source, network = _source(_images()), make_network()
    first = reference_statistics.load_or_compute(source, network, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == 'truncated':
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == 'empty':
        path.write_bytes(b'')
    elif damage == 'changed':
        at = whole.index(first.features.tobytes()) + 9
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    else:
        other = _source(_images(seed=5))
        key = reference_statistics.load_or_compute(
            other, network, cache_dir=tmp_path
        ).key
        (tmp_path / f'reference-{key}.npz').rename(path)
    network.count = 0
    with pytest.warns(UserWarning, match='recomputing and replacing'):
        again = reference_statistics.load_or_compute(
            source, network, cache_dir=tmp_path
        )
    assert network.count == 37
    np.testing.assert_array_equal(again.features, first.features)
    reference_statistics.load_or_compute(source, network, cache_dir=tmp_path)
    assert network.count == 37  # The file was replaced.


def test_a_cache_that_cannot_be_written_is_not_fatal(tmp_path, make_network):
    (tmp_path / 'file').write_text('')
    with pytest.warns(UserWarning, match='cannot be written'):
        reference_statistics.load_or_compute(
            _source(_images()), make_network(), cache_dir=tmp_path / 'file'
        )


def test_adms_statistics_are_taken_for_fid(tmp_path, make_network):
    images = _images(20)
    arrays = _adm(tmp_path / 'adm.npz', images)
    network = make_network(distance='FID')
    found = reference_statistics.load_or_compute(
        tmp_path / 'adm.npz', network, cache_dir=tmp_path
    )
    np.testing.assert_array_equal(found.features, network(images)['features'])
    network.count = 0
    again = reference_statistics.load_or_compute(
        tmp_path / 'adm.npz', network, cache_dir=tmp_path
    )
    assert network.count == 0
    # Statistics without images, with and without those for sFID.
    _adm(tmp_path / 'both.npz')
    _adm(tmp_path / 'one.npz', mu_s=None, sigma_s=None)
    both = reference_statistics.load_or_compute(tmp_path / 'both.npz', network)
    one = reference_statistics.load_or_compute(tmp_path / 'one.npz', network)
    assert both.features is None and one.features is None
    for other in (found, again, both, one):
        assert other.count is None
        np.testing.assert_array_equal(other.moments['features'][0], arrays['mu'])
        np.testing.assert_array_equal(other.moments['features'][1], arrays['sigma'])
    for other in (found, again, both):
        np.testing.assert_array_equal(other.moments['spatial'][1], arrays['sigma_s'])
    assert set(one.moments) == {'features'}
    assert len({found.key, both.key, one.key}) == 3


def test_adms_statistics_are_not_those_of_another_network(tmp_path, make_network):
    images = _images(20)
    arrays = _adm(tmp_path / 'adm.npz', images)
    found = reference_statistics.load_or_compute(tmp_path / 'adm.npz', make_network())
    assert np.abs(found.moments['features'][0] - arrays['mu']).max() > 0.1
    assert found.count == 20
    _adm(tmp_path / 'both.npz')
    with pytest.raises(ValueError, match='nor statistics of the network tiny'):
        reference_statistics.load_or_compute(tmp_path / 'both.npz', make_network())


def test_damaged_and_foreign_npz_files_are_refused(tmp_path, make_network):
    network, path = make_network(distance='FID'), tmp_path / 'x.npz'
    load = reference_statistics.load_or_compute
    _adm(path, mu=np.array([print, print], object))
    with pytest.raises(ValueError, match='more than numbers'):
        load(path, network)
    np.savez(path, arr_0=np.array([print, print], object))
    with pytest.raises(ValueError, match='arr_0'):
        load(path, network)
    _adm(path, sigma=np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r'mean \(5,\) and a covariance \(4, 4\)'):
        load(path, network)
    for sigma in (np.full((5, 5), np.nan), np.triu(np.ones((5, 5)))):
        _adm(path, sigma=sigma)
        with pytest.raises(ValueError, match='expected finite .* symmetric'):
            load(path, network)
    _adm(path, sigma=None)
    with pytest.raises(ValueError, match='mu without sigma'):
        load(path, network)
    np.savez(path, arr_0=np.zeros((4, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match='not uint8'):
        load(path, network)
    np.savez(path, arr_0=np.zeros((4, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match='float32'):
        load(path, network)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match='holds other'):
        load(path, network)
    images = _images(600)  # More than is read at once.
    np.savez(path, arr_0=images)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match='cannot be read as an NPZ file'):
        load(path, network)
    at = whole.index(images.tobytes()) + 100_000
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match='x.npz is damaged .*CRC'):
        load(path, network)
    with pytest.raises(ValueError, match='missing.npz cannot be read'):
        load(tmp_path / 'missing.npz', network)


def test_fewer_than_two_images_are_refused(tmp_path, make_network):
    with pytest.raises(ValueError, match='at least 2 images'):
        reference_statistics.load_or_compute(_source(_images(1)), make_network())


def test_files_of_earlier_versions_are_found(real_source, tiny_network):
    found = reference_statistics.load_or_compute(real_source, tiny_network())
    assert found.key == '7273f7938461154c'
