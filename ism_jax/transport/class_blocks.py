"""One coupling per class, in blocks of fixed capacity that are solved side by side."""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp


def solve_classes(
    solve: Callable,
    noise: jax.Array,
    data: jax.Array,
    labels: jax.Array,
    key: jax.Array | None,
    *,
    num_classes: int,
    class_capacity: int | None,
    max_classes: int | None,
):
    """Solves one problem per class; returns what `solve` returns for a single problem.

    Shapes are static. Each class is a block of fixed capacity, padded with points that
    can only be paired with themselves. If a class exceeds the capacity or the pool has
    more classes than blocks, the whole pool is solved as one problem with a mask. Only
    one of the two branches runs.

    Args:
      solve: `solve(noise, data, group, key, num_groups)`, which couples points of the
        same group; see `coupling.solve`.
      noise: [n, D].
      data: [n, D].
      labels: [n] integers; a point with a label outside [0, num_classes) is paired with
        the noise of the same index.
      key: random key for `solve`, or None.
      num_classes: number of possible labels.
      class_capacity: points per block; None for the mean class size plus four standard
        deviations.
      max_classes: number of blocks; None for `num_classes`.
    """
    size = data.shape[0]
    blocks = min(max_classes or num_classes, num_classes)
    mean = size / blocks
    capacity = class_capacity or 8 * math.ceil((mean + 4 * math.sqrt(mean)) / 8)
    known = (labels >= 0) & (labels < num_classes)
    group = jnp.where(known, labels, num_classes).astype(jnp.int32)
    counts = jnp.zeros(num_classes + 1, jnp.int32).at[group].add(1)

    def masked():
        own = jnp.where(known, group, num_classes + jnp.arange(size, dtype=jnp.int32))
        return solve(noise, data, own, key, num_classes + size)

    def blocked():
        table = _block_table(group, counts, blocks, capacity)
        return _solve_blocks(solve, noise, data, key, table)

    if capacity >= size:
        return masked()
    present = counts[:num_classes] > 0
    fits = (counts[:num_classes].max() <= capacity) & (present.sum() <= blocks)
    return jax.lax.cond(fits, blocked, masked)


def _block_table(group, counts, blocks: int, capacity: int) -> jax.Array:
    """Indices of the points of each block [blocks, capacity]; n where it is padded.

    Points of the last group, those of unknown class, are in no block.
    """
    size = group.shape[0]
    present = counts[:-1] > 0
    # Blocks are numbered in the order of the classes that occur; `blocks` means none.
    number = jnp.append(jnp.cumsum(present) - 1, blocks).astype(jnp.int32)
    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    start = jnp.cumsum(counts) - counts
    rank = jnp.arange(size, dtype=jnp.int32) - start[group[order]]  # Within the class.
    table = jnp.full((blocks, capacity), size, jnp.int32)
    return table.at[number[group[order]], rank].set(order, mode='drop')


def _solve_blocks(solve, noise, data, key, table):
    """Solves each block of the table; returns the results per point of the pool."""
    size = data.shape[0]
    blocks, capacity = table.shape
    valid = table < size
    rows = jnp.minimum(table, size - 1)
    # Real points share group 0, and each padding point has its own group.
    padding = jnp.arange(1, capacity + 1, dtype=jnp.int32)
    group = jnp.where(valid, 0, padding[None])
    keys = None if key is None else jax.random.split(key, blocks)
    solve_each = jax.vmap(functools.partial(solve, num_groups=capacity + 1))
    points, report = solve_each(noise[rows], data[rows], group, keys)
    # From positions in a block to indices in the pool.
    for name in ('choice', 'likeliest_noise', 'likeliest_data'):
        points[name] = jnp.take_along_axis(rows, points[name], axis=1)
    index = jnp.arange(size, dtype=jnp.int32)
    unpaired = {
        'choice': index,
        'likeliest_noise': index,
        'likeliest_data': index,
        'entropy': jnp.zeros(size),
        'noise_mass': jnp.ones(size),
        'excess': jnp.zeros(size),
    }
    points = {
        name: unpaired[name].at[table].set(value, mode='drop')
        for name, value in points.items()
    }
    share = valid.sum(1) / jnp.maximum(valid.sum(), 1)
    return points, {
        'converged': jnp.sum(share * report['converged']),
        'iterations': report['iterations'].max(),
        'rounds': report['rounds'].max(),
    }
