"""Sources in buckets: the same data as on disk, and what happens to a bad copy."""

import fsspec
import numpy as np
import pytest

from ism_jax.data import latents, shard_cache, sources
from ism_jax.runtime import checksums, paths


def _upload(local, url):
    client = fsspec.filesystem(url.partition(':')[0])
    for name in paths.files_below(local):
        client.put_file(str(local / name), f'{url}/{name}')


def test_a_folder_of_images_is_the_same_as_on_disk(animals, url, make_loader):
    (animals / 'cats' / '.hidden.png').write_bytes(b'1')
    (animals / '.cache').mkdir()
    (animals / '.cache' / 'a.png').write_bytes(b'1')
    (animals / 'dogs' / 'puppies').mkdir()
    (animals / 'dogs' / '0.png').rename(animals / 'dogs' / 'puppies' / '0.png')
    _upload(animals, url)
    there, here = (
        sources.make_source(f'folder:{path}', image_size=16, channels=3)
        for path in (url, animals)
    )
    assert repr(there).replace(url, str(animals)) == repr(here)
    assert there.class_names == here.class_names
    np.testing.assert_array_equal(there.labels, here.labels)
    for index in range(len(here)):
        np.testing.assert_array_equal(there[index]['image'], here[index]['image'])
    pools = [next(make_loader(source, batches=1)) for source in (there, here)]
    np.testing.assert_array_equal(pools[0].images, pools[1].images)


def test_folders_without_classes_are_refused(animals, folder):
    with pytest.raises(ValueError, match='is not a folder with subfolders'):
        sources.make_source(f'folder:{folder}', image_size=16, channels=3)
    _upload(animals / 'dogs', str(folder))
    with pytest.raises(ValueError, match=r'gs://.*0.png is in no class .3 such'):
        sources.make_source(f'folder:{folder}', image_size=16, channels=3)


def test_an_image_that_a_bucket_refuses_for_a_while_is_read_again(
    animals, folder, storage, make_loader
):
    """After the client has given up."""
    _upload(animals, str(folder))
    source = sources.make_source(f'folder:{folder}', image_size=16, channels=3)
    loader = make_loader(source, batches=1, retry_seconds=20)
    with storage.fault(403, method='GET', path='dogs', times=1) as hits:
        next(loader)
    assert hits and loader.retries == 1


def _open(url, cache):
    return sources.make_source(
        f'latents:{url}', image_size=2, channels=3, cache_dir=str(cache)
    )


def test_latents_are_copied_once(encoder, prepare, open_latents, url, tmp_path):
    prepare(tmp_path / 'out', encoder)
    _upload(tmp_path / 'out', url)
    here, there = open_latents(), _open(url, tmp_path / 'cache')
    assert repr(there) == repr(here)
    for index in range(len(here)):
        np.testing.assert_array_equal(there[index].mean, here[index].mean)
    (copy,) = (tmp_path / 'cache').iterdir()
    written = {p: p.stat().st_mtime_ns for p in copy.glob('*.array_record')}
    assert len(written) == 5
    _open(url, tmp_path / 'cache')
    assert {p: p.stat().st_mtime_ns for p in written} == written


def test_a_stopped_copy_resumes(encoder, prepare, folder, tmp_path, monkeypatch):
    prepare(tmp_path / 'out', encoder)
    _upload(tmp_path / 'out', str(folder))
    download, copied = paths.download, []

    def stop(path, local):
        download(path, local)
        copied.append(path.name)
        if len(copied) == 3:
            local.write_bytes(local.read_bytes()[:10])
            raise KeyboardInterrupt

    monkeypatch.setattr(shard_cache, 'THREADS', 1)
    monkeypatch.setattr(paths, 'download', stop)
    with pytest.raises(KeyboardInterrupt):
        _open(folder, tmp_path / 'cache')
    assert len(_open(folder, tmp_path / 'cache')) == 44
    assert sorted(set(copied)) == sorted([*copied[:2], *copied[-4:]])


def test_a_damaged_shard_is_not_used(encoder, prepare, folder, tmp_path):
    prepare(tmp_path / 'out', encoder)
    _upload(tmp_path / 'out', str(folder))
    shard = folder / latents.shard_name(1, 5)
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match='00001-of-00005.* is not the file that the'):
        _open(folder, tmp_path / 'cache')
    shard.unlink()
    with pytest.raises(ValueError, match='00001-of-00005.* is missing'):
        _open(folder, tmp_path / 'cache')
    assert not list((tmp_path / 'cache').rglob('*00001-of*'))
    _upload(tmp_path / 'out', str(folder))
    assert len(_open(folder, tmp_path / 'cache')) == 44


def test_a_full_disk_is_named(encoder, prepare, folder, tmp_path, monkeypatch):
    prepare(tmp_path / 'out', encoder)
    _upload(tmp_path / 'out', str(folder))
    usage = lambda path: type('Usage', (), {'free': 1000})
    monkeypatch.setattr(shard_cache.shutil, 'disk_usage', usage)
    with pytest.raises(ValueError, match=r'cache.* has 0.0 GB free, and the latents'):
        _open(folder, tmp_path / 'cache')


def test_latents_are_prepared_into_a_bucket(
    encoder, prepare, folder, storage, tmp_path
):
    here = prepare(tmp_path / 'out', encoder)
    with storage.fault('cut', method='POST', every=4, times=2) as hits:
        there = prepare(folder, encoder)
    assert len(hits) == 2
    assert there['shards'] == here['shards']
    local = shard_cache.local_copy(folder, tmp_path / 'cache')
    labels = checksums.sha256(local / latents.LABELS)
    assert labels == checksums.sha256(tmp_path / 'out' / latents.LABELS)
    # The same command finds it finished.
    assert prepare(folder, encoder)['shards'] == here['shards']
