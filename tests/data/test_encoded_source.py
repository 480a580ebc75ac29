"""What image folders, Parquet and tar files have in common: the same images."""

import io

import numpy as np
from PIL import Image
import pytest
import sharded_files

from ism_jax.data import sources
from ism_jax.data.source import CorruptImageError

SIZES = (4, 1, 7)
NAMES = ('cat', 'dog')
FORMATS = ('folder', 'parquet', 'tar')
MODES = ('RGB', 'L', 'RGBA', 'P', '1', 'LA', 'I;16')


def _png(index):
    """A PNG file of any mode."""
    random = np.random.default_rng(index)
    mode = MODES[index % len(MODES)]
    if mode == 'I;16':
        image = Image.fromarray(random.integers(0, 2**16, (20, 24), np.uint16))
    else:
        pixels = random.integers(0, 256, (20 + index, 30, 4), np.uint8)
        image = Image.fromarray(pixels).convert(mode)
    assert image.mode == mode
    file = io.BytesIO()
    image.save(file, 'PNG')
    return file.getvalue()


IMAGES = [(_png(index), int(index >= 5)) for index in range(12)]


def _write(kind, folder, images=IMAGES):
    match kind:
        case 'folder':
            return sharded_files.write_folder(folder, images, NAMES)
        case 'parquet':
            return sharded_files.write_parquet(folder, images, NAMES, SIZES)
    return sharded_files.write_tar(folder, images, SIZES)


@pytest.fixture(params=FORMATS)
def write(request, tmp_path):
    """Writes images in a format; returns a function that opens them."""

    def write(images=IMAGES, folder='written'):
        name = _write(request.param, tmp_path / folder, images)

        def open_source(**options):
            options = dict(image_size=16, channels=3) | options
            return sources.make_source(
                name, data_dir=str(tmp_path / 'cache'), **options
            )

        return open_source

    return write


def test_images_of_all_modes_are_those_of_a_folder(write, tmp_path):
    expected = sources.make_source(
        _write('folder', tmp_path / 'plain'), image_size=16, channels=3
    )
    source = write()()
    assert len(source) == 12 and source.image_shape == (16, 16, 3)
    assert source.class_names in (NAMES, ('0', '1'))
    assert source.labels.dtype == np.int32
    for index in range(12):
        np.testing.assert_array_equal(
            source[index]['image'], expected[index]['image'], strict=True
        )
        label = source[index]['label']
        assert label == source.labels[index] == IMAGES[index][1]
    with pytest.raises(IndexError):
        source[12]


def test_a_corrupt_image_is_named_or_skipped(write):
    images = list(IMAGES)
    images[4] = images[4][0][:60], images[4][1]
    open_source = write(images)
    source = open_source()
    with pytest.raises(CorruptImageError) as caught:
        source[4]
    name = source.name_of(4)
    assert str(caught.value).startswith(f'{name} cannot be read as an image (')
    source = open_source(on_corrupt='skip')
    np.testing.assert_array_equal(source[4]['image'], source[5]['image'])
    assert source[4]['label'] == source[5]['label']
    assert len(source.skipped) == 1 and list(source.skipped.reasons) == [name]


def test_a_resumed_loader_repeats_the_pools_of_any_number_of_readers(
    write, make_loader
):
    open_source = write()
    whole = make_loader(open_source(), batches=2, batch_size=4, flip=True)
    pools = [next(whole) for _ in range(4)]
    parts = []
    for index in range(2):
        options = dict(process_index=index, process_count=2, flip=True)
        part = make_loader(open_source(), batches=2, batch_size=4, **options)
        part.set_state(whole.get_state() | {'next_pool': 3})
        parts.append(next(part))
    images = np.concatenate([part.images for part in parts], axis=1)
    np.testing.assert_array_equal(images, pools[3].images)
    labels = np.concatenate([part.labels for part in parts], axis=1)
    np.testing.assert_array_equal(labels, pools[3].labels)


def test_repr_identifies_the_data(write):
    """Checkpoints store it, and a run does not resume with another."""
    open_source = write()
    assert repr(open_source()) == repr(open_source(on_corrupt='skip'))
    assert repr(open_source()) != repr(open_source(image_size=8))
    found = {repr(open_source())}
    for number, images in enumerate(
        (
            IMAGES[:11],
            [*IMAGES[:11], (_png(12), 1)],
            [*IMAGES[:4], (IMAGES[4][0], 1), *IMAGES[5:]],
        )
    ):
        folder = f'changed{number}'
        found.add(repr(write(images, folder)()).replace(folder, 'written'))
    assert len(found) == 4
