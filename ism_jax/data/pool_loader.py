"""From a source to pools of batches, through Grain.

The unit of training is a pool, K batches of M samples, over which transport couples.
Pool number p is a function of (seed, p) alone: it holds the positions p K M ..
(p + 1) K M - 1 of an endless stream of epochs, each a fresh permutation of the data.
So a run can be taken up at any step, by any number of processes.
"""

import functools
import time
from typing import Any, NamedTuple

from absl import logging
import grain
import numpy as np

from ism_jax.data import sources

# Second words of the keys of random streams. The orders of the epochs use the epoch
# there, so that no two are drawn from the same numbers.
_FLIPS, _POSTERIORS, _CHUNKS, _WITHIN_POOLS = (2**64 - n for n in range(1, 5))
# Grain needs an end; no run gets here.
_LAST_BATCH = 2**40
# Between tries of an image that cannot be read, seconds; doubled each time.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0


class HostPool(NamedTuple):
    """This process's part of a pool.

    Attributes:
      images: [K, M / processes, H, W, C] float32: images in [-1, 1], or latents.
      labels: [K, M / processes] int32.
      number: number of the pool in the run.
    """

    images: np.ndarray
    labels: np.ndarray
    number: int


class PoolLoader:
    """Endless iterator over `HostPool`s, made ahead of time in background threads.

    Each image is used once per epoch. An epoch may end within a pool, and a pool may
    hold several epochs of a small source. Of latents the
    posterior is sampled anew in each epoch.

    Args:
      source: see `ism_jax.data.sources`.
      batches: K, batches in a pool.
      batch_size: M, over all processes.
      seed: of the order and the flips.
      flip: flip each image horizontally with probability 1/2, anew in each epoch.
      classes_per_pool: about so many classes share a pool, each with about
        K M / classes_per_pool images, so that transport within a class has something
        to choose from; 0 leaves it to chance. Batches of a pool are still a random
        deal of it. Needs `source.labels`.
      process_index, process_count: of each batch, this process holds the
        `process_index`-th of `process_count` equal parts of consecutive rows.
      num_threads: threads that read; each reads one batch at a time.
      prefetch: pools that are read ahead. They wait as uint8.
      retry_seconds: for so long an image is tried again that the system cannot read
        (an `OSError`); each time counts in `retries`.

    Raises:
      ValueError: an empty source, sizes that do not divide or are out of range.
    """

    def __init__(
        self,
        source,
        *,
        batches: int,
        batch_size: int,
        seed: int,
        flip: bool = False,
        classes_per_pool: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        num_threads: int = 2,
        prefetch: int = 2,
        retry_seconds: float = 0.0,
    ):
        for name, value in (
            ('transport.batches', batches),
            ('train.batch_size', batch_size),
            ('process_count', process_count),
            ('data.num_threads', num_threads),
            ('data.prefetch', prefetch),
        ):
            if value < 1:
                raise ValueError(f'{name} = {value} must be at least 1; raise it')
        if not 0 <= seed < 2**64:
            raise ValueError(f'seed = {seed} must be in 0 .. 2**64 - 1; choose another')
        if not 0 <= process_index < process_count:
            raise ValueError(
                f'process_index = {process_index} must be in 0 .. {process_count - 1}; '
                'pass jax.process_index() and jax.process_count()'
            )
        if batch_size % process_count:
            raise ValueError(
                f'train.batch_size = {batch_size} must be a multiple of the '
                f'{process_count} processes; the nearest are '
                f'{batch_size // process_count * process_count or process_count} and '
                f'{-(-batch_size // process_count) * process_count}'
            )
        if not len(source):
            raise ValueError(f'{source!r} has no images; choose another data.source')
        if classes_per_pool < 0:
            raise ValueError(
                f'data.classes_per_pool = {classes_per_pool} must be at least 0, which '
                'leaves it to chance'
            )
        if classes_per_pool and not hasattr(source, 'labels'):
            raise ValueError(
                f'data.classes_per_pool = {classes_per_pool} needs all labels ahead of '
                f'the images, which {source!r} has not; prepare latents, use a folder '
                'or set it to 0'
            )
        self.source = source
        self.retries = 0
        self._retry_seconds = retry_seconds
        self._batches = batches
        self._batch_size = batch_size
        self._first_row = process_index * batch_size // process_count
        self._rows = batch_size // process_count
        self._seed = seed
        self._flip = flip
        self._classes_per_pool = classes_per_pool
        self._grouped = {}  # Orders by epoch.
        self._latents = isinstance(source, sources.LatentSource)
        self._read_options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=prefetch * batches
        )
        self._next_pool = 0
        # Opened by the first `next`, so that a `seek` before it reads nothing in vain.
        self._iterator = None
        self._closed = False

    @property
    def skipped(self) -> int:
        """Images that this process could not read and replaced; each counts once.

        The first of them are named in `source.skipped.reasons`.
        """
        return len(self.source.skipped)

    def __iter__(self):
        return self

    def __next__(self) -> HostPool:
        """The next pool.

        Raises:
          ValueError: an image or label that the source should not have given; the
            loader is closed.
          Exception: whatever the source raised while reading. The pool is not used up:
            the next call tries it again.
        """
        if self._closed:
            raise ValueError('the PoolLoader is closed; make another one')
        if self._iterator is None:
            first = self._next_pool * self._batches
            dataset = grain.MapDataset.range(first, _LAST_BATCH).map(self._read_batch)
            self._iterator = iter(dataset.to_iter_dataset(self._read_options))
        images = np.empty(
            (self._batches, self._rows, *self.source.image_shape), np.float32
        )
        labels = np.empty((self._batches, self._rows), np.int32)
        try:
            for k in range(self._batches):
                values, labels[k] = next(self._iterator)
                if self._latents:
                    images[k] = values
                else:
                    np.divide(values, np.float32(127.5), out=images[k])
        except BaseException:
            # Grain's iterator now stands within a pool.
            self._stop()
            raise
        if not self._latents:
            images -= 1
        number = self._next_pool
        self._next_pool += 1
        return HostPool(images, labels, number)

    def seek(self, number: int) -> None:
        """Continues with pool `number`.

        Raises:
          ValueError: a negative number.
        """
        if number < 0:
            raise ValueError(f'pool number = {number} must be at least 0')
        if number != self._next_pool:
            self._stop()
            self._next_pool = int(number)

    def get_state(self) -> dict[str, Any]:
        """Position ('next_pool') and what it is a position in; JSON-able."""
        return {
            'next_pool': self._next_pool,
            'batches': self._batches,
            'batch_size': self._batch_size,
            'seed': self._seed,
            'flip': self._flip,
            'classes_per_pool': self._classes_per_pool,
            'source': repr(self.source),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `get_state` was taken, in any number of processes.

        Raises:
          ValueError: the state is of other data, naming what differs.
        """
        own = self.get_state()
        state = {'classes_per_pool': 0} | state  # Older checkpoints do not say.
        differing = [
            f'{name}: {state.get(name)!r} -> {own[name]!r}'
            for name in own
            if name != 'next_pool' and state.get(name) != own[name]
        ]
        if 'next_pool' not in state:
            differing.append('next_pool: missing')
        if differing:
            raise ValueError(
                'the data are not those that the checkpoint was trained on: '
                + '; '.join(differing)
                + '; restore them or start a new --workdir'
            )
        self.seek(state['next_pool'])

    def close(self) -> None:
        """Ends the background threads; a batch that is being read is finished first."""
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _read_batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """This process's rows of a batch of the run: (uint8 images, labels).

        Of latents the first is float32.
        """
        start = int(number) * self._batch_size + self._first_row
        kind = np.float32 if self._latents else np.uint8
        images = np.empty((self._rows, *self.source.image_shape), kind)
        labels = np.empty(self._rows, np.int32)
        flipped = np.zeros(self._rows, bool)
        if self._flip:
            flipped = _coins(self._seed, start, self._rows)
        for row, index in enumerate(self._indices(start).tolist()):
            record = self._record(index)
            if self._latents:
                images[row] = self.source.draw(
                    record, flip=flipped[row], random=self._random(start + row)
                )
                labels[row] = record.label
            else:
                images[row] = self._checked(record, index)
                labels[row] = record['label']
        if not self._latents:
            images[flipped] = images[flipped, :, ::-1]
        return images, labels

    def _record(self, index: int):
        """An image of the source; for a file system that fails a while, it waits."""
        started, pause = time.monotonic(), FIRST_PAUSE
        while True:
            try:
                return self.source[index]
            except OSError as error:
                # Without a number it is not the system's: a file that is no image.
                late = time.monotonic() - started + pause > self._retry_seconds
                if error.errno is None or late or self._closed:
                    raise
                self.retries += 1
                logging.warning(
                    'image %d of %r cannot be read (%s); trying again in %.1f s, for '
                    'data.retry_seconds = %g in all',
                    index, self.source, error, pause, self._retry_seconds,
                )  # fmt: skip
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _random(self, position: int) -> np.random.Generator:
        """Of the posterior of the example at a position of the stream."""
        key = np.array([self._seed, _POSTERIORS], np.uint64)
        # The lowest word counts the numbers of one example.
        return np.random.Generator(np.random.Philox(key=key, counter=position << 64))

    def _indices(self, start: int) -> np.ndarray:
        """Which images stand at the positions `start` .. `start` + rows - 1."""
        size = len(self.source)
        positions = start + np.arange(self._rows)
        if self._classes_per_pool:
            # Chunks of a class stand together; within a pool they are dealt.
            pool = self._batches * self._batch_size
            number = start // pool  # A batch lies within one pool.
            deal = _permutation(self._seed, _WITHIN_POOLS, pool, number)
            positions = number * pool + deal[positions - number * pool]
        epochs, places = np.divmod(positions, size)
        indices = np.empty(self._rows, np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = self._order(int(epoch))[places[chosen]]
        return indices

    def _order(self, epoch: int) -> np.ndarray:
        """[size] order of an epoch."""
        order = _permutation(self._seed, epoch, len(self.source))
        if not self._classes_per_pool:
            return order
        if epoch not in self._grouped:
            chunk = -(-self._batches * self._batch_size // self._classes_per_pool)
            grouped = _grouped(order, self.source.labels, chunk, self._seed, epoch)
            # Two are kept, as a batch may straddle them.
            kept = dict(sorted(self._grouped.items())[-1:])
            self._grouped = kept | {epoch: grouped}
        return self._grouped[epoch]

    def _checked(self, record, index: int) -> np.ndarray:
        image, label = record['image'], record['label']
        if image.shape != self.source.image_shape or image.dtype != np.uint8:
            raise ValueError(
                f'{self.source!r}: image {index} is {image.dtype} {image.shape}, but '
                f'uint8 {self.source.image_shape} was promised; repair the source, or '
                'set data.image_size and data.channels to what it has'
            )
        if not 0 <= label < self.source.num_classes:
            raise ValueError(
                f'{self.source!r}: image {index} has label {label}, which is not in '
                f'0 .. {self.source.num_classes - 1}; repair its label or name its '
                'class'
            )
        return image


# Vectorised, where Grain's shuffle takes 10 microseconds of Python for each image; and
# from a bit generator, whose stream NumPy keeps the same in all versions, unlike that
# of `Generator.permutation`. A few are kept, as a batch may straddle epochs.
@functools.lru_cache(maxsize=4)
def _permutation(seed: int, domain: int, size: int, number: int = 0) -> np.ndarray:
    """[size] order, a function of its arguments; the domain is an epoch or a name."""
    words = _words(seed, domain, size, number)
    order = np.argsort(words, kind='stable')
    order.flags.writeable = False
    return order


def _words(seed: int, domain: int, size: int, number: int) -> np.ndarray:
    """[size] uint64, the start of stream `number` of a domain."""
    key = np.array([seed, domain], np.uint64)
    return np.random.Philox(key=key, counter=number << 64).random_raw(size)


def _grouped(
    order: np.ndarray, labels: np.ndarray, chunk: int, seed: int, epoch: int
) -> np.ndarray:
    """`order` with chunks of `chunk` images of one class together, chunks at random.

    The last chunk of a class holds what is left over.
    """
    by_class = order[np.argsort(labels[order], kind='stable')]
    counts = np.bincount(labels)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    number = np.repeat(np.arange(len(counts)), counts) * len(order) + rank // chunk
    _, number = np.unique(number, return_inverse=True)
    place = _permutation(seed, _CHUNKS, int(number[-1]) + 1, epoch)
    return by_class[np.argsort(place[number], kind='stable')]


def _coins(seed: int, start: int, count: int) -> np.ndarray:
    """[count] bool, each a fair function of the seed and its position from `start`."""
    key = np.array([seed, _FLIPS], np.uint64)
    # Philox gives 4 words for each value of its counter.
    counter, skip = divmod(start, 4)
    words = np.random.Philox(key=key, counter=counter).random_raw(skip + count)
    return (words[skip:] & np.uint64(1)).astype(bool)
