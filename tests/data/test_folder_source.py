"""Folders of images: listing, colours, unreadable images."""

import contextlib
import os
from pathlib import Path
import struct
import zlib

import numpy as np
from PIL import Image
import pytest

from ism_jax.data import encoded_source, image_crop, sources
from ism_jax.data.source import CorruptImageError, SkippedImages


def _folder(path, **options):
    options = dict(image_size=16, channels=3) | options
    return sources.make_source(f'folder:{path}', **options)


def test_folder_of_classes(animals):
    source = _folder(animals)
    assert source.class_names == ('cats', 'dogs') and source.num_classes == 2
    assert [int(source[i]['label']) for i in range(len(source))] == [0, 0, 0, 1, 1, 1]
    image = source[4]['image']
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    own = image_crop.center_crop(Image.open(animals / 'dogs' / '1.png'), 16, 3)
    np.testing.assert_array_equal(image, own)
    assert _folder(animals, channels=1)[0]['image'].shape == (16, 16, 1)
    assert len(list(source)) == 6  # An index past the end is an error.


def test_order_does_not_depend_on_the_file_system(animals, monkeypatch):
    scan, iterate = os.scandir, Path.iterdir

    def reversed_scan(path):
        with scan(path) as entries:
            found = sorted(entries, key=lambda entry: entry.name, reverse=True)
        return contextlib.nullcontext(found)

    usual = _folder(animals)
    monkeypatch.setattr(os, 'scandir', reversed_scan)
    monkeypatch.setattr(Path, 'iterdir', lambda p: sorted(iterate(p), reverse=True))
    source = _folder(animals)
    assert source.class_names == ('cats', 'dogs') and repr(source) == repr(usual)
    for index in range(6):
        np.testing.assert_array_equal(source[index]['image'], usual[index]['image'])


def test_folder_formats_subfolders_and_hidden_files(animals):
    cats = animals / 'cats'
    Image.new('RGB', (16, 16), (200, 0, 0)).save(cats / 'a.WEBP', lossless=True)
    Image.new('RGB', (16, 16), (0, 0, 200)).save(cats / 'b.jpeg')
    (animals / 'dogs' / 'more').mkdir()
    Image.new('L', (16, 16), 77).save(animals / 'dogs' / 'more' / 'c.bmp')
    for name in ('cats/._a.png', 'dogs/notes.txt', '.thumbnails/x.png', 'README.txt'):
        (animals / name).parent.mkdir(exist_ok=True)
        (animals / name).write_text('no image')
    source = _folder(animals)
    assert source.class_names == ('cats', 'dogs') and len(source) == 9
    assert (source[3]['image'] == (200, 0, 0)).all()
    assert (abs(source[4]['image'].astype(int) - (0, 0, 200)) < 4).all()
    assert (source[8]['image'] == 77).all() and source[8]['label'] == 1


def test_links_and_pipes_in_a_folder(animals, tmp_path):
    os.mkfifo(animals / 'cats' / '9.png')
    (tmp_path / 'elsewhere').mkdir()
    (animals / 'cats' / '0.png').rename(tmp_path / 'elsewhere' / '0.png')
    (animals / 'cats' / 'linked').symlink_to(tmp_path / 'elsewhere')
    assert len(_folder(animals)) == 6
    # A link to a folder that contains it adds nothing.
    (animals / 'cats' / 'loop').symlink_to(animals / 'cats')
    assert len(_folder(animals)) == 6


def test_extreme_sides(animals):
    Image.new('L', (1, 20_000), 200).save(animals / 'cats' / '0.png')
    image = _folder(animals)[0]['image']
    assert image.shape == (16, 16, 3) and (image == 200).all()


def test_control_characters_of_names_are_escaped(animals, capsys):
    hostile = animals / 'cats' / '\x1b[2J\r.png'
    hostile.write_bytes(b'')
    source = _folder(animals, on_corrupt='skip')
    source[0]
    (reason,) = source.skipped.reasons.values()
    assert '\x1b' not in reason and '\\x1b[2J\\r.png cannot be read' in reason


def test_repr_identifies_the_files_and_their_sizes(animals):
    before = repr(_folder(animals))
    assert before == repr(_folder(animals, on_corrupt='skip'))
    assert before != repr(_folder(animals, image_size=8))
    (animals / 'cats' / '0.png').rename(animals / 'cats' / '9.png')
    renamed = repr(_folder(animals))
    Image.new('L', (40, 40)).save(animals / 'cats' / '9.png')
    assert len({before, renamed, repr(_folder(animals))}) == 3


def test_transparent_pixels_are_white(animals):
    paths = [animals / 'cats' / f'{i}.png' for i in range(3)]
    Image.new('RGBA', (16, 16), (0, 0, 0, 0)).save(paths[0])
    palette = Image.new('P', (16, 16), 0)
    palette.putpalette([10, 20, 30])
    palette.save(paths[1], transparency=0)
    Image.new('LA', (16, 16), (0, 128)).save(paths[2])
    source = _folder(animals)
    assert (source[0]['image'] == 255).all() and (source[1]['image'] == 255).all()
    assert (abs(source[2]['image'].astype(int) - 127) <= 1).all()


def test_sixteen_bits_are_scaled_not_clipped(animals):
    values = (np.arange(256, dtype=np.uint16).reshape(16, 16) << 8) + 5
    Image.fromarray(values).save(animals / 'cats' / '0.png')
    grey = _folder(animals, channels=1)[0]['image'][..., 0]
    np.testing.assert_array_equal(grey, np.arange(256).reshape(16, 16))
    Image.fromarray(np.ones((16, 16), np.float32)).save(animals / 'cats' / '0.tiff')
    with pytest.raises(CorruptImageError, match=r"0\.tiff.*mode 'F'"):
        _folder(animals)[1]


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack('>I', zlib.crc32(kind + content))
    return struct.pack('>I', len(content)) + kind + content + checksum


def _bomb() -> bytes:
    """A PNG file of a few bytes whose header claims 60,000 pixels wide and high."""
    header = struct.pack('>IIBBBBB', 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = _chunk(b'IHDR', header) + _chunk(b'IDAT', zlib.compress(bytes(1000)))
    return b'\x89PNG\r\n\x1a\n' + chunks + _chunk(b'IEND', b'')


def _text_bomb(whole: bytes) -> bytes:
    """A PNG file with a comment of 200 MB, compressed."""
    text = b'Comment\0\0' + zlib.compress(bytes(200 * 2**20), 9)
    return whole[:33] + _chunk(b'zTXt', text) + whole[33:]


@pytest.fixture(params=['png', 'jpeg', 'garbage', 'empty', 'bomb', 'text bomb'])
def corrupt(request, animals):
    path = animals / 'cats' / '1.png'
    if request.param == 'jpeg':
        path.unlink()
        path = animals / 'cats' / '1.jpg'
        noise = np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path, quality=95)
    content = path.read_bytes()
    half = content[: len(content) // 2]
    hostile = {'bomb': _bomb(), 'garbage': b'garbage', 'empty': b''}
    if request.param == 'text bomb':
        hostile[request.param] = _text_bomb(content)
    path.write_bytes(hostile.get(request.param, half))
    return animals, path


def test_corrupt_image_is_an_error_that_names_it(corrupt, make_loader):
    animals, path = corrupt
    source = _folder(animals)
    with pytest.raises(CorruptImageError) as caught:
        source[1]
    message = str(caught.value)
    assert message.startswith(f'{path} cannot be read as an image (')
    assert 'on_corrupt' not in message
    with pytest.raises(CorruptImageError, match=path.name):
        next(make_loader(source, batches=1, batch_size=6))
    assert len(source.skipped) == 0


def test_corrupt_image_is_skipped_and_counted_once(corrupt, make_loader):
    animals, path = corrupt
    loader = make_loader(_folder(animals, on_corrupt='skip'), batches=2, batch_size=6)
    assert loader.skipped == 0
    pools = [next(loader) for _ in range(3)]
    assert loader.skipped == 1
    ((file, reason),) = loader.source.skipped.reasons.items()
    assert file == str(path) and reason.startswith(f'{path} cannot be read')
    # It is skipped already: no advice to skip it.
    assert 'on_corrupt' not in reason and 'repair' not in reason
    np.testing.assert_array_equal(loader.source[1]['image'], loader.source[2]['image'])
    again = make_loader(_folder(animals, on_corrupt='skip'), batches=2, batch_size=6)
    again.seek(2)
    np.testing.assert_array_equal(next(again).images, pools[2].images)


def test_replacement_keeps_its_own_label(animals):
    (animals / 'cats' / '2.png').write_bytes(b'garbage')
    (animals / 'dogs' / '2.png').write_bytes(b'garbage')
    source = _folder(animals, on_corrupt='skip')
    for index, replacement in ((2, 3), (5, 0)):
        np.testing.assert_array_equal(
            source[index]['image'], source[replacement]['image']
        )
        assert source[index]['label'] == source[replacement]['label']


def test_folder_of_unreadable_images_is_an_error(animals, monkeypatch):
    for path in animals.glob('*/*.png'):
        path.write_bytes(b'garbage')
    source = _folder(animals, on_corrupt='skip')
    with pytest.raises(CorruptImageError, match='6 images in a row.*animals'):
        source[0]
    monkeypatch.setattr(encoded_source, 'MAX_SKIPPED_IN_ROW', 2)
    source = _folder(animals, on_corrupt='skip')
    with pytest.raises(CorruptImageError, match='2 images in a row'):
        source[0]


def test_skipped_files_are_counted_beyond_those_listed():
    skipped = SkippedImages()
    for index in (*range(250), *range(250)):
        skipped.add(index, f'{index}.png', 'broken')
    assert len(skipped) == 250
    assert list(skipped.reasons) == [f'{i}.png' for i in range(100)]


def test_unreachable_file_is_not_skipped(animals):
    source = _folder(animals, on_corrupt='skip')
    (animals / 'cats' / '1.png').unlink()
    with pytest.raises(FileNotFoundError, match=r'cats/1\.png'):
        source[1]
    assert len(source.skipped) == 0


def test_folders_without_images_per_class_are_refused(animals, tmp_path):
    with pytest.raises(ValueError, match='nothing is not a folder with subfolders'):
        _folder(animals / 'nothing')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='empty is not a folder with subfolders'):
        _folder(tmp_path / 'empty')
    with pytest.raises(ValueError, match=r'cats/0\.png is in no class .3 such'):
        _folder(animals / 'cats')
    (animals / 'fish').mkdir()
    with pytest.raises(
        ValueError, match='fish holds no images .*every subfolder is a class'
    ):
        _folder(animals)
    (animals / 'fish').rmdir()
    Image.new('L', (8, 8)).save(animals / 'stray.png')
    with pytest.raises(ValueError, match=r'stray\.png is in no class'):
        _folder(animals)
