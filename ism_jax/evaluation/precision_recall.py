"""Precision and recall of samples by nearest neighbours of their features.

A point lies in the estimated manifold of a set if, for some member of the set, it is no
further away than that member's k-th nearest neighbour within the set (Kynkaanniemi et
al. 2019, arXiv 1904.06991, equation 1, k = 3). Precision is the fraction of samples in
the manifold of the real images, recall the fraction of real images in the manifold of
the samples (equation 2).

Computed in blocks in float32 on the accelerator, from features minus their common mean.
Squared distances are exact to about 1e-6 of the squared norms of these differences, so
only points within this error of a manifold's boundary can be misclassified.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

NEIGHBOURS = 3


class PrecisionRecall(NamedTuple):
    """Fractions, 0 .. 1."""

    precision: float
    recall: float


def precision_recall(
    samples, real, *, neighbours: int = NEIGHBOURS, block_size: int = 4096
) -> PrecisionRecall:
    """Precision and recall of samples.

    Both depend on the sizes of the sets: compare only values from sets of equal sizes
    (ADM takes 50,000 samples and 10,000 real images).

    Args:
      samples: [N, F] features of samples, of any floating type, N > k.
      real: [M, F] features of real images, M > k.
      neighbours: k.
      block_size: side of a block of float32 distances. One block at a time is in
        memory, in addition to both sets of features.
    """
    sets = [np.asarray(samples), np.asarray(real)]
    chex.assert_equal_shape_suffix(sets, 1)
    # Distances do not depend on the mean, and without it float32 keeps more digits.
    mean = np.mean([features.mean(axis=0, dtype=np.float64) for features in sets], 0)
    blocks = [_blocks(features - mean[None], block_size) for features in sets]
    counts = [len(features) for features in sets]
    radii = [
        _radii(b, count, neighbours) for b, count in zip(blocks, counts, strict=True)
    ]
    covered = [np.zeros((len(b), block_size), bool) for b in blocks]
    for i, (rows, row_radii) in enumerate(zip(blocks[0], radii[0], strict=True)):
        for j, (columns, column_radii) in enumerate(
            zip(blocks[1], radii[1], strict=True)
        ):
            in_rows, in_columns = _covered(rows, columns, row_radii, column_radii)
            covered[0][i] |= np.asarray(in_rows)
            covered[1][j] |= np.asarray(in_columns)
    return PrecisionRecall(
        *(
            float(inside.ravel()[:count].mean())
            for inside, count in zip(covered, counts, strict=True)
        )
    )


def _blocks(features, block_size) -> jax.Array:
    """[blocks, block_size, F] float32 on the device, padded with zeros."""
    number = -(-len(features) // block_size)
    out = np.zeros((number * block_size, features.shape[1]), np.float32)
    out[: len(features)] = features
    return jnp.asarray(out.reshape(number, block_size, -1))


def _radii(blocks, count, neighbours) -> jax.Array:
    """[blocks, block_size]: squared distance to the k-th nearest other point.

    Negative for padding, so that nothing lies within its radius.
    """
    block_size = blocks.shape[1]
    out = []
    for i, rows in enumerate(blocks):
        nearest = jnp.full((block_size, neighbours), jnp.inf)
        for j, columns in enumerate(blocks):
            nearest = _nearest(
                nearest, rows, columns, i * block_size, j * block_size, count
            )
        indices = i * block_size + np.arange(block_size)
        out.append(jnp.where(indices < count, nearest[:, -1], -1.0))
    return jnp.stack(out)


@jax.jit
def _nearest(nearest, rows, columns, first_row, first_column, count):
    """The k smallest squared distances after one more block, [rows, k] ascending.

    `nearest` are the smallest so far. `first_row` and `first_column` are the indices of
    the blocks' first points in the set; its points from `count` on are padding.
    """
    row = first_row + jnp.arange(len(rows))[:, None]
    column = first_column + jnp.arange(len(columns))[None]
    distances = _squared_distances(rows, columns)
    # A point is not its own neighbour, but a duplicate of it is.
    distances = jnp.where((row == column) | (column >= count), jnp.inf, distances)
    candidates = jnp.concatenate([nearest, distances], axis=1)
    return -jax.lax.top_k(-candidates, nearest.shape[1])[0]


@jax.jit
def _covered(rows, columns, row_radii, column_radii):
    """Which rows lie in a ball of the columns, and which columns in one of the rows.

    Padding has negative radii and covers nothing.
    """
    distances = _squared_distances(rows, columns)
    in_rows = (distances <= column_radii[None]).any(axis=1)
    in_columns = (distances <= row_radii[:, None]).any(axis=0)
    return in_rows, in_columns


def _squared_distances(rows, columns):
    """[rows, columns], at least 0."""
    product = jnp.matmul(rows, columns.T, precision='highest')
    squares = (rows**2).sum(1)[:, None] + (columns**2).sum(1)[None]
    return jnp.maximum(squares - 2 * product, 0.0)
