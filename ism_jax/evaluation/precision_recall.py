"""Precision and recall of samples by nearest neighbours of their features.

A point lies in the estimated manifold of a set if it is no further from some member of
the set than that member's k-th nearest neighbour within the set (Kynkaanniemi et al.
2019, arXiv 1904.06991, equation 1, k = 3). Precision is the share of samples in the
manifold of the real images, recall the share of real images in that of the samples
(equation 2).

Computed in blocks in float32 on the accelerator, from features less their common mean.
Squared distances are exact to about 1e-6 of the squared norms of those, so that a share
can be off only by the points that lie so close to the surface of a manifold.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NEIGHBOURS = 3


class PrecisionRecall(NamedTuple):
    """Shares, 0 .. 1."""

    precision: float
    recall: float


def precision_recall(
    samples, real, *, neighbours: int = NEIGHBOURS, block_size: int = 4096
) -> PrecisionRecall:
    """Precision and recall of samples.

    Both depend on the numbers of points: compare only numbers from equally many (ADM
    takes 50,000 samples and 10,000 real images).

    Args:
      samples: [N, F] features of samples, of any floating type.
      real: [M, F] features of real images.
      neighbours: k.
      block_size: of the distances, [block_size, block_size] float32 are in memory at
        once, beside both sets of features.

    Raises:
      ValueError: shapes disagree, values are not finite, or a set has not k + 1 points.
    """
    sets = [_check(samples, 'samples', neighbours), _check(real, 'real', neighbours)]
    if sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(
            f'samples have {sets[0].shape[1]} features and real {sets[1].shape[1]}: '
            'use one feature function for both'
        )
    if block_size < 1:
        raise ValueError(f'block_size = {block_size} must be at least 1')
    # No distance changes, and float32 keeps the digits that the mean would take.
    mean = np.mean([features.mean(axis=0, dtype=np.float64) for features in sets], 0)
    blocks = [_blocks(features - mean[None], block_size) for features in sets]
    counts = [len(features) for features in sets]
    radii = [_radii(b, count, neighbours) for b, count in zip(blocks, counts)]
    covered = [np.zeros((len(b), block_size), bool) for b in blocks]
    for i, (rows, row_radii) in enumerate(zip(blocks[0], radii[0])):
        for j, (columns, column_radii) in enumerate(zip(blocks[1], radii[1])):
            in_rows, in_columns = _covered(rows, columns, row_radii, column_radii)
            covered[0][i] |= np.asarray(in_rows)
            covered[1][j] |= np.asarray(in_columns)
    shares = (
        float(inside.ravel()[:count].mean()) for inside, count in zip(covered, counts)
    )
    return PrecisionRecall(*shares)


def _check(features, name, neighbours):
    features = np.asarray(features)
    if features.ndim != 2 or not features.size:
        raise ValueError(f'{name} has shape {features.shape}; [N, F] is expected')
    if not 1 <= neighbours < len(features):
        raise ValueError(
            f'neighbours = {neighbours} must be in 1 .. {len(features) - 1}, one less '
            f'than the {len(features)} points of {name}'
        )
    if not np.isfinite(features).all():
        raise ValueError(
            f'{name} is not finite; check the images for NaN, or leave those samples '
            'out and report how many'
        )
    return features


def _blocks(features, block_size) -> jax.Array:
    """[blocks, block_size, F] float32 on the device, filled up with zeros."""
    number = -(-len(features) // block_size)
    out = np.zeros((number * block_size, features.shape[1]), np.float32)
    out[: len(features)] = features
    return jnp.asarray(out.reshape(number, block_size, -1))


def _radii(blocks, count, neighbours) -> jax.Array:
    """[blocks, block_size]: squared distance to the k-th nearest other point.

    Less than 0 for what is no point, so that nothing is within it.
    """
    block_size = blocks.shape[1]
    out = []
    for i, rows in enumerate(blocks):
        nearest = jnp.full((block_size, neighbours), jnp.inf)
        for j, columns in enumerate(blocks):
            nearest = _nearest(
                nearest, rows, columns, i * block_size, j * block_size, count
            )
        numbers = i * block_size + np.arange(block_size)
        out.append(jnp.where(numbers < count, nearest[:, -1], -1.0))
    return jnp.stack(out)


@jax.jit
def _nearest(nearest, rows, columns, first_row, first_column, count):
    """The least of the squared distances so far, [rows, k] ascending, and of a block.

    Args:
      nearest: [rows, k], the least so far.
      rows, columns: [rows, F] and [columns, F].
      first_row, first_column: number of their first point in the set.
      count: points of the set; those with higher numbers are none.
    """
    row = first_row + jnp.arange(len(rows))[:, None]
    column = first_column + jnp.arange(len(columns))[None]
    distances = _squared_distances(rows, columns)
    # A point is not its own neighbour, though one of the same place is.
    distances = jnp.where((row == column) | (column >= count), jnp.inf, distances)
    candidates = jnp.concatenate([nearest, distances], axis=1)
    return -jax.lax.top_k(-candidates, nearest.shape[1])[0]


@jax.jit
def _covered(rows, columns, row_radii, column_radii):
    """Which rows lie in the balls of the columns, and which columns in those of rows.

    Points that are none have negative radii, and cover nothing.
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
