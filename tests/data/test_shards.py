"""Patterns of shards, and shards that are missing."""

from pathlib import Path

import pytest

from ism_jax.data import shards


@pytest.fixture
def files(tmp_path):
    """Twelve numbered files, and others."""
    for number in range(12):
        (tmp_path / f'{number:02d}.tar').touch()
    for number in range(3):
        (tmp_path / 'data').mkdir(exist_ok=True)
        (tmp_path / 'data' / f'train-{number:05d}-of-00003.parquet').touch()
    (tmp_path / 'data' / 'test-00000-of-00001.parquet').touch()
    (tmp_path / 'folder.tar').mkdir()
    return tmp_path


@pytest.mark.parametrize(
    'pattern,names',
    [
        ('{08..11}.tar', ('08.tar', '09.tar', '10.tar', '11.tar')),
        ('{03,00,00}.tar', ('00.tar', '03.tar')),
        ('0[5-6].tar', ('05.tar', '06.tar')),
        ('07.tar', ('07.tar',)),
        ('{*,1?}.tar', tuple(f'{i:02d}.tar' for i in range(12))),
        ('**/train*', tuple(f'train-0000{i}-of-00003.parquet' for i in range(3))),
    ],
)
def test_patterns(files, pattern, names):
    found = shards.find_shards(f'{files}/{pattern}', 'tar')
    assert tuple(path.name for path in found) == names
    assert all(isinstance(path, Path) and path.is_file() for path in found)


@pytest.mark.parametrize(
    'pattern,missing',
    [
        ('{10..13}.tar', r'12\.tar does not exist \(2 missing of tar:'),
        ('none*.tar', r'none\*\.tar does not exist \(1 missing'),
        ('{0*,x*}.tar', r'x\*\.tar does not exist'),
        ('data/*0-of-*', r'train-00001-of-00003\.parquet does not exist \(2 missing'),
        ('{00..03.tar', 'Unbalanced braces'),
    ],
)
def test_missing_shards_are_named(files, pattern, missing):
    with pytest.raises(ValueError, match=missing):
        shards.find_shards(f'{files}/{pattern}', 'tar')


def test_buckets_are_refused():
    with pytest.raises(ValueError, match='tar gs://bucket/a.tar is a URL'):
        shards.find_shards('gs://bucket/a.tar', 'tar')
