"""Pools of batches from a source, read through Grain.

Training reads pools of K batches of M examples; transport couples a whole pool. Pool p
is a function of (seed, p) alone. It holds the positions p K M .. (p + 1) K M - 1 of an
endless stream of epochs, each a new permutation of the data. So a run resumes at any
step, with any number of processes.
"""

from collections.abc import Callable
import functools
import threading
import time
from typing import Any, NamedTuple

from absl import logging
import chex
import grain
import numpy as np

from ism_jax.data import pixels
from ism_jax.data import source as source_lib

# Keys of the random streams other than the epochs 0, 1, ...
_FLIPS, _POSTERIORS, _CHUNKS, _WITHIN_POOLS = (2**64 - n for n in range(1, 5))
# Grain needs a length; no run reaches this one.
_END = 2**60
_COINS_PER_BLOCK = 2**12
# Seconds between two attempts to read an image; doubled after each.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0


class HostPool(NamedTuple):
    """This process's part of a pool.

    Attributes:
      images: [K, M / processes, H, W, C] float32: images in [-1, 1], or latents.
      labels: [K, M / processes] int32.
      number: the pool's number in the run.
    """

    images: np.ndarray
    labels: np.ndarray
    number: int


class PoolLoader:
    """Endless iterator over `HostPool`s, which background threads read ahead.

    Each image is used once per epoch. An epoch may end within a pool, and a pool may
    hold several epochs of a small source. Each epoch draws new posterior samples of
    latents.

    Grain maps, batches and prefetches, but does not shuffle. Its shuffle has another
    order, which would break the resuming of earlier runs, and takes 9 us per index; our
    permutation of 1.28 million images takes 0.1 us per index.

    Args:
      source: see `ism_jax.data.source`.
      batches: K, the batches of a pool.
      batch_size: M, over all processes.
      seed: seed of the order, the flips and the posterior samples.
      flip: mirror each image horizontally with probability 1/2, independently in each
        epoch.
      classes_per_pool: about this many classes share a pool, each with about
        K M / classes_per_pool images, so that transport within a class has candidates;
        0 shuffles freely. The pool is still split into batches at random. Needs
        `source.labels`.
      pairing: chooses the images of a pool for its noise: `pairing(number, labels,
        flip)` returns indices [K M] of images of the given classes [K M]. The order of
        the data then only determines the labels. Needs `source.labels`; its `repr`
        identifies it. None for the images in order.
      process_index: this process holds the `process_index`-th part of each batch.
      process_count: number of equal parts of consecutive rows.
      num_threads: reading threads; each reads one batch at a time.
      prefetch: pools that are read ahead. Images wait as uint8.
      retry_seconds: how long to retry an image that the file system cannot read.

    Attributes:
      retries: attempts that failed and were repeated.
    """

    def __init__(
        self,
        source: source_lib.Source,
        *,
        batches: int,
        batch_size: int,
        seed: int,
        flip: bool = False,
        classes_per_pool: int = 0,
        pairing: Callable[[int, np.ndarray, np.ndarray], np.ndarray] | None = None,
        process_index: int = 0,
        process_count: int = 1,
        num_threads: int = 2,
        prefetch: int = 2,
        retry_seconds: float = 0.0,
    ):
        self.source = source
        self.retries = 0
        self._size = len(source)
        self._retry_seconds = retry_seconds
        self.batches = batches
        self._batch_size = batch_size
        self._rows = batch_size // process_count
        self._first_row = process_index * self._rows
        self._seed = seed
        self._flip = flip
        self._classes_per_pool = classes_per_pool
        self._pairing = pairing
        self._read_options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=prefetch * batches
        )
        # Keeps as many epochs and pools as the threads may read from at once.
        epochs = num_threads * batch_size // self._size + 2
        self._order = functools.lru_cache(epochs)(self._order)
        pools = num_threads // batches + 2
        self._deal = functools.lru_cache(pools)(self._deal)
        self._paired = functools.lru_cache(pools)(self._paired)
        self._pairing_lock = threading.Lock()
        self._next_pool = 0
        # Opened by the first `next`, so that a `seek` before it reads nothing unused.
        self._iterator = None
        self._closed = False

    @property
    def skipped(self) -> int:
        """Images that this process could not read and replaced; each counts once.

        `source.skipped.reasons` names the first of them.
        """
        return len(self.source.skipped)

    def __iter__(self):
        return self

    def __next__(self) -> HostPool:
        """The next pool.

        Raises:
          Exception: any error of the source. The position stays: the next call reads
            the same pool again.
        """
        if self._iterator is None:
            first = self._next_pool * self.batches * self._rows
            dataset = grain.MapDataset.range(first, _END).map(self._example)
            batches = dataset.batch(self._rows).to_iter_dataset(self._read_options)
            self._iterator = iter(batches.batch(self.batches))
        try:
            values, labels = next(self._iterator)
        except BaseException:
            self._stop()  # Grain's iterator is now inside a pool.
            raise
        shape = (self.batches, self._rows)
        chex.assert_shape((values, labels), [(*shape, *self.source.image_shape), shape])
        number = self._next_pool
        self._next_pool += 1
        return HostPool(pixels.to_float(values), labels, number)

    def seek(self, number: int) -> None:
        """Makes pool `number` the next one."""
        if number != self._next_pool:
            self._stop()
            self._next_pool = int(number)

    def get_state(self) -> dict[str, Any]:
        """The position, 'next_pool', and the settings that it needs, as JSON values."""
        return {
            'next_pool': self._next_pool,
            'batches': self.batches,
            'batch_size': self._batch_size,
            'seed': self._seed,
            'flip': self._flip,
            'classes_per_pool': self._classes_per_pool,
            'pairing': repr(self._pairing),
            'source': repr(self.source),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes at a position of `get_state`, with any number of processes.

        Raises:
          ValueError: the data or settings differ; the message lists the differences.
        """
        own = self.get_state()
        # Older checkpoints lack these.
        state = {'classes_per_pool': 0, 'pairing': repr(None)} | state
        differing = [
            f'{name}: {state.get(name)!r} -> {own[name]!r}'
            for name in own
            if name not in state or (name != 'next_pool' and state[name] != own[name])
        ]
        if differing:
            raise ValueError(
                'the data differ from those that the checkpoint was trained on: '
                + '; '.join(differing)
                + '; restore them or start a new --workdir'
            )
        self.seek(state['next_pool'])

    def close(self) -> None:
        """Ends the background threads; each first finishes the batch it reads."""
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _example(self, number: int) -> tuple[np.ndarray, np.int32]:
        """Example `number` of this process, counted over its rows of all batches."""
        batch, row = divmod(int(number), self._rows)
        position = batch * self._batch_size + self._first_row + row
        index, flip = self._index(position), self._is_flipped(position)
        random = functools.partial(_posterior_generator, self._seed, position)
        draw = functools.partial(self.source.draw, index, flip=flip, random=random)
        return self._retried(draw, index)

    def _retried(self, read: Callable, index: int):
        """`read()`, repeated while the file system fails."""
        started, pause = time.monotonic(), FIRST_PAUSE
        while True:
            try:
                return read()
            except OSError as error:
                # Without an errno the file is at fault, not the file system.
                late = time.monotonic() - started + pause > self._retry_seconds
                if error.errno is None or late or self._closed:
                    raise
                self.retries += 1
                logging.warning(
                    '%s cannot be read (%s); retrying in %.1f s, for up to %g s',
                    self.source.name_of(index),
                    error,
                    pause,
                    self._retry_seconds,
                )
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _is_flipped(self, position: int) -> bool:
        return self._flip and bool(_coin(self._seed, position))

    def _index(self, position: int) -> int:
        """Index of the image at a position of the stream."""
        if self._pairing is None:
            return self._index_in_order(position)
        pool, place = divmod(position, self.batches * self._batch_size)
        with self._pairing_lock:  # The first thread computes, others wait for it.
            return int(self._paired(pool)[place])

    def _paired(self, pool: int) -> np.ndarray:
        """[K M] indices of the images of a pool, as the pairing chooses them."""
        size = self.batches * self._batch_size
        positions = range(pool * size, (pool + 1) * size)
        labels = self.source.labels[[self._index_in_order(p) for p in positions]]
        flip = np.array([self._is_flipped(p) for p in positions])
        return self._pairing(pool, labels, flip)

    def _index_in_order(self, position: int) -> int:
        """Index of the image at a position of the shuffled epochs."""
        if self._classes_per_pool:
            # Chunks of one class are consecutive, so each pool is shuffled again.
            size = self.batches * self._batch_size
            pool, place = divmod(position, size)
            position = pool * size + int(self._deal(pool)[place])
        epoch, place = divmod(position, self._size)
        return int(self._order(epoch)[place])

    def _order(self, epoch: int) -> np.ndarray:
        """[N] indices of the images, in the order of an epoch."""
        order = _permutation(self._seed, epoch, self._size)
        if not self._classes_per_pool:
            return order
        chunk = -(-self.batches * self._batch_size // self._classes_per_pool)
        return _grouped(order, self.source.labels, chunk, self._seed, epoch)

    def _deal(self, pool: int) -> np.ndarray:
        """[K M] order of the positions within a pool."""
        size = self.batches * self._batch_size
        return _permutation(self._seed, _WITHIN_POOLS, size, pool)


def _words(seed: int, stream: int, count: int, start: int) -> np.ndarray:
    """[count] uint64 of a random stream, a function of its arguments.

    They are the output of a bit generator, which NumPy keeps in all versions, unlike
    that of `Generator.permutation`.
    """
    key = np.array([seed, stream], np.uint64)
    return np.random.Philox(key=key, counter=start).random_raw(count)


def _permutation(seed: int, stream: int, size: int, number: int = 0) -> np.ndarray:
    """[size] order, a function of its arguments; the stream is an epoch or a name."""
    return np.argsort(_words(seed, stream, size, number << 64), kind='stable')


def _grouped(
    order: np.ndarray, labels: np.ndarray, chunk: int, seed: int, epoch: int
) -> np.ndarray:
    """`order` in chunks of `chunk` images of one class, the chunks in random order.

    The last chunk of a class holds its remainder.
    """
    by_class = order[np.argsort(labels[order], kind='stable')]
    counts = np.bincount(labels)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    number = np.repeat(np.arange(len(counts)), counts) * len(order) + rank // chunk
    _, number = np.unique(number, return_inverse=True)
    place = _permutation(seed, _CHUNKS, int(number[-1]) + 1, epoch)
    return by_class[np.argsort(place[number], kind='stable')]


def _coin(seed: int, position: int) -> np.bool_:
    """A fair coin, a function of the seed and the position."""
    block, place = divmod(position, _COINS_PER_BLOCK)
    return _coins(seed, block)[place]


@functools.lru_cache(maxsize=64)
def _coins(seed: int, block: int) -> np.ndarray:
    """[_COINS_PER_BLOCK] coins at once; one generator per coin would be slow."""
    # Philox returns 4 words for each value of its counter.
    words = _words(seed, _FLIPS, _COINS_PER_BLOCK, block * _COINS_PER_BLOCK // 4)
    return (words & np.uint64(1)).astype(bool)


def _posterior_generator(seed: int, position: int) -> np.random.Generator:
    """Generates the posterior sample at a position of the stream."""
    key = np.array([seed, _POSTERIORS], np.uint64)
    # The lowest word counts the random numbers of one example.
    return np.random.Generator(np.random.Philox(key=key, counter=position << 64))
