"""Tar files: layouts, damage, and what is not an image with a class."""

import io
import json
import tarfile

import numpy as np
from PIL import Image
import pytest
from sharded_files import add, write_tar

from ism_jax.data import sources


def _png(value=0):
    file = io.BytesIO()
    Image.new('L', (8, 8), value).save(file, 'PNG')
    return file.getvalue()


def _open(pattern, **options):
    return sources.make_source(f'tar:{pattern}', image_size=8, channels=1, **options)


def test_other_members_and_labels_in_json(tmp_path):
    path = tmp_path / 'a.tar'
    with tarfile.open(path, 'w') as tar:
        folder = tarfile.TarInfo('b')
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in {
            'b/1.json': json.dumps({'label': 2, 'file': 'x.jpg'}).encode(),
            'b/1.PNG': _png(30),
            'b/1.txt': b'a caption',
            'b/._1.png': b'of macOS',
            'c/1.cls': b'1\n',
            'c/1.json': json.dumps({'label': 0}).encode(),
            'c/1.png': _png(60),
            # Of one sample, as the first dot decides.
            'c/2.mask.png': _png(),
            'c/2.png': _png(90),
            'c/2.cls': b'0',
        }.items():
            add(tar, name, content)
    source = _open(path)
    assert source.labels.tolist() == [2, 1, 0] and source.class_names == tuple('012')
    assert [int(source[i]['image'].max()) for i in range(3)] == [30, 60, 90]
    assert source.name_of(1) == f'{path}/c/1.png'


@pytest.mark.parametrize(
    'members,message',
    [
        ({'1.png': b''}, r'a\.tar/1 has the members png, but a sample needs one image'),
        ({'1.cls': b'1'}, r'a\.tar/1 has the members cls,'),
        ({'1.png': b'', '1.cls': b'cat'}, r'a\.tar/1 has .* an integer in \.cls'),
        ({'1.png': b'', '1.cls': b'-1'}, 'its class from 0 on'),
        ({'1.png': b'', '1.json': b'[3]'}, r'a\.tar/1 has the members json, png'),
        ({'1.png': b'', '1.json': b'{"label": true}'}, '"label" in .json'),
        ({'1.png': b'', '1.jpg': b'', '1.cls': b'1'}, 'members cls, jpg, png, but'),
        ({}, r'tar:.*a\.tar holds no samples'),
    ],
)
def test_samples_without_one_image_and_one_class_are_refused(
    tmp_path, members, message
):
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        for name, content in members.items():
            add(tar, name, content)
    with pytest.raises(ValueError, match=message):
        _open(tmp_path / 'a.tar')


def _damaged(path):
    """Contents of a tar file that is cut at each block, or has a damaged header."""
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1]
        last = end.offset_data + 512
        header = tar.getmembers()[1].offset
    assert whole[last:] == bytes(len(whole) - last)
    yield from (whole[:size] for size in range(0, last + 1, 512))
    yield whole[: end.offset_data - 100]
    yield whole[:header] + b'x' * 512 + whole[header + 512 :]
    yield b'not a tar file' * 100


def test_a_damaged_shard_is_named(tmp_path):
    write_tar(tmp_path / 'shards', [(_png(i), i) for i in range(4)], (3, 1))
    assert len(_open(tmp_path / 'shards' / '*.tar')) == 4
    path = tmp_path / 'shards' / 'train-000.tar'
    for content in list(_damaged(path)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r'train-000\.tar is truncated or not an'):
            _open(tmp_path / 'shards' / '*.tar')
    with tarfile.open(path, 'w:gz') as tar:
        add(tar, '1.png', _png())
    with pytest.raises(ValueError, match='not an uncompressed tar file'):
        _open(path)


def test_long_names_are_read(tmp_path):
    """They have a header of their own."""
    path = tmp_path / 'a.tar'
    with tarfile.open(path, 'w', format=tarfile.PAX_FORMAT) as tar:
        for number in range(2):
            name = f'{"é" * 150}/{number}'
            add(tar, f'{name}.png', _png(number))
            add(tar, f'{name}.cls', b'0')
    source = _open(path)
    assert np.unique(source[1]['image']) == [1] and 'é/1.png' in source.name_of(1)
