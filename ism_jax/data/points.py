"""The whole data set as points for transport, class by class in memory."""

from concurrent import futures

import numpy as np

from ism_jax.data.source import Source


def class_members(source: Source) -> list[np.ndarray]:
    """For each class the indices [n_c] of its examples, ascending."""
    return [np.flatnonzero(source.labels == c) for c in range(source.num_classes)]


def read_points(
    source: Source, members: list[np.ndarray], num_threads: int
) -> list[np.ndarray]:
    """For each class its examples, [n_c, H W C] float16, in the order of `members`.

    Args:
      source: with `labels`.
      members: see `class_members`.
      num_threads: reading threads.
    """
    size = int(np.prod(source.image_shape))
    points = [np.empty((len(indices), size), np.float16) for indices in members]

    def read(label):
        for row, index in enumerate(members[label]):
            points[label][row] = source.mean_example(int(index)).ravel()

    with futures.ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(read, range(len(members))))
    return points
