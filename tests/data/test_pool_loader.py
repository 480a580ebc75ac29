"""The pool loader: order, flips, resume, threads, errors."""

import itertools
import json
import threading
import time

import numpy as np
import pytest

from ism_jax.data import array_source, pool_loader
from ism_jax.data.source import Source


def _source(size=40, side=4, classes=4):
    """Images whose pixel (0, 0) is their own index."""
    images = np.zeros((size, side, side, 1), np.uint8)
    images[:, 0, 0, 0] = images[:, 0, -1, 0] = np.arange(size)
    names = [str(c) for c in range(classes)]
    return array_source.ArraySource('indexed', images, np.arange(size) % classes, names)


def _indices(pool):
    return np.rint((pool.images[..., 0, 0, 0] + 1) * 127.5).astype(int)


@pytest.fixture
def make_loader(make_loader):
    return lambda source=None, **options: make_loader(source or _source(), **options)


def _take(loader, count):
    return list(itertools.islice(loader, count))


def test_shapes_and_types_of_pools(make_loader):
    pools = _take(make_loader(process_index=1, process_count=2), 3)
    assert [pool.number for pool in pools] == [0, 1, 2]
    for pool in pools:
        assert pool.images.shape == (2, 4, 4, 4, 1) and pool.images.dtype == np.float32
        assert pool.labels.shape == (2, 4) and pool.labels.dtype == np.int32
        np.testing.assert_array_equal(pool.labels, _indices(pool) % 4)


def test_pixels_are_mapped_exactly_to_minus_one_to_one(make_loader):
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    source = array_source.ArraySource('all values', images, np.zeros(1, int), ['a'])
    values = next(make_loader(source, batches=1, batch_size=1)).images.ravel()
    assert values[0] == -1 and values[255] == 1
    np.testing.assert_allclose(values, np.linspace(-1, 1, 256), atol=1e-7)
    # Writing images recovers the bytes.
    np.testing.assert_array_equal(np.rint((values + 1) * 127.5), np.arange(256))


@pytest.mark.parametrize('batches,batch_size', [(5, 8), (3, 8), (1, 16), (4, 32)])
def test_every_image_once_per_epoch(make_loader, batches, batch_size):
    pools = _take(make_loader(batches=batches, batch_size=batch_size), 6)
    stream = np.concatenate([_indices(pool).ravel() for pool in pools])
    epochs = [stream[start : start + 40] for start in range(0, len(stream) - 39, 40)]
    assert len(epochs) >= 2
    for epoch in epochs:
        assert sorted(epoch) == list(range(40))
    # The remainder is unique, too.
    rest = stream[len(epochs) * 40 :]
    assert len(set(rest)) == len(rest)


def test_each_epoch_and_seed_has_its_own_order(make_loader):
    orders = {
        tuple(_indices(pool).ravel())
        for seed in range(4)
        for pool in _take(make_loader(batches=5, seed=seed), 5)
    }
    # Each pool is an epoch. Epoch e of seed s differs from epoch e + 1 of seed s - 1.
    assert len(orders) == 20
    again = _take(make_loader(batches=5, seed=2), 5)
    assert all(tuple(_indices(pool).ravel()) in orders for pool in again)


def test_order_is_a_uniform_permutation():
    firsts = [pool_loader._permutation(seed, 0, 5)[0] for seed in range(2000)]
    # 400 expected of each; 5 standard deviations are 90.
    assert (abs(np.bincount(firsts, minlength=5) - 400) < 90).all()


@pytest.mark.parametrize(
    'classes_per_pool,expected',
    [
        (0, [[3, 0, 9, 7, 8, 3, 5, 6, 4, 0], [10, 2, 1, 11, 11, 8, 2, 4, 10, 1]]),
        (2, [[5, 2, 2, 5, 10, 1, 4, 11, 7, 8], [3, 8, 3, 0, 11, 2, 6, 6, 9, 5]]),
    ],
)
def test_order_and_flips_are_those_of_earlier_versions(
    make_loader, classes_per_pool, expected
):
    """A checkpoint stores a position in this order."""
    images = np.full((12, 1, 2, 1), 100, np.uint8)
    images[:, 0, 0, 0] = np.arange(12)
    source = array_source.ArraySource('x', images, np.arange(12) % 3, ['a', 'b', 'c'])
    loader = make_loader(
        source, batch_size=5, flip=True, classes_per_pool=classes_per_pool
    )
    loader.seek(1)
    flips = [[1, 1, 1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0, 1, 1]]
    for pool, indices, flipped in zip(_take(loader, 2), expected, flips, strict=True):
        pixels = np.rint((pool.images.reshape(10, 2) + 1) * 127.5)
        np.testing.assert_array_equal(pixels.min(-1), indices)
        np.testing.assert_array_equal(pixels[:, 0] == 100, flipped)
        np.testing.assert_array_equal(pool.labels.ravel(), np.array(indices) % 3)


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
    for pool, *shards in zip(whole, *parts, strict=True):
        assert all(shard.images.shape[1] == 8 // count for shard in shards)
        for name in ('images', 'labels'):
            joined = np.concatenate([getattr(s, name) for s in shards], axis=1)
            np.testing.assert_array_equal(joined, getattr(pool, name))


def _flippable(size):
    """Images that differ from their mirror image and from each other."""
    images = np.random.default_rng(0).integers(0, 256, (size, 4, 4, 1), np.uint8)
    return array_source.ArraySource('random', images, np.arange(size) % 2, ['a', 'b'])


def test_each_epoch_flips_a_different_half_of_the_images(make_loader):
    source = _flippable(200)
    loader = make_loader(source, batches=10, batch_size=20, flip=True, seed=1)
    plain = make_loader(source, batches=10, batch_size=20, flip=False, seed=1)
    flips = []
    for pool, original in zip(_take(loader, 4), _take(plain, 4), strict=True):
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
    # 50 is not a multiple of the 16 of a pool, so most pools begin within an epoch.
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
        next(resumed)  # It has read another pool.
        resumed.set_state(state)
        rows = slice(rank * 8 // count, (rank + 1) * 8 // count)
        for expected, pool in zip(pools[stop:], _take(resumed, 3), strict=True):
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


class _Pairing:
    """Chooses images of the given classes, of four; remembers its calls."""

    def __init__(self):
        self.calls = {}

    def __repr__(self):
        return 'Pairing(by number)'

    def __call__(self, number, labels, flip):
        assert number not in self.calls, 'a pool is paired twice'
        self.calls[number] = labels, flip
        return self.choose(number, labels)

    def choose(self, number, labels):
        return labels + 4 * ((number + np.arange(len(labels))) % 10)


@pytest.mark.parametrize('count', [1, 2])
def test_a_pairing_chooses_the_images(make_loader, count):
    images = _flippable(40).images
    source = array_source.ArraySource('random', images, np.arange(40) % 4, 'abcd')
    in_order = _take(make_loader(source, flip=True), 4)
    for rank in range(count):
        pairing = _Pairing()
        loader = make_loader(
            source, flip=True, process_index=rank, process_count=count, pairing=pairing
        )
        rows = slice(rank * 8 // count, (rank + 1) * 8 // count)
        for number, pool in enumerate(_take(loader, 4)):
            labels, flip = pairing.calls[number]
            # The order of the data gives the labels, of all processes.
            np.testing.assert_array_equal(labels, in_order[number].labels.ravel())
            chosen = images[pairing.choose(number, labels)]
            chosen[flip] = chosen[flip, :, ::-1]
            chosen = chosen.reshape(2, 8, 4, 4, 1)[:, rows]
            np.testing.assert_array_equal(
                np.rint((pool.images + 1) * 127.5).astype(np.uint8), chosen
            )
            np.testing.assert_array_equal(
                pool.labels, labels.reshape(2, 8).astype(np.int32)[:, rows]
            )


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(pairing=_Pairing()), 'pairing: .None. -> .Pairing.by number'),
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
    with pytest.raises(ValueError, match='next_pool: None -> 0'):
        make_loader().set_state(state)


class _Recorder(Source):
    """Counts reads and fails at the index `failing`."""

    image_shape, class_names, skipped = (4, 4, 1), ('a', 'b'), ()

    def __init__(self):
        self.failing = None
        self.reads = 0
        self.threads = set()

    def __len__(self):
        return 64

    def __getitem__(self, index):
        self.reads += 1
        self.threads.add(threading.current_thread())
        if index == self.failing:
            raise OSError(5, 'Input/output error', f'{index}.png')
        return {'image': np.zeros((4, 4, 1), np.uint8), 'label': 0}


def _wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_pools_are_read_ahead_by_threads_up_to_the_prefetch(make_loader):
    source = _Recorder()
    loader = make_loader(source, prefetch=3, num_threads=2)
    assert source.reads == 0  # `set_state` may follow.
    next(loader)
    assert _wait_until(lambda: source.reads >= 4 * 16)
    time.sleep(0.1)
    # Grain refills when a batch is taken, so one more may be in progress.
    assert source.reads <= 4 * 16 + 8
    assert threading.current_thread() not in source.threads


def test_close_ends_the_reading(make_loader):
    source = _Recorder()
    loader = make_loader(source)
    next(loader)
    loader.close()
    _wait_until(lambda: not any(thread.is_alive() for thread in source.threads))
    assert not any(thread.is_alive() for thread in source.threads)
    reads = source.reads
    time.sleep(0.1)
    assert source.reads == reads
    loader.close()  # A second time does nothing.


def test_error_of_a_thread_is_raised_and_the_pool_is_read_again(make_loader):
    source = _Recorder()
    source.failing = int(pool_loader._permutation(3, 0, 64)[20])  # In pool 1.
    loader = make_loader(source)
    assert next(loader).number == 0
    for _ in range(2):
        with pytest.raises(OSError, match=f'{source.failing}.png'):
            next(loader)
    assert loader.get_state()['next_pool'] == 1
    source.failing = None
    assert next(loader).number == 1


def _large_source(size, classes):
    """Images whose upper two pixels are the digits of their index in base 256."""
    images = np.zeros((size, 2, 2, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(size) // 256
    images[:, 0, 1, 0] = np.arange(size) % 256
    labels = np.random.default_rng(1).integers(0, classes, size)
    names = [str(c) for c in range(classes)]
    return array_source.ArraySource('indexed', images, labels, names)


def _large_indices(pool):
    pixels = np.rint((pool.images + 1) * 127.5).astype(int)
    return pixels[..., 0, 0, 0] * 256 + pixels[..., 0, 1, 0]


def test_grouped_pools_hold_few_classes_and_every_image(make_loader):
    source = _large_source(3000, classes=50)
    options = dict(batches=8, batch_size=32)
    grouped = _take(make_loader(source, classes_per_pool=8, **options), 24)
    plain = _take(make_loader(source, **options), 24)
    stream = np.concatenate([_large_indices(pool).ravel() for pool in grouped])
    for epoch in (stream[:3000], stream[3000:6000]):
        # A pool may straddle two epochs, and its images are shuffled.
        assert len(np.intersect1d(epoch, np.arange(3000))) >= 3000 - 256
    assert (np.bincount(stream[: 256 * 23]) >= 1).all()
    assert np.bincount(stream, minlength=3000).max() <= 3

    def largest(pool):
        return np.sort(np.bincount(pool.labels.ravel(), minlength=50))[::-1]

    # Chunks of 32, and the remainder of a class.
    assert np.mean([(largest(p) >= 25).sum() for p in grouped]) > 5
    assert max((largest(p) >= 25).sum() for p in plain) == 0
    for pool in grouped[:4]:
        np.testing.assert_array_equal(
            pool.labels.ravel(), source.labels[_large_indices(pool).ravel()]
        )
        # The batches hold similar shares of the pool's classes.
        counts = np.stack([np.bincount(row, minlength=50) for row in pool.labels])
        assert counts.max() <= 14  # 4 expected of a chunk of 32.
    orders = {tuple(_large_indices(pool).ravel()) for pool in grouped}
    assert len(orders) == 24
