"""Sources and the pool loader."""

import contextlib
import gzip
import io
import itertools
import json
import os
from pathlib import Path
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
from PIL import Image
import pytest
from tfds_files import write_tfds

from ism_jax.data import pool_loader, sources


def _source(size=40, side=4, classes=4):
    """Images whose pixels tell their own index."""
    images = np.zeros((size, side, side, 1), np.uint8)
    images[:, 0, 0, 0] = images[:, 0, -1, 0] = np.arange(size)
    names = [str(c) for c in range(classes)]
    return sources.ArraySource('indexed', images, np.arange(size) % classes, names)


def _indices(pool):
    return np.rint((pool.images[..., 0, 0, 0] + 1) * 127.5).astype(int)


@pytest.fixture
def make_loader():
    loaders = []

    def make(source=None, **options):
        options = dict(batches=2, batch_size=8, seed=3) | options
        loaders.append(pool_loader.PoolLoader(source or _source(), **options))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def _take(loader, count):
    return list(itertools.islice(loader, count))


# The loader.


def test_pools_have_the_promised_shapes_and_types(make_loader):
    pools = _take(make_loader(process_index=1, process_count=2), 3)
    assert [pool.number for pool in pools] == [0, 1, 2]
    for pool in pools:
        assert pool.images.shape == (2, 4, 4, 4, 1) and pool.images.dtype == np.float32
        assert pool.labels.shape == (2, 4) and pool.labels.dtype == np.int32
        np.testing.assert_array_equal(pool.labels, _indices(pool) % 4)


def test_pixels_are_mapped_exactly_to_minus_one_to_one(make_loader):
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    source = sources.ArraySource('all values', images, np.zeros(1, int), ['a'])
    values = next(make_loader(source, batches=1, batch_size=1)).images.ravel()
    assert values[0] == -1 and values[255] == 1
    np.testing.assert_allclose(values, np.linspace(-1, 1, 256), atol=1e-7)
    # The bytes come back, as those who write samples need.
    np.testing.assert_array_equal(np.rint((values + 1) * 127.5), np.arange(256))


@pytest.mark.parametrize('batches,batch_size', [(5, 8), (3, 8), (1, 16), (4, 32)])
def test_every_image_once_per_epoch(make_loader, batches, batch_size):
    pools = _take(make_loader(batches=batches, batch_size=batch_size), 6)
    stream = np.concatenate([_indices(pool).ravel() for pool in pools])
    epochs = [stream[start : start + 40] for start in range(0, len(stream) - 39, 40)]
    assert len(epochs) >= 2
    for epoch in epochs:
        assert sorted(epoch) == list(range(40))
    # What is left over is unique, too.
    rest = stream[len(epochs) * 40 :]
    assert len(set(rest)) == len(rest)


def test_epochs_and_seeds_have_orders_of_their_own(make_loader):
    orders = {
        tuple(_indices(pool).ravel())
        for seed in range(4)
        for pool in _take(make_loader(batches=5, seed=seed), 5)
    }
    # An epoch a pool; also epoch e of seed s is not epoch e + 1 of seed s - 1.
    assert len(orders) == 20
    again = _take(make_loader(batches=5, seed=2), 5)
    assert all(tuple(_indices(pool).ravel()) in orders for pool in again)


def test_order_is_a_uniform_permutation():
    firsts = [pool_loader._permutation(seed, 0, 5)[0] for seed in range(2000)]
    # 400 expected of each; 5 standard deviations are 90.
    assert (abs(np.bincount(firsts, minlength=5) - 400) < 90).all()


def test_order_stays_the_same_between_releases():
    # A checkpoint names its place in this order.
    assert pool_loader._permutation(3, 1, 8).tolist() == [7, 3, 5, 6, 4, 0, 2, 1]
    assert pool_loader._coins(3, 6, 8).astype(int).tolist() == [0, 1, 0, 1, 1, 1, 1, 1]


def test_data_smaller_than_a_batch(make_loader):
    stream = _indices(next(make_loader(_source(size=5)))).ravel()
    assert len(stream) == 16
    for epoch in stream[:15].reshape(3, 5):
        assert sorted(epoch) == list(range(5))


@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('count', [2, 4])
def test_processes_hold_parts_of_the_same_pools(make_loader, flip, count):
    source = _flippable(50)
    whole = _take(make_loader(source, flip=flip), 5)
    parts = [
        _take(make_loader(source, flip=flip, process_index=i, process_count=count), 5)
        for i in range(count)
    ]
    for pool, *shards in zip(whole, *parts):
        assert all(shard.images.shape[1] == 8 // count for shard in shards)
        for name in ('images', 'labels'):
            joined = np.concatenate([getattr(s, name) for s in shards], axis=1)
            np.testing.assert_array_equal(joined, getattr(pool, name))


def _flippable(size):
    """Images that differ from their mirror image and from each other."""
    images = np.random.default_rng(0).integers(0, 256, (size, 4, 4, 1), np.uint8)
    return sources.ArraySource('random', images, np.arange(size) % 2, ['a', 'b'])


def test_flips_are_half_horizontal_and_anew_each_epoch(make_loader):
    source = _flippable(200)
    loader = make_loader(source, batches=10, batch_size=20, flip=True, seed=1)
    plain = make_loader(source, batches=10, batch_size=20, flip=False, seed=1)
    flips = []
    for pool, original in zip(_take(loader, 4), _take(plain, 4)):
        same = (pool.images == original.images).all((2, 3, 4))
        mirrored = (pool.images == original.images[:, :, :, ::-1]).all((2, 3, 4))
        assert (same ^ mirrored).all()
        flips.append(mirrored.ravel())
    flips = np.array(flips)
    # 5 standard deviations of 800 fair coins.
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / 800**0.5
    assert all((a != b).any() for a, b in itertools.combinations(flips, 2))
    assert abs(np.corrcoef(flips.ravel()[:-1], flips.ravel()[1:])[0, 1]) < 0.18
    other = next(make_loader(source, batches=10, batch_size=20, flip=True, seed=2))
    assert (other.images != pool.images).any()


def test_flip_belongs_to_the_position_not_to_the_batch_size(make_loader):
    source = _flippable(30)
    streams = []
    for batches, batch_size in ((2, 5), (1, 3), (5, 6)):
        loader = make_loader(source, flip=True, batches=batches, batch_size=batch_size)
        pools = _take(loader, 30 // batches // batch_size)
        streams.append(np.concatenate([p.images.reshape(-1, 4, 4, 1) for p in pools]))
    np.testing.assert_array_equal(streams[0], streams[1])
    np.testing.assert_array_equal(streams[0], streams[2])


@pytest.mark.parametrize('stop', [0, 1, 2, 5])
@pytest.mark.parametrize('count', [1, 2])
def test_resumed_loader_repeats_the_uninterrupted_one(make_loader, stop, count):
    # 50 is no multiple of the 16 of a pool: most pools are amid an epoch.
    source = _flippable(50)
    pools = _take(make_loader(source, flip=True), stop + 3)
    stopped = make_loader(source, flip=True)
    _take(stopped, stop)
    state = json.loads(json.dumps(stopped.get_state()))
    assert state['next_pool'] == stop
    for rank in range(count):
        resumed = make_loader(
            source, flip=True, process_index=rank, process_count=count, num_threads=1
        )
        next(resumed)  # It had begun elsewhere.
        resumed.set_state(state)
        rows = slice(rank * 8 // count, (rank + 1) * 8 // count)
        for expected, pool in zip(pools[stop:], _take(resumed, 3)):
            assert pool.number == expected.number
            np.testing.assert_array_equal(pool.images, expected.images[:, rows])
            np.testing.assert_array_equal(pool.labels, expected.labels[:, rows])


def test_seek_is_the_position_of_an_uninterrupted_run(make_loader):
    pools = _take(make_loader(), 6)
    loader = make_loader()
    for number in (4, 1, 1, 5, 0):
        loader.seek(number)
        assert loader.get_state()['next_pool'] == number
        pool = next(loader)
        assert pool.number == number
        np.testing.assert_array_equal(pool.images, pools[number].images)
    with pytest.raises(ValueError, match='-1 must be at least 0'):
        loader.seek(-1)


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(seed=4), 'seed: 3 -> 4'),
        (dict(batches=3), 'batches: 2 -> 3'),
        (dict(batch_size=4), 'batch_size: 8 -> 4'),
        (dict(flip=True), 'flip: False -> True'),
        (dict(source=_source(size=44)), 'source: .*40 images.*44 images'),
        (dict(seed=4, flip=True), 'seed: 3 -> 4; flip: False -> True'),
    ],
)
def test_state_of_other_data_is_refused(make_loader, options, message):
    loader = make_loader(**options)
    with pytest.raises(ValueError, match=message + '.*--workdir'):
        loader.set_state(make_loader().get_state())


def test_state_without_a_position_is_refused(make_loader):
    state = make_loader().get_state()
    del state['next_pool']
    with pytest.raises(ValueError, match='next_pool: missing'):
        make_loader().set_state(state)


class _Watched:
    """Counts what is read and fails where it is told to."""

    image_shape, class_names, num_classes = (4, 4, 1), ('a', 'b'), 2
    skipped = ()

    def __init__(self, size=64, **record):
        self.size = size
        self.record = {'image': np.zeros((4, 4, 1), np.uint8), 'label': 0} | record
        self.failing = None
        self.reads = 0
        self.threads = set()

    def __len__(self):
        return self.size

    def __repr__(self):
        return 'Watched()'

    def __getitem__(self, index):
        self.reads += 1
        self.threads.add(threading.current_thread())
        if index == self.failing:
            raise OSError(5, 'Input/output error', f'{index}.png')
        return self.record


def _wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_pools_are_read_ahead_by_threads_up_to_the_prefetch(make_loader):
    source = _Watched()
    loader = make_loader(source, prefetch=3, num_threads=2)
    assert source.reads == 0  # A restored loader reads nothing in vain.
    next(loader)
    assert _wait_until(lambda: source.reads >= 4 * 16)
    time.sleep(0.1)
    # Grain refills as a batch is taken, so up to one batch more is under way.
    assert source.reads <= 4 * 16 + 8
    assert threading.current_thread() not in source.threads


def test_close_ends_the_reading(make_loader):
    source = _Watched()
    loader = make_loader(source)
    next(loader)
    loader.close()
    _wait_until(lambda: not any(thread.is_alive() for thread in source.threads))
    assert not any(thread.is_alive() for thread in source.threads)
    reads = source.reads
    with pytest.raises(ValueError, match='is closed'):
        next(loader)
    assert source.reads == reads
    loader.close()


def test_error_of_a_thread_is_raised_and_the_pool_is_not_lost(make_loader):
    source = _Watched()
    source.failing = int(pool_loader._permutation(3, 0, 64)[20])  # In pool 1.
    loader = make_loader(source)
    assert next(loader).number == 0
    for _ in range(2):
        with pytest.raises(OSError, match=f'{source.failing}.png'):
            next(loader)
    assert loader.get_state()['next_pool'] == 1
    source.failing = None
    assert next(loader).number == 1


def test_wrong_images_and_labels_name_the_source(make_loader):
    source = _Watched(image=np.zeros((4, 5, 1), np.uint8))
    with pytest.raises(
        ValueError, match=r'Watched.*image \d+ is uint8 \(4, 5, 1\).*\(4, 4, 1\)'
    ):
        next(make_loader(source))
    source = _Watched(image=np.zeros((4, 4, 1), np.float32))
    with pytest.raises(ValueError, match=r'Watched.*float32'):
        next(make_loader(source))
    for label in (2, -1):
        with pytest.raises(
            ValueError, match=rf'Watched.*image \d+ has label {label}.*0 \.\. 1'
        ):
            next(make_loader(_Watched(label=label)))


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(process_count=3), r'train.batch_size = 8 .* 3 processes.* 6 and 9'),
        (dict(batch_size=0), 'train.batch_size = 0'),
        (dict(batches=0), 'transport.batches = 0'),
        (dict(seed=-1), 'seed = -1'),
        (dict(num_threads=0), 'data.num_threads = 0'),
        (dict(prefetch=0), 'data.prefetch = 0'),
        (dict(process_index=2, process_count=2), r'process_index = 2 .*0 \.\. 1'),
        (dict(source=_Watched(size=0)), r'Watched\(\) has no images'),
    ],
)
def test_sizes_that_cannot_work_are_named(make_loader, options, message):
    options = dict(source=_Watched()) | options
    with pytest.raises(ValueError, match=message):
        pool_loader.PoolLoader(**dict(batches=2, batch_size=8, seed=3) | options)


def test_in_memory_pools_are_fast(make_loader):
    images = np.zeros((5000, 32, 32, 1), np.uint8)
    source = sources.ArraySource('zeros', images, np.zeros(5000, int), ['a'])
    loader = make_loader(source, batches=32, batch_size=64, flip=True)
    next(loader)
    times = []
    for _ in range(15):
        start = time.perf_counter()
        next(loader)
        times.append(time.perf_counter() - start)
    # The best, as other work may share the machine; 6 ms are usual.
    assert min(times) < 0.02


# The sources.


def test_mnist_is_padded_with_black(make_loader):
    source = sources.make_source('mnist', image_size=32, channels=1)
    assert len(source) == 5000 and source.image_shape == (32, 32, 1)
    assert source.num_classes == 10 and source.class_names[7] == '7'
    np.testing.assert_array_equal(np.bincount(source.labels), [500] * 10)
    border = np.ones((32, 32), bool)
    border[2:-2, 2:-2] = False
    assert not source.images[:, border].any() and source.images[:, 2:-2].any()
    record = source[7]
    assert record['image'].dtype == np.uint8 and record['label'].dtype == np.int32
    pool = next(make_loader(source))
    assert pool.images.min() == -1 and pool.images.max() == 1
    unpadded = sources.make_source('mnist', image_size=28, channels=1)
    np.testing.assert_array_equal(unpadded.images, source.images[:, 2:-2, 2:-2])
    assert repr(source) != repr(unpadded)
    small = sources.make_source('mnist', image_size=16, channels=1)
    quarters = [source.images[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    mean = np.mean(quarters, axis=0)  # Of 2x2 pixels of the padded image.
    assert np.abs(small.images - mean).max() <= 0.5


def test_array_source_refuses_what_does_not_fit():
    images = np.zeros((3, 4, 4, 1), np.uint8)
    with pytest.raises(ValueError, match=r"'x': image 1 has label 2.*0 \.\. 1"):
        sources.ArraySource('x', images, np.array([0, 2, 1]), ['a', 'b'])
    with pytest.raises(ValueError, match='float32'):
        sources.ArraySource('x', images.astype(np.float32), np.zeros(3, int), ['a'])
    with pytest.raises(ValueError, match="'x' has no images"):
        sources.ArraySource('x', images[:0], np.zeros(0, int), ['a'])


def test_array_source_is_known_by_its_content():
    images = np.zeros((3, 4, 4, 1), np.uint8)
    first = repr(sources.ArraySource('x', images, np.zeros(3, int), ['a', 'b']))
    assert first == repr(sources.ArraySource('x', images, np.zeros(3, int), ['a', 'b']))
    assert first != repr(sources.ArraySource('x', images, np.ones(3, int), ['a', 'b']))
    images[0, 0, 0] = 1
    assert first != repr(sources.ArraySource('x', images, np.zeros(3, int), ['a', 'b']))


@pytest.mark.parametrize(
    'name,options,message',
    [
        ('minst', {}, "'minst' is unknown .did you mean 'mnist'.*'folder:PATH'"),
        ('Fashion-MNIST', {}, "did you mean 'fashion_mnist'"),
        ('foldr:/x', {}, "did you mean 'folder:PATH'"),
        ('xyz', {}, r"'xyz' is unknown; choose 'mnist'"),
        ('mnist:x', {}, "'mnist:x' is unknown"),
        ('folder:', {}, "'folder:' lacks what follows"),
        ('tfds', {}, "'tfds' lacks what follows"),
        ('mnist', dict(channels=3), 'set data.channels = 1'),
        ('mnist', dict(image_size=20), 'data.image_size = 20.*choose 14, 16, 28, 32'),
        ('mnist', dict(image_size=33), 'data.image_size = 33'),
        ('mnist', dict(image_size=0), 'data.image_size = 0'),
        ('mnist', dict(split='test'), "split = 'test'.*only 'train'"),
        ('mnist', dict(on_corrupt='ignore'), "data.on_corrupt = 'ignore'.*'skip'"),
        ('fashion_mnist', dict(split='dev'), "'dev'.*'train' or 'test'"),
        ('folder:/x', dict(channels=4), 'data.channels = 4.*1 .grey. or 3'),
        ('tfds:x', dict(channels=2), 'data.channels = 2'),
    ],
)
def test_bad_names_and_sizes(name, options, message):
    with pytest.raises(ValueError, match=message):
        sources.make_source(name, **dict(image_size=32, channels=1) | options)


def _write_idx(path, array, compress=True):
    header = struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if compress else content)


@pytest.fixture
def fashion(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    for prefix, part in (('train', images[:3]), ('t10k', images[3:])):
        _write_idx(tmp_path / f'{prefix}-images-idx3-ubyte.gz', part)
    # A file that was unpacked is as good.
    labels = np.array([3, 9, 0], np.uint8)
    _write_idx(tmp_path / 'train-labels-idx1-ubyte', labels, compress=False)
    _write_idx(tmp_path / 't10k-labels-idx1-ubyte.gz', np.array([1, 2], np.uint8))
    return tmp_path, images


def _open_fashion(path, **options):
    options = dict(image_size=32, channels=1, data_dir=str(path)) | options
    return sources.make_source('fashion_mnist', **options)


def test_fashion_mnist_files(fashion):
    path, images = fashion
    source, test = _open_fashion(path), _open_fashion(path, split='test')
    assert len(source) == 3 and len(test) == 2 and source.image_shape == (32, 32, 1)
    np.testing.assert_array_equal(source[1]['image'][2:-2, 2:-2, 0], images[1])
    np.testing.assert_array_equal(test[0]['image'][2:-2, 2:-2, 0], images[3])
    assert source[1]['label'] == 9 and source.class_names[9] == 'ankle boot'
    assert test[1]['label'] == 2 and repr(source) != repr(test)


def test_broken_fashion_mnist_files(fashion):
    path, _ = fashion
    file = path / 'train-images-idx3-ubyte.gz'
    content = file.read_bytes()
    for broken in (content[:-20], b'not gzip', gzip.compress(b'nothing'), b''):
        file.write_bytes(broken)
        with pytest.raises(sources.CorruptImageError, match='idx3.*fetch it again'):
            _open_fashion(path)
    file.write_bytes(content)
    _write_idx(path / 'train-labels-idx1-ubyte', np.array([3, 10, 0], np.uint8), False)
    with pytest.raises(ValueError, match='image 1 has label 10'):
        _open_fashion(path)
    with pytest.raises(
        ValueError, match=r'none.*`apt-get install dataset-fashion-mnist`.*tfds:'
    ):
        _open_fashion(path / 'none')


@pytest.mark.skipif(
    not Path(sources.FASHION_MNIST_DIR).is_dir(),
    reason="Debian's package dataset-fashion-mnist is not installed",
)
def test_fashion_mnist_of_debian():
    source = _open_fashion('', split='test')
    np.testing.assert_array_equal(np.bincount(source.labels), [1000] * 10)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / 'animals'
    for name in ('dogs', 'cats'):
        (path / name).mkdir(parents=True)
        for i in range(3):
            array = rng.integers(0, 255, (20 + i, 30, 3), np.uint8)
            Image.fromarray(array).save(path / name / f'{i}.png')
    return path


def _folder(path, **options):
    options = dict(image_size=16, channels=3) | options
    return sources.make_source(f'folder:{path}', **options)


def test_folder_of_classes(folder):
    source = _folder(folder)
    assert source.class_names == ('cats', 'dogs') and source.num_classes == 2
    assert [int(source[i]['label']) for i in range(len(source))] == [0, 0, 0, 1, 1, 1]
    image = source[4]['image']
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    own = sources.center_crop(Image.open(folder / 'dogs' / '1.png'), 16, 3)
    np.testing.assert_array_equal(image, own)
    assert _folder(folder, channels=1)[0]['image'].shape == (16, 16, 1)
    assert len(list(source)) == 6  # It has an end.


def test_order_does_not_depend_on_the_file_system(folder, monkeypatch):
    scan, iterate = os.scandir, Path.iterdir

    def backwards(path):
        with scan(path) as entries:
            found = sorted(entries, key=lambda entry: entry.name, reverse=True)
        return contextlib.nullcontext(found)

    usual = _folder(folder)
    monkeypatch.setattr(os, 'scandir', backwards)
    monkeypatch.setattr(Path, 'iterdir', lambda p: sorted(iterate(p), reverse=True))
    source = _folder(folder)
    assert source.class_names == ('cats', 'dogs') and repr(source) == repr(usual)
    for index in range(6):
        np.testing.assert_array_equal(source[index]['image'], usual[index]['image'])


def test_folder_formats_subfolders_and_hidden_files(folder):
    cats = folder / 'cats'
    Image.new('RGB', (16, 16), (200, 0, 0)).save(cats / 'a.WEBP', lossless=True)
    Image.new('RGB', (16, 16), (0, 0, 200)).save(cats / 'b.jpeg')
    (folder / 'dogs' / 'more').mkdir()
    Image.new('L', (16, 16), 77).save(folder / 'dogs' / 'more' / 'c.bmp')
    for name in ('cats/._a.png', 'dogs/notes.txt', '.thumbnails/x.png', 'README.txt'):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('no image')
    source = _folder(folder)
    assert source.class_names == ('cats', 'dogs') and len(source) == 9
    assert (source[3]['image'] == (200, 0, 0)).all()
    assert (abs(source[4]['image'].astype(int) - (0, 0, 200)) < 4).all()
    assert (source[8]['image'] == 77).all() and source[8]['label'] == 1


def test_links_and_pipes_in_a_folder(folder, tmp_path):
    """Of files that are none, an image is waited for for ever; of loops, none ends."""
    os.mkfifo(folder / 'cats' / '9.png')
    (tmp_path / 'elsewhere').mkdir()
    (folder / 'cats' / '0.png').rename(tmp_path / 'elsewhere' / '0.png')
    (folder / 'cats' / 'linked').symlink_to(tmp_path / 'elsewhere')
    assert len(_folder(folder)) == 6
    (folder / 'cats' / 'loop').symlink_to(folder / 'cats')
    with pytest.raises(ValueError, match='loop is a link to .*cats, which it lies in'):
        _folder(folder)


def test_extreme_sides(folder):
    Image.new('L', (1, 20_000), 200).save(folder / 'cats' / '0.png')
    image = _folder(folder)[0]['image']
    assert image.shape == (16, 16, 3) and (image == 200).all()


def test_names_do_not_command_the_terminal(folder, capsys):
    hostile = folder / 'cats' / '\x1b[2J\r.png'
    hostile.write_bytes(b'')
    source = _folder(folder, on_corrupt='skip')
    source[0]
    (reason,) = source.skipped.reasons.values()
    assert '\x1b' not in reason and '\\x1b[2J\\r.png cannot be read' in reason


def test_folder_is_known_by_its_files_and_sizes(folder):
    before = repr(_folder(folder))
    assert before == repr(_folder(folder, on_corrupt='skip'))
    assert before != repr(_folder(folder, image_size=8))
    (folder / 'cats' / '0.png').rename(folder / 'cats' / '9.png')
    renamed = repr(_folder(folder))
    Image.new('L', (40, 40)).save(folder / 'cats' / '9.png')
    assert len({before, renamed, repr(_folder(folder))}) == 3


def test_transparency_shows_white(folder):
    paths = [folder / 'cats' / f'{i}.png' for i in range(3)]
    Image.new('RGBA', (16, 16), (0, 0, 0, 0)).save(paths[0])
    palette = Image.new('P', (16, 16), 0)
    palette.putpalette([10, 20, 30])
    palette.save(paths[1], transparency=0)
    Image.new('LA', (16, 16), (0, 128)).save(paths[2])
    source = _folder(folder)
    assert (source[0]['image'] == 255).all() and (source[1]['image'] == 255).all()
    assert (abs(source[2]['image'].astype(int) - 127) <= 1).all()


def test_sixteen_bits_are_scaled_not_clipped(folder):
    values = (np.arange(256, dtype=np.uint16).reshape(16, 16) << 8) + 5
    Image.fromarray(values).save(folder / 'cats' / '0.png')
    grey = _folder(folder, channels=1)[0]['image'][..., 0]
    np.testing.assert_array_equal(grey, np.arange(256).reshape(16, 16))
    Image.fromarray(np.ones((16, 16), np.float32)).save(folder / 'cats' / '0.tiff')
    with pytest.raises(sources.CorruptImageError, match=r"0\.tiff.*mode 'F'"):
        _folder(folder)[1]


def test_center_crop_halves_by_means_of_blocks():
    array = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    means = array.reshape(16, 4, 16, 4).mean((1, 3))
    crop = sources.center_crop(Image.fromarray(array), 16, 1)[..., 0]
    # Two halvings, each rounding after the rows and after the columns. Other filters
    # are off by 20 and more at white noise.
    assert abs(crop - means).max() <= 4 * 0.5


def test_center_crop_keeps_the_middle_of_the_longer_side():
    array = np.zeros((64, 128, 3), np.uint8)
    array[:, 32:96] = 200
    array[:, 96:] = 90
    image = Image.fromarray(array)
    assert (sources.center_crop(image, 64, 3) == 200).all()
    upright = image.transpose(Image.Transpose.ROTATE_90)
    assert (sources.center_crop(upright, 64, 3) == 200).all()
    # Neither a multiple nor larger: bicubic, up as well as down.
    for size in (100, 50, 33):
        crop = sources.center_crop(image, size, 3)
        assert crop.shape == (size, size, 3)
        assert (crop[:, size // 4 : -size // 4] == 200).all()


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack('>I', zlib.crc32(kind + content))
    return struct.pack('>I', len(content)) + kind + content + checksum


def _bomb() -> bytes:
    """A PNG file of a few bytes that says it is 60,000 pixels wide and high."""
    header = struct.pack('>IIBBBBB', 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = _chunk(b'IHDR', header) + _chunk(b'IDAT', zlib.compress(bytes(1000)))
    return b'\x89PNG\r\n\x1a\n' + chunks + _chunk(b'IEND', b'')


def _text_bomb(whole: bytes) -> bytes:
    """A PNG file with a comment of 200 MB, compressed."""
    text = b'Comment\0\0' + zlib.compress(bytes(200 * 2**20), 9)
    return whole[:33] + _chunk(b'zTXt', text) + whole[33:]


@pytest.fixture(params=['png', 'jpeg', 'garbage', 'empty', 'bomb', 'text bomb'])
def corrupt(request, folder):
    path = folder / 'cats' / '1.png'
    if request.param == 'jpeg':
        path.unlink()
        path = folder / 'cats' / '1.jpg'
        noise = np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path, quality=95)
    content = path.read_bytes()
    half = content[: len(content) // 2]
    hostile = {'bomb': _bomb(), 'garbage': b'garbage', 'empty': b''}
    if request.param == 'text bomb':
        hostile[request.param] = _text_bomb(content)
    path.write_bytes(hostile.get(request.param, half))
    return folder, path


def test_corrupt_image_is_an_error_that_names_it(corrupt, make_loader):
    folder, path = corrupt
    source = _folder(folder)
    with pytest.raises(sources.CorruptImageError) as caught:
        source[1]
    message = str(caught.value)
    assert str(path) in message and "data.on_corrupt = 'skip'" in message
    with pytest.raises(sources.CorruptImageError, match=path.name):
        next(make_loader(source, batches=1, batch_size=6))
    assert len(source.skipped) == 0


def test_corrupt_image_is_skipped_and_counted_once(corrupt, make_loader):
    folder, path = corrupt
    loader = make_loader(_folder(folder, on_corrupt='skip'), batches=2, batch_size=6)
    assert loader.skipped == 0
    pools = _take(loader, 3)
    assert loader.skipped == 1
    assert list(loader.source.skipped.reasons) == [str(path)]
    np.testing.assert_array_equal(loader.source[1]['image'], loader.source[2]['image'])
    again = make_loader(_folder(folder, on_corrupt='skip'), batches=2, batch_size=6)
    again.seek(2)
    np.testing.assert_array_equal(next(again).images, pools[2].images)


def test_replacement_brings_its_own_label(folder):
    (folder / 'cats' / '2.png').write_bytes(b'garbage')
    (folder / 'dogs' / '2.png').write_bytes(b'garbage')
    source = _folder(folder, on_corrupt='skip')
    for index, replacement in ((2, 3), (5, 0)):
        np.testing.assert_array_equal(
            source[index]['image'], source[replacement]['image']
        )
        assert source[index]['label'] == source[replacement]['label']


def test_skipping_has_an_end(folder, monkeypatch):
    for path in folder.glob('*/*.png'):
        path.write_bytes(b'garbage')
    source = _folder(folder, on_corrupt='skip')
    with pytest.raises(sources.CorruptImageError, match='6 images in a row.*animals'):
        source[0]
    monkeypatch.setattr(sources, 'MAX_SKIPPED_IN_ROW', 2)
    with pytest.raises(sources.CorruptImageError, match='2 images in a row'):
        source[0]


def test_skipped_files_are_counted_beyond_those_listed():
    skipped = sources.Skipped()
    for index in (*range(250), *range(250)):
        skipped.add(index, f'{index}.png', 'broken')
    assert len(skipped) == 250
    assert list(skipped.reasons) == [f'{i}.png' for i in range(100)]


def test_unreachable_file_is_not_skipped(folder):
    source = _folder(folder, on_corrupt='skip')
    (folder / 'cats' / '1.png').unlink()
    with pytest.raises(FileNotFoundError, match=r'data\.source.*1\.png'):
        source[1]
    assert len(source.skipped) == 0


def test_folders_that_are_no_data_set(folder, tmp_path):
    with pytest.raises(ValueError, match='nothing is not a folder'):
        _folder(folder / 'nothing')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='empty has no subfolders'):
        _folder(tmp_path / 'empty')
    with pytest.raises(ValueError, match=r'cats/0\.png lies in no class .3 such'):
        _folder(folder / 'cats')
    (folder / 'fish').mkdir()
    with pytest.raises(ValueError, match='fish holds no images'):
        _folder(folder)
    (folder / 'fish').rmdir()
    Image.new('L', (8, 8)).save(folder / 'stray.png')
    with pytest.raises(ValueError, match=r'stray\.png lies in no class'):
        _folder(folder)


# TFDS.


def _png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, 'PNG')
    file.seek(0)
    return file


def _write_small_mnist(root):
    import tensorflow_datasets as tfds

    features = {
        'image': tfds.features.Image(shape=(28, 28, 1)),
        'label': tfds.features.ClassLabel(num_classes=10),
    }
    splits = {
        split: [
            {'image': _png(np.full((28, 28), 20 * i + extra, np.uint8)), 'label': i}
            for i in range(10)
        ]
        for split, extra in (('train', 10), ('test', 11))
    }
    write_tfds(root, 'mnist', '3.0.1', features, splits)


def _tfds(name, root, **options):
    options = dict(image_size=32, channels=1, data_dir=str(root)) | options
    return sources.make_source(f'tfds:{name}', **options)


def test_tfds_by_name(tmp_path, make_loader):
    _write_small_mnist(tmp_path)
    source, test = _tfds('mnist', tmp_path), _tfds('mnist', tmp_path, split='test')
    assert len(source) == len(test) == 10 and source.class_names == tuple('0123456789')
    for index in range(10):
        record = source[index]
        image = record['image']
        assert image.dtype == np.uint8 and record['label'].dtype == np.int32
        # Padded, not scaled, as the other sources of digits are.
        expected = np.zeros((32, 32, 1))
        expected[2:-2, 2:-2] = 20 * int(record['label']) + 10
        np.testing.assert_array_equal(image, expected)
    assert test[0]['image'].max() % 20 == 11
    assert repr(source) == repr(_tfds('mnist', tmp_path)) != repr(test)
    pool = next(make_loader(source, batches=1, batch_size=10))
    centre = np.rint((pool.images[0, :, 16, 16, 0] + 1) * 127.5)
    np.testing.assert_array_equal(centre, 20 * pool.labels[0] + 10)
    assert sorted(pool.labels[0]) == list(range(10))


def test_tfds_features_are_found_and_images_cropped(tmp_path):
    import tensorflow_datasets as tfds

    array = np.zeros((40, 80, 3), np.uint8)
    array[:, 20:60] = (50, 100, 150)
    features = {
        'picture': tfds.features.Image(shape=(None, None, 3)),
        'coarse': tfds.features.ClassLabel(names=['a']),
        'fine': tfds.features.ClassLabel(names=['x', 'y']),
        'id': tfds.features.Text(),
    }
    example = {'picture': _png(array), 'coarse': 0, 'fine': 1, 'id': 'n'}
    write_tfds(tmp_path, 'photos', '1.0.0', features, {'train': [example]})
    source = _tfds('photos', tmp_path, channels=3, image_size=20)
    record = source[0]
    assert (record['image'] == (50, 100, 150)).all() and record['label'] == 1
    assert source.class_names == ('x', 'y') and record['image'].shape == (20, 20, 3)


@pytest.mark.parametrize('case', ['no label', 'two images', 'sixteen bits'])
def test_tfds_data_sets_that_do_not_fit(tmp_path, case):
    import tensorflow_datasets as tfds

    image = tfds.features.Image(shape=(8, 8, 1))
    label = tfds.features.ClassLabel(names=['a'])
    deep = tfds.features.Image(shape=(8, 8, 1), dtype=np.uint16, encoding_format='png')
    features, message = {
        'no label': (
            dict(image=image),
            r"0 features of type ClassLabel among \['image'\]",
        ),
        'two images': (
            dict(left=image, right=image, label=label),
            r"2 features of type Image among \['label', 'left', 'right'\]",
        ),
        'sixteen bits': (dict(image=deep, label=label), 'uint16, but uint8'),
    }[case]
    png = np.zeros((8, 8), np.uint16 if case == 'sixteen bits' else np.uint8)
    example = {k: 0 if k == 'label' else _png(png) for k in features}
    write_tfds(tmp_path, 'odd', '1.0.0', features, {'train': [example]})
    with pytest.raises(ValueError, match='tfds:odd.*' + message):
        _tfds('odd', tmp_path)


def test_tfds_errors_name_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="tfds:cifar1000.*did you mean 'cifar10"):
        _tfds('cifar1000', tmp_path)
    _write_small_mnist(tmp_path)
    with pytest.raises(ValueError, match="split = 'dev' of .*tfds:mnist.*train"):
        _tfds('mnist', tmp_path, split='dev')


def test_tfds_is_prepared_by_another_process(tmp_path, monkeypatch):
    commands = []

    def run(command):
        commands.append(command)
        failed = len(commands) == 1
        if not failed:
            _write_small_mnist(tmp_path)
        return subprocess.CompletedProcess(command, int(failed))

    monkeypatch.setattr(sources.subprocess, 'run', run)
    with pytest.raises(ValueError, match='could not be prepared.*tfds build.*mnist'):
        _tfds('mnist', tmp_path)
    assert len(_tfds('mnist', tmp_path)) == 10
    assert len(_tfds('mnist', tmp_path)) == 10  # No third command.
    assert len(commands) == 2
    assert commands[0][0] == sys.executable
    assert commands[0][-2:] == ['mnist', str(tmp_path)]
    assert 'download_and_prepare' in commands[0][-3]


READ_ALL = """
import sys
from ism_jax.data import pipeline, sources
for name in ('mnist', 'folder:' + sys.argv[1], 'tfds:mnist'):
    source = sources.make_source(name, image_size=32, channels=1, data_dir=sys.argv[2])
    loader = pipeline.PoolLoader(source, batches=2, batch_size=4, seed=0, flip=True)
    for pool, _ in zip(loader, range(3)):
        assert pool.images.shape == (2, 4, 32, 32, 1)
    loader.close()
    print(name, [m for m in sys.modules if m.split('.')[0] == 'tensorflow'])
"""


def test_reading_never_imports_tensorflow(folder, tmp_path):
    _write_small_mnist(tmp_path / 'tfds')
    result = subprocess.run(
        [sys.executable, '-c', READ_ALL, str(folder), str(tmp_path / 'tfds')],
        capture_output=True, text=True, timeout=120,
        env=os.environ | {'PYTHONPATH': str(Path(sources.__file__).parents[2])},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and all(line.endswith(' []') for line in lines), lines
