"""Scaling optimal transport (sOT): one coupling of noise and data over many batches.

Straight paths need noise and data that are paired well, and a batch holds too few
points for that. iSM (arXiv 2510.21250, "scaling optimal transport") pools K batches of
size M, solves one entropic problem between the n = K M noises and the n data points,
pairs by it and deals the pairs back into K batches.

**Cost.** The negative dot product of centred points. Squared norms and means only add
terms that depend on one point of a pair; these leave the optimal plan as it is, hurt
the conditioning (arXiv 2506.05526), and would enter the cost's standard deviation, of
which epsilon is a share.

**Marginals.** The plan is rounded to a permutation: every data point and every noise
of the pool is used exactly once. An auction (Bertsekas 1992) does it from Sinkhorn's
potentials, with a bound on the distance to the optimum in the report. Data and labels
never move: a coupling is the number of the noise that each data point gets.

**Classes.** A class-blind coupling makes p(x0 | c) differ from N(0, I), while sampling
draws x0 from N(0, I) whatever the class (C2OT, arXiv 2503.10636); `class_skew` measures
that. With `per_class` each class is a problem of its own, between its data and the
noises of the same numbers. Which noises those are is settled before any is looked at,
so that they are N(0, I) given the class.

**Devices.** Sums are rounded differently when arrays are split, and one bit can turn a
pairing over. With a `mesh`, `couple_pool` therefore gathers the data and lets every
device run the same program on all of it: the pairing does not depend on the devices,
and a run may resume on another number of them.
"""

from collections.abc import Sequence
import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ott.geometry import geometry
from ott.solvers import linear
from ott.solvers.linear import acceleration

from ism_jax.method import interpolant

Method = Literal['permutation', 'row_sampling', 'independent']
METHODS = ('permutation', 'row_sampling', 'independent')

# Over-relaxation of Sinkhorn; it takes about half the iterations of 1.0 here.
SINKHORN_MOMENTUM = 1.3
# Sinkhorn's error is looked at once in so many iterations.
SINKHORN_INNER_ITERATIONS = 5
# A bid exceeds the second best offer by this share of the cost's standard deviation,
# which is also the most that a pair of the permutation can cost above the optimum.
AUCTION_INCREMENT = 0.02
# Rows that bid at a time: fewer make more rounds, more waste bids on the same columns.
AUCTION_BIDDERS = 8
# The auction ends by itself. This bounds it where it is slow (hundreds of equal
# images); the rows that are then left are paired in order.
AUCTION_ROUNDS_PER_POINT = 16
# Similarity, in standard deviations, of points of different classes. Finite, so that
# differences are; beyond any price.
FORBIDDEN = -1e6
# Number of the key that row sampling draws with: no noise has it.
SAMPLING_NUMBER = 2**32 - 1


class Coupling(NamedTuple):
    """A pairing of the noises and the data of a pool.

    Attributes:
      noise_index: [n] int32; data point j is paired with noise `noise_index[j]`.
      report: float32 scalars by name; see `couple`.
    """

    noise_index: jax.Array
    report: dict[str, jax.Array]


def pool_noise(
    pool_key: jax.Array,
    indices: jax.Array,
    shape: Sequence[int],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Noises of a pool by their numbers: [len(indices), *shape], from N(0, I).

    Noise i is `normal(fold_in(pool_key, i))`, a key and not an array: wherever it is
    needed it is made anew, in whatever company, and is the same.
    """
    return interpolant.sample_noise(pool_key, indices, tuple(shape)).astype(dtype)


def couple_pool(
    data: jax.Array,
    labels: jax.Array | None,
    pool_key: jax.Array,
    *,
    mesh: jax.sharding.Mesh | None = None,
    **options,
) -> Coupling:
    """`couple` with the noises `pool_noise(pool_key, arange(n), data.shape[1:])`.

    To be called under `jax.jit`. The pairing is a function of data, labels and key
    alone: with `mesh` it is the same whatever the mesh and however the data are split
    over it. Memory per device: the pool twice and about four [n, n] float32 matrices.

    Args:
      data: [n, ...]; replicated or split over `mesh`.
      labels: [n] integers; None for a class-blind coupling.
      pool_key: scalar key, one for each pool.
      mesh: devices of `data`; None for one device. Without it, data that are split
        over several devices would be coupled by a program that depends on them.
      **options: of `couple`.
    """

    def solve(data, labels, pool_key):
        size = data.shape[0]
        noise = pool_noise(pool_key, jnp.arange(size), data.shape[1:])
        key = jax.random.fold_in(pool_key, jnp.uint32(SAMPLING_NUMBER))
        return couple(
            noise.reshape(size, -1), data.reshape(size, -1), labels, key, **options
        )

    if mesh is None:
        return solve(data, labels, pool_key)
    whole = NamedSharding(mesh, P())
    # Gathered outside of `shard_map`, whose body is then the same for every mesh.
    inputs = jax.lax.with_sharding_constraint((data, labels, pool_key), whole)
    return jax.shard_map(
        solve, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )(*inputs)


def couple(
    noise: jax.Array,
    data: jax.Array,
    labels: jax.Array | None,
    key: jax.Array | None,
    *,
    method: Method = 'permutation',
    per_class: bool = False,
    num_classes: int = 1,
    epsilon: float = 0.1,
    max_iterations: int = 200,
    tolerance: float = 0.05,
    class_capacity: int | None = None,
    max_classes: int | None = None,
) -> Coupling:
    """Couples noise and data.

    Data that are not finite are never hidden and never hurt others: such a point is
    coupled as if it were the mean of the data, and is counted in `nonfinite`.

    Args:
      noise: [n, D].
      data: [n, D].
      labels: [n] integers in [0, num_classes); read for `per_class` only. A point with
        any other label keeps the noise of its own number.
      key: for 'row_sampling' only.
      method: 'permutation' uses every data point and every noise once. 'row_sampling'
        draws a noise for each data point from its row of the plan: some noises are used
        twice and others never, so that the noise is no longer quite N(0, I).
        'independent' pairs noise i with data point i.
      per_class: a noise may only go to data of the class that data point of the same
        number has.
      num_classes: needed for `per_class`.
      epsilon: entropic regularisation, in standard deviations of the (class's) cost;
        may be traced.
      max_iterations: of Sinkhorn.
      tolerance: of Sinkhorn, on the L1 error of marginals that sum to 1.
      class_capacity: most points of a class for the fast path of `per_class`, which
        needs max_classes * class_capacity**2 floats a matrix; None for the mean over
        the classes and four deviations.
      max_classes: most classes in a pool for the fast path; None for `num_classes`.
        Pools with larger or more classes are coupled exactly too, only slower; nothing
        is compiled again.

    Returns:
      A `Coupling`. Report of every method:
        cost, cost_independent: mean squared distance of the pairs, and of pairing noise
          i with data point i.
        cost_ratio: their ratio.
        used_noise: share of the noises that the pairing uses; 1 for a permutation.
        nonfinite: number of data points with a value that is not finite.
      Of the plan P, for all methods but 'independent':
        entropy: H(P) / log n - 1; 0 is a permutation, 1 independence. Of classes: the
          mean over the points.
        converged: share of the problems whose error reached the tolerance.
        iterations: of Sinkhorn, the most over the problems.
        marginal_error: L1 error of the noise's marginal (rows of data are normalised).
        unique_noise: share of the noises that are the likeliest of some data point.
        unique_data: share of the data that are the likeliest of some noise.
      Of the permutation:
        gap: bound, from the dual, on the gain that is missed: that of an optimal
          permutation over the independent pairing is at most 1 / (1 - gap) times ours.
        rounds: of the auction; 0 for 'row_sampling'.

    Raises:
      ValueError: shapes or options do not fit.
    """
    _check(
        noise, data, labels, key,
        method, per_class, num_classes, epsilon, class_capacity, max_classes,
    )  # fmt: skip
    size = data.shape[0]
    here = jnp.arange(size, dtype=jnp.int32)
    noise, data = noise.astype(jnp.float32), data.astype(jnp.float32)
    finite = jnp.isfinite(data).all(axis=1)

    solve = functools.partial(
        _solve, method=method, epsilon=epsilon, max_iterations=max_iterations,
        tolerance=tolerance,
    )  # fmt: skip
    report = {'nonfinite': jnp.sum(~finite)}
    if method == 'independent':
        index = here
    elif not per_class:
        points, report_plan = solve(_centre(noise), _centre(data), None, key)
        index = points['choice']
    else:
        points, report_plan = _solve_classes(
            solve, _centre(noise), _centre(data), labels, key,
            num_classes, class_capacity, min(max_classes or num_classes, num_classes),
        )  # fmt: skip
        index = points['choice']

    safe = jnp.where(finite[:, None], data, 0.0)
    count = jnp.maximum(finite.sum(), 1)
    pair_cost = lambda x0: (  # noqa: E731
        jnp.sum(jnp.where(finite[:, None], jnp.square(x0 - safe), 0.0)) / count
    )
    share = lambda numbers: (  # noqa: E731
        jnp.zeros(size).at[numbers].set(1.0).mean()
    )
    cost, cost_independent = pair_cost(noise[index]), pair_cost(noise)
    report |= {
        'cost': cost,
        'cost_independent': cost_independent,
        'cost_ratio': cost / cost_independent,
        'used_noise': share(index),
    }
    if method != 'independent':
        report |= report_plan
        report |= {
            'entropy': points['entropy'].mean(),
            'marginal_error': jnp.abs(points['noise_mass'] - 1.0).mean(),
            'unique_noise': share(points['likeliest_noise']),
            'unique_data': share(points['likeliest_data']),
        }
    if method == 'permutation':
        excess = 2 * points['excess'].mean()
        best_gain = cost_independent - cost + excess
        report['gap'] = excess / jnp.maximum(best_gain, jnp.finfo(jnp.float32).tiny)
    return Coupling(index, {k: v.astype(jnp.float32) for k, v in report.items()})


def _check(
    noise, data, labels, key,
    method, per_class, num_classes, epsilon, class_capacity, max_classes,
):  # fmt: skip
    if method not in METHODS:
        raise ValueError(
            f'transport.method = {method!r} is not one of {", ".join(METHODS)}; '
            'choose one of them'
        )
    if data.ndim != 2 or noise.shape != data.shape:
        raise ValueError(
            f'noise is {noise.shape} and data {data.shape}; both must be [n, D] with '
            'the same n and D: flatten images first'
        )
    if not isinstance(epsilon, jax.core.Tracer) and not epsilon > 0:
        raise ValueError(
            f'transport.epsilon = {epsilon} must be above 0, in standard deviations '
            "of the cost; 0.1 is usual. For no coupling use method = 'independent'"
        )
    if method == 'row_sampling' and key is None:
        raise ValueError(
            "key = None, but transport.method = 'row_sampling' draws; pass a "
            'jax.random key'
        )
    if not per_class:
        return
    if labels is None or labels.shape != data.shape[:1]:
        seen = None if labels is None else labels.shape
        raise ValueError(
            f'labels is {seen}, but transport.per_class = True needs one label for '
            f'each of the {data.shape[0]} data points; pass [n] integers or set it to '
            'False'
        )
    if num_classes < 1:
        raise ValueError(
            f'num_classes = {num_classes} must be at least 1 for transport.per_class'
        )
    if class_capacity is not None and not 1 <= class_capacity <= data.shape[0]:
        raise ValueError(
            f'class_capacity = {class_capacity} must be between 1 and the number of '
            f'data points, {data.shape[0]}; None chooses one'
        )
    if max_classes is not None and max_classes < 1:
        raise ValueError(
            f'max_classes = {max_classes} must be at least 1; None for num_classes'
        )


def _solve_classes(
    solve, noise, data, labels, key, num_classes, class_capacity, blocks
):
    """One problem for each class; results by point, as if it were one problem.

    The shapes are static: classes are blocks of a fixed capacity, padded with points
    that can only be paired with themselves. Where a class does not fit, or there are
    more than `blocks`, the whole pool is one problem with a mask; one of both is run.
    """
    size = data.shape[0]
    here = jnp.arange(size, dtype=jnp.int32)
    known = (labels >= 0) & (labels < num_classes)
    group = jnp.where(known, labels, num_classes).astype(jnp.int32)
    counts = jnp.zeros(num_classes + 1, jnp.int32).at[group].add(1)
    # The classes that are there, numbered; more than there are blocks fall off the end.
    present = counts[:num_classes] > 0
    number = jnp.append(jnp.cumsum(present) - 1, blocks).astype(jnp.int32)
    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    start = jnp.cumsum(counts) - counts
    rank = here - start[group[order]]  # Within its class, of the points in order.

    mean = size / blocks
    capacity = class_capacity or 8 * math.ceil((mean + 4 * math.sqrt(mean)) / 8)

    def in_blocks():
        table = jnp.full((blocks, capacity), size, jnp.int32)
        # Points of unknown class fall off the end, too.
        table = table.at[number[group[order]], rank].set(order, mode='drop')
        valid = table < size
        rows = jnp.minimum(table, size - 1)
        place = jnp.arange(1, capacity + 1, dtype=jnp.int32)
        padded = jnp.where(valid, 0, place[None])
        keys = None if key is None else jax.random.split(key, blocks)
        solve_each = jax.vmap(functools.partial(solve, num_groups=capacity + 1))
        points, report = solve_each(noise[rows], data[rows], padded, keys)
        # From places in a block to numbers in the pool.
        for name in ('choice', 'likeliest_noise', 'likeliest_data'):
            points[name] = jnp.take_along_axis(rows, points[name], axis=1)
        alone = {
            'choice': here, 'likeliest_noise': here, 'likeliest_data': here,
            'entropy': jnp.zeros(size), 'noise_mass': jnp.ones(size),
            'excess': jnp.zeros(size),
        }  # fmt: skip
        points = {
            name: alone[name].at[table].set(points[name], mode='drop')
            for name in points
        }
        share = valid.sum(1) / jnp.maximum(valid.sum(), 1)
        return points, {
            'converged': jnp.sum(share * report['converged']),
            'iterations': report['iterations'].max(),
            'rounds': report['rounds'].max(),
        }

    def in_one():
        own = jnp.where(known, group, num_classes + here)
        return solve(noise, data, own, key, num_classes + size)

    if capacity >= size:
        return in_one()
    fits = (counts[:num_classes].max() <= capacity) & (present.sum() <= blocks)
    return jax.lax.cond(fits, in_blocks, in_one)


def _centre(points):
    """Points [n, D] minus their mean; those that are not finite become the mean."""
    usable = jnp.isfinite(points).all(1)[:, None]
    count = jnp.maximum(usable.sum(), 1)
    mean = jnp.where(usable, points, 0.0).sum(0, keepdims=True) / count
    return jnp.where(usable, points - mean, 0.0)


def _solve(
    noise, data, group, key, num_groups=1,
    *, method, epsilon, max_iterations, tolerance,
):  # fmt: skip
    """Couples noises and data of equal group (all with all for None).

    Args:
      noise, data: [n, D] float32, centred.
      group: [n] integers below `num_groups`; noise i and data point i have the same.

    Returns:
      Values by point [n]: for data points `choice`, `likeliest_noise`, `entropy` and
      `excess` (similarity that the dual bound leaves to be gained), for noises
      `likeliest_data` and `noise_mass` (1 where the marginal is met); and scalars.
    """
    size = data.shape[0]
    # [data, noise]. Products in full float32: bfloat16 would move the optimum.
    similarity = jnp.matmul(data, noise.T, precision='highest')
    if group is None:
        count = jnp.full(size, float(size))
        square = jnp.full(size, jnp.square(similarity).mean(1).mean())
    else:
        allowed = group[:, None] == group[None]
        count = allowed.sum(1).astype(jnp.float32)
        within = lambda x: jnp.where(allowed, x, 0.0)  # noqa: E731
        group_mean = lambda x: (  # noqa: E731
            jnp.zeros(num_groups).at[group].add(x / count)[group]
        )
        # The same as points that are centred within their group.
        row_mean = within(similarity).sum(1) / count
        column_mean = within(similarity).sum(0) / count
        similarity += (group_mean(row_mean) - row_mean)[:, None] - column_mean[None]
        square = group_mean(within(jnp.square(similarity)).sum(1) / count)
    scale = jnp.where(square > 0, jnp.sqrt(square), 1.0)
    similarity /= scale[:, None]
    if group is not None:
        similarity = jnp.where(allowed, similarity, FORBIDDEN)

    with jax.numpy_rank_promotion('allow'):  # ott relies on it.
        plan = linear.solve(
            geometry.Geometry(cost_matrix=-similarity, epsilon=epsilon),
            threshold=tolerance, max_iterations=max_iterations,
            inner_iterations=SINKHORN_INNER_ITERATIONS,
            momentum=acceleration.Momentum(value=SINKHORN_MOMENTUM),
        )  # fmt: skip
    # What a data point has to pay for a noise. From any price the auction is right.
    price = jnp.where(jnp.isfinite(plan.g), -plan.g, 0.0)
    # The plan, with rows that sum to exactly 1.
    logits = (similarity - price[None]) / epsilon
    top = logits.max(1)
    weight = jnp.exp(logits - top[:, None])
    total = weight.sum(1)
    # sum_j p_j log p_j = sum_j p_j (logit_j - top) - log total
    expected = jnp.sum(weight * (logits - top[:, None]), axis=1) / total
    entropy = jnp.log(total) - expected
    weight /= total[:, None]
    likeliest_noise = _first(logits == top[:, None], axis=1)

    if method == 'permutation':
        choice, price, rounds = _auction(similarity, price, likeliest_noise)
    else:
        choice = jax.random.categorical(key, logits, axis=1).astype(jnp.int32)
        rounds = jnp.zeros((), jnp.int32)
    # Weak duality, for a permutation: no other one is worth more than
    # sum_j price_j + sum_i max_j (similarity_ij - price_j).
    worth = similarity - price[None]
    own = jnp.take_along_axis(worth, choice[:, None], axis=1)[:, 0]
    points = {
        'choice': choice,
        'likeliest_noise': likeliest_noise,
        'likeliest_data': _first(weight == weight.max(0, keepdims=True), axis=0),
        # H(P) = log n + mean entropy of the rows.
        'entropy': entropy / jnp.log(jnp.maximum(count, 2.0)),
        'noise_mass': weight.sum(0),
        'excess': (worth.max(1) - own) * scale,
    }
    return points, {
        'converged': jnp.asarray(plan.converged, jnp.float32),
        'iterations': jnp.asarray(plan.n_iters, jnp.int32),
        'rounds': rounds,
    }


def _first(hit: jax.Array, axis: int) -> jax.Array:
    """Number of the first true element; XLA vectorises this, and argmax it does not."""
    size = hit.shape[axis]
    number = jax.lax.broadcasted_iota(jnp.int32, hit.shape, axis)
    return jnp.where(hit, number, size - 1).min(axis)


def _auction(value, price, favourite):
    """Assigns every row its own column, for nearly the largest total value.

    Each row first gets its favourite column, if no other row has it. A row without a
    column bids for the one that is worth most to it after its price, up to where the
    second best would be as good and `AUCTION_INCREMENT` more; the highest bidder gets
    the column, at that price, and its former owner bids next. The total is within
    `AUCTION_INCREMENT` per row of the optimum (Bertsekas, "Auction algorithms for
    network flow problems: a tutorial introduction", 1992), from any prices; from
    Sinkhorn's, few bids are left to make.

    `AUCTION_BIDDERS` rows bid at a time, the others wait, so that a round reads few
    rows of the matrix.

    Args:
      value: [n, n] of a row for a column.
      price: [n] of the columns.
      favourite: [n] int32, argmax of value - price for each row.

    Returns:
      column of each row [n] int32, final prices [n], number of rounds.
    """
    size = value.shape[0]
    bidders = min(AUCTION_BIDDERS, size)
    nobody = jnp.int32(size)
    number = jnp.arange(size, dtype=jnp.int32)
    earlier = jnp.tri(bidders, k=-1, dtype=bool)

    owner = jnp.full(size, nobody).at[favourite].min(number)
    without = owner[favourite] != number
    waiting = jnp.nonzero(without, size=size, fill_value=size)[0].astype(jnp.int32)
    next_row = lambda at: waiting.at[at].get(  # noqa: E731
        mode='fill', fill_value=size
    )

    def go_on(carry):
        _, _, rows, _, rounds = carry
        return (rows < nobody).any() & (rounds < AUCTION_ROUNDS_PER_POINT * size)

    def play(carry):
        price, owner, rows, served, rounds = carry
        worth = value.at[rows].get(mode='clip') - price[None]
        best = worth.max(1)
        wanted = _first(worth == best[:, None], axis=1)
        others = jnp.where(number[None] == wanted[:, None], -jnp.inf, worth).max(1)
        others = jnp.where(jnp.isfinite(others), others, best)
        bid = price[wanted] + (best - others) + AUCTION_INCREMENT

        bids = rows < nobody
        rival = (wanted[:, None] == wanted[None]) & bids[None]
        higher = bid[None] > bid[:, None]
        equal = (bid[None] == bid[:, None]) & earlier
        wins = bids & ~(rival & (higher | equal)).any(1)

        outbid = owner[wanted]
        sold = jnp.where(wins, wanted, nobody)
        price = price.at[sold].set(bid, mode='drop')
        owner = owner.at[sold].set(rows, mode='drop')
        # A winner's place goes to the row that lost the column, or to the next waiting.
        rows = jnp.where(wins, outbid, rows)
        empty = rows == nobody
        before = jnp.sum(earlier & empty[None], axis=1).astype(jnp.int32)
        rows = jnp.where(empty, next_row(served + before), rows)
        served = jnp.minimum(served + empty.sum().astype(jnp.int32), nobody)
        return price, owner, rows, served, rounds + 1

    price, owner, _, _, rounds = jax.lax.while_loop(
        go_on,
        play,
        (price, owner, next_row(number[:bidders]), jnp.int32(bidders), jnp.int32(0)),
    )
    column = jnp.full(size, nobody).at[owner].set(number, mode='drop')
    # Only where the rounds ran out: the rest is paired in order.
    rows = jnp.nonzero(column == nobody, size=size, fill_value=size)[0]
    columns = jnp.nonzero(owner == nobody, size=size, fill_value=size)[0]
    column = column.at[rows].set(columns.astype(jnp.int32), mode='drop')
    return column, price, rounds


def class_skew(
    noise: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int,
    test_share: float = 0.5,
    ridge: float = 1.0,
) -> dict[str, jax.Array]:
    """How much paired noise tells about the class; sampling assumes nothing.

    Args:
      noise: [n, D], noise in the order of the data it was paired with, of one or
        several pools one after the other.
      labels: [n] integers in [0, num_classes).
      test_share: share of the points, from the end, that the classifier is tested on;
        it is fitted on the others. Let the border fall between pools.
      ridge: of the classifier's weights, as a share of the number of fitted points.

    Returns:
      mean_norm: [num_classes] norm of the class's mean noise.
      mean_norm_expected: [num_classes] what N(0, I) gives for so many points,
        sqrt(D / n_c).
      covariance_error: [num_classes] Frobenius norm of the class's second moment about
        its mean, minus I.
      covariance_error_expected: [num_classes] sqrt(D (D + 1) / n_c).
      accuracy: of a linear classifier (ridge regression on one-hot labels) of the class
        from the noise, on the test points.
      chance: the share of the test points that the most frequent class has.
    """
    size, dimension = noise.shape
    one_hot = jax.nn.one_hot(labels, num_classes)
    count = jnp.maximum(one_hot.sum(0), 1.0)
    product = functools.partial(jnp.matmul, precision='highest')
    mean = product(one_hot.T, noise) / count[:, None]

    def covariance_error(label):
        member = (labels == label)[:, None]
        centred = jnp.where(member, noise - mean[label][None], 0.0)
        moment = product(centred.T, centred) / count[label]
        return jnp.linalg.norm(moment - jnp.eye(dimension))

    border = size - int(size * test_share)
    fit, target = noise[:border], one_hot[:border]
    gram = product(fit.T, fit) + ridge * border * jnp.eye(dimension)
    target = target - target.mean(0, keepdims=True)
    weights = jax.scipy.linalg.solve(gram, product(fit.T, target), assume_a='pos')
    guess = jnp.argmax(product(noise[border:], weights), axis=1)
    return {
        'mean_norm': jnp.linalg.norm(mean, axis=1),
        'mean_norm_expected': jnp.sqrt(dimension / count),
        'covariance_error': jax.lax.map(covariance_error, jnp.arange(num_classes)),
        'covariance_error_expected': jnp.sqrt(dimension * (dimension + 1) / count),
        'accuracy': jnp.mean(guess == labels[border:]),
        'chance': one_hot[border:].mean(0).max(),
    }
