"""Paths in buckets: what users give, and what differs from a file system."""

import errno

import fsspec
import numpy as np
import pytest

from ism_jax.runtime import files, paths


def test_files_are_written_listed_moved_and_removed(url, tmp_path):
    folder = paths.from_user(url, '--out')
    assert paths.is_bucket(folder) and str(folder) == url
    assert str(folder / 'a' / 'b') == f'{url}/a/b'
    assert paths.files_below(folder) == {}
    files.write_bytes(folder / 'a' / 'b', b'12')
    files.write_json(folder / 'c.json', {'d': 1})
    files.write_npz(folder / 'e.npz', f=np.arange(3))
    with files.replacing(folder / 'a' / 'large') as local:
        local.write_bytes(bytes(10**6))
    files.write_bytes(paths.to_path(f'{url}0') / 'not below', b'')
    found = paths.files_below(folder)
    assert list(found) == ['a/b', 'a/large', 'c.json', 'e.npz']
    assert found['a/b'] == paths.size(folder / 'a/b') == 2
    assert paths.read_bytes(folder / 'a/b') == b'12'
    with files.open_npz(folder / 'e.npz') as arrays:
        np.testing.assert_array_equal(arrays['f'], np.arange(3))
    paths.download(folder / 'a/large', tmp_path / 'large')
    assert (tmp_path / 'large').stat().st_size == 10**6
    assert paths.from_user(f'{url}/e.npz', '--reference').is_file()

    paths.move_folder(folder / 'a', folder / 'moved' / 'a', first=['large'])
    assert list(paths.files_below(folder / 'moved')) == ['a/b', 'a/large']
    assert not (folder / 'a').exists()
    paths.remove_file(folder / 'c.json')
    paths.remove_file(folder / 'c.json')
    assert not (folder / 'c.json').exists()
    # What another client writes is seen at once.
    assert not (folder / 'new').exists()
    kind = url.partition(':')[0]
    other = fsspec.filesystem(kind, skip_instance_cache=True)
    other.pipe_file(f'{url}/new', b'')
    assert (folder / 'new').exists() and 'new' in paths.files_below(folder)


def test_an_interrupted_write_leaves_the_old_file(folder):
    files.write_bytes(folder / 'a', b'old')
    with pytest.raises(KeyboardInterrupt):
        with files.replacing(folder / 'a') as local:
            local.write_bytes(b'half of the n')
            raise KeyboardInterrupt
    assert paths.read_bytes(folder / 'a') == b'old'


def test_a_missing_bucket_is_named(url):
    kind = url.partition(':')[0]
    with pytest.raises(ValueError, match=f'there is no bucket {kind}://missing'):
        paths.from_user(f'{kind}://missing/run', '--workdir')


def test_a_missing_client_is_named(monkeypatch):
    monkeypatch.setattr(paths.importlib.util, 'find_spec', lambda name: None)
    for kind, package in paths.CLIENTS.items():
        with pytest.raises(ValueError, match=f'--out .* pip install {package}$'):
            paths.from_user(f'{kind}://bucket/a', '--out')


@pytest.mark.parametrize('text', ['s3://bucket/a', 'az://bucket/a', 'https://x/y'])
def test_other_urls_are_refused(text):
    with pytest.raises(ValueError, match=f'--workdir {text} .*local paths and gs://'):
        paths.from_user(text, '--workdir', paths.CHECKPOINTS)


@pytest.mark.parametrize('answer', [503, 429, 'cut'])
@pytest.mark.parametrize('method', ['GET', 'POST|PUT'])
def test_requests_are_repeated(answer, method, folder, storage):
    content = bytes(range(256)) * 4096
    paths.put(folder / 'a', content)
    with storage.fault(answer, method=method, times=1) as hits:
        paths.put(folder / 'b', content)
        assert paths.read_bytes(folder / 'a') == content
    assert hits and paths.read_bytes(folder / 'b') == content


def test_a_write_is_given_up_after_a_while(folder, storage, monkeypatch):
    """With the old content intact; the pauses are counted, not waited for."""
    import gcsfs.retry

    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    paths.put(folder / 'a', b'old')
    monkeypatch.setattr(gcsfs.retry.asyncio, 'sleep', sleep)
    with storage.fault(503, method='POST|PUT') as hits:
        with pytest.raises(OSError) as failure:
            paths.put(folder / 'a', b'new')
    monkeypatch.undo()
    assert failure.value.errno == errno.EIO and len(hits) == 6
    assert 15 < sum(slept) < 60
    assert paths.read_bytes(folder / 'a') == b'old'


def test_denied_permission_is_a_permission_error(folder, storage):
    paths.put(folder / 'a', b'old')
    with storage.fault(403):
        for attempt in (
            lambda: paths.put(folder / 'a', b'new'),
            lambda: paths.read_bytes(folder / 'a'),
            lambda: paths.files_below(folder),
        ):
            with pytest.raises(PermissionError, match='Forbidden'):
                attempt()
        with pytest.raises(ValueError, match='--out gs://bucket/.* access is denied'):
            paths.from_user(folder, '--out')
    assert paths.read_bytes(folder / 'a') == b'old'
