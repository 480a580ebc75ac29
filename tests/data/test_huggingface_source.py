"""Parquet files of Hugging Face `datasets`: columns, damage, and folders of the hub."""

import io

import numpy as np
from PIL import Image
import pytest
from sharded_files import write_parquet

from ism_jax.data import sources
from ism_jax.runtime import paths

datasets = pytest.importorskip('datasets', reason='it writes the files')


def _png(value=0):
    file = io.BytesIO()
    Image.new('L', (8, 8), value).save(file, 'PNG')
    return file.getvalue()


@pytest.fixture
def open_source(tmp_path):
    """Opens a source with its cache in `tmp_path`."""

    def open_source(name, **options):
        return sources.make_source(
            name, image_size=8, channels=1, data_dir=str(tmp_path / 'cache'), **options
        )

    return open_source


@pytest.fixture
def exported(tmp_path):
    """Six images in shards of 4, 1 and 1."""
    images = [(_png(40 * i), i % 2) for i in range(6)]
    write_parquet(tmp_path / 'data', images, ('cat', 'dog'), (4, 1, 1))
    return tmp_path / 'data'


def test_rows_have_the_names_of_their_shards(exported, open_source):
    source = open_source(f'parquet:{exported}/*.parquet')
    assert source.class_names == ('cat', 'dog')
    names = [source.name_of(i) for i in (0, 3, 4, 5)]
    assert names == [
        f'row {row} of {exported}/train-0000{shard}-of-00003.parquet'
        for row, shard in ((0, 0), (3, 0), (0, 1), (0, 2))
    ]


def test_shards_in_a_bucket(exported, open_source, folder):
    for path in exported.iterdir():
        paths.upload(path, folder / path.name)
    source = open_source(f'parquet:{folder}/train-*.parquet')
    local = open_source(f'parquet:{exported}/*.parquet')
    for ours, same in zip(source, local, strict=True):
        np.testing.assert_array_equal(ours['image'], same['image'])
    assert source.name_of(4) == f'row 0 of {folder}/train-00001-of-00003.parquet'
    paths.remove_file(folder / 'train-00001-of-00003.parquet')
    with pytest.raises(ValueError, match=r'00001-of-00003.parquet does not exist'):
        open_source(f'parquet:{folder}/*.parquet')


def test_a_folder_of_the_hub(exported, open_source):
    source = open_source(f'hf:{exported.parent}')
    assert source.class_names == ('cat', 'dog')
    assert source.labels.tolist() == [0, 1] * 3
    assert [int(source[i]['image'].max()) for i in range(6)] == list(range(0, 240, 40))
    assert source.name_of(3) == f'row 3 of hf:{exported.parent}/train'
    with pytest.raises(ValueError, match=r'hf:.* cannot be opened \(Unknown split "x"'):
        open_source(f'hf:{exported.parent}', split='x')
    with pytest.raises(ValueError, match='hf:/nothing cannot be opened'):
        open_source('hf:/nothing')


@pytest.mark.parametrize('kept', [0, 100, -1, -400])
def test_a_truncated_shard_is_named(exported, open_source, kept):
    path = exported / 'train-00001-of-00003.parquet'
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf'{path} is truncated or not a Parquet file'):
        open_source(f'parquet:{exported}/*.parquet')


def test_shards_with_damaged_or_other_columns_are_refused(exported, open_source):
    path = exported / 'train-00001-of-00003.parquet'
    content = path.read_bytes()
    path.write_bytes(content[:4] + b'x' * 60 + content[64:])
    with pytest.raises(ValueError, match=r'parquet:.* cannot be read \('):
        open_source(f'parquet:{exported}/*.parquet')
    datasets.Dataset.from_dict({'other': [1]}).to_parquet(path)
    with pytest.raises(ValueError, match='all its files need the same columns'):
        open_source(f'parquet:{exported}/*.parquet')


def _columns(**columns):
    """Two rows with columns of given types and values."""
    image = {'bytes': _png(7), 'path': None}
    features = {name: feature for name, (feature, _) in columns.items()}
    values = {
        name: [image, image] if value is None else value
        for name, (_, value) in columns.items()
    }
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


IMAGE = datasets.Image(), None
STORED = {'bytes': datasets.Value('binary'), 'path': datasets.Value('string')}, None
NUMBERS = datasets.Value('int64'), [0, 2]
CLASSES = datasets.ClassLabel(names=['a', 'b', 'c']), [0, 2]


@pytest.mark.parametrize(
    'columns,names',
    [
        (dict(image=IMAGE, label=NUMBERS), ('0', '1', '2')),
        (dict(img=STORED, cls=NUMBERS, x=(datasets.Value('string'), ['', ''])), '012'),
        (dict(img=IMAGE, id=NUMBERS, kind=CLASSES), ('a', 'b', 'c')),
        (dict(mask=IMAGE, image=IMAGE, fine=CLASSES, label=NUMBERS), '012'),
    ],
)
def test_columns_are_found_by_their_types(tmp_path, open_source, columns, names):
    _columns(**columns).to_parquet(tmp_path / 'a.parquet')
    source = open_source(f'parquet:{tmp_path}/a.parquet')
    assert source.class_names == tuple(names)
    assert source.labels.tolist() == [0, 2]
    assert np.unique(source[1]['image']) == [7]


@pytest.mark.parametrize(
    'columns,message',
    [
        (dict(img=IMAGE), r'has the columns img \(Image.*, or one be named .label'),
        (dict(label=NUMBERS), 'exactly one must hold images'),
        (dict(a=IMAGE, b=IMAGE, label=NUMBERS), "one be named 'image'"),
        (dict(img=IMAGE, fine=CLASSES, coarse=CLASSES), "one be named 'label'"),
        (
            dict(img=IMAGE, label=(CLASSES[0], [1, -1])),
            r"row 1 of .*a\.parquet has no class, its 'label' is -1",
        ),
        (
            dict(img=IMAGE, label=(NUMBERS[0], [None, 1])),
            r"row 0 of .*a\.parquet has no class, its 'label' is nan",
        ),
    ],
)
def test_columns_without_an_image_and_a_class_are_refused(
    tmp_path, open_source, columns, message
):
    _columns(**columns).to_parquet(tmp_path / 'a.parquet')
    with pytest.raises(ValueError, match=message):
        open_source(f'parquet:{tmp_path}/a.parquet')


def test_a_missing_image_is_an_unreadable_one(tmp_path, open_source):
    rows = _columns(image=IMAGE, label=NUMBERS).to_list()
    rows[0]['image'] = None
    features = datasets.Features(image=datasets.Image(), label=NUMBERS[0])
    datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / 'a.parquet')
    source = open_source(f'parquet:{tmp_path}/a.parquet', on_corrupt='skip')
    assert np.unique(source[0]['image']) == [7] and len(source.skipped) == 1
