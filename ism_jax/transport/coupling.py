"""Scaling optimal transport (sOT): one coupling of noise and data over many batches.

Straight paths need well paired noise and data, and a batch has too few points for
that. iSM (arXiv 2510.21250, "scaling optimal transport") pools K batches of size M,
solves one entropic problem between the n = K M noise samples and the n data points,
pairs them by its plan, and splits the pairs into K batches again.

**Cost.** The negative dot product of centred points. Squared norms and means add terms
that depend on one point of a pair only. These do not change the optimal plan, but they
worsen the conditioning (arXiv 2506.05526) and would enter the standard deviation of the
cost, which epsilon is relative to.

**Marginals.** The plan is rounded to a permutation: each data point and each noise
sample of the pool is used exactly once. An auction (Bertsekas 1992) rounds it, starting
from Sinkhorn's potentials, and the report bounds the distance to the optimum. Data and
labels never move: a coupling is the noise index of each data point.

**Classes.** A class-blind coupling makes p(x0 | c) differ from N(0, I), but sampling
draws x0 from N(0, I) for every class (C2OT, arXiv 2503.10636). With `per_class` each
class is a separate problem, between its data and the noise of the same indices. The
indices do not depend on the noise, so the noise is N(0, I) given the class.

**Devices.** Rounding depends on how sums are split over devices, and one bit can change
a pairing. With a `mesh`, `couple_pool` therefore gathers the data, and every device
runs the same program on all of it. The pairing does not depend on the devices, so a
run may resume on another number of them.
"""

import functools
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ism_jax.method import random_streams
from ism_jax.transport import assignment, class_blocks, sinkhorn

Method = Literal['permutation', 'row_sampling']

# Similarity, in standard deviations, of points of different classes: below any price,
# and finite, so that differences are finite too.
FORBIDDEN = -1e6
# Folded into the pool's key for row sampling; no noise has this index.
SAMPLING_NUMBER = 2**32 - 1


class Coupling(NamedTuple):
    """A pairing of the noise and the data of a pool.

    Attributes:
      noise_index: [n] int32; data point j is paired with noise `noise_index[j]`.
      report: float32 scalars by name:
        cost, cost_independent: mean squared distance of the pairs, and of the pairs of
          noise i and data point i.
        cost_ratio: their ratio.
        used_noise: share of the noise samples that are used; 1 for a permutation.
        nonfinite: number of data points that are not finite.
        entropy: H(P) / log n - 1 of the plan P; 0 for a permutation, 1 for
          independence. With classes, the mean over the points.
        converged: share of the problems whose error reached the tolerance.
        iterations: Sinkhorn iterations, the maximum over the problems.
        marginal_error: L1 error of the noise's marginal (rows of data are normalised).
        unique_noise: share of the noise samples that are likeliest for a data point.
        unique_data: share of the data points that are likeliest for a noise sample.
        rounds: rounds of the auction; 0 for 'row_sampling'.
        gap ('permutation' only): the gain of an optimal permutation over the
          independent pairing is at most 1 / (1 - gap) times this one's.
    """

    noise_index: jax.Array
    report: dict[str, jax.Array]


def couple_pool(
    data: jax.Array,
    labels: jax.Array | None,
    pool_key: jax.Array,
    *,
    mesh: jax.sharding.Mesh | None = None,
    **options,
) -> Coupling:
    """Couples a pool with `random_streams.sample_noise(pool_key, arange(n), ...)`.

    To be called under `jax.jit`. The pairing is a function of data, labels and key
    alone; with `mesh` it does not depend on the mesh or the sharding of the data.
    Memory per device: the pool twice and about four [n, n] float32 matrices.

    Args:
      data: [n, ...]; replicated, or split over `mesh`.
      labels: [n] integers; None for a class-blind coupling.
      pool_key: scalar key, one per pool.
      mesh: devices of `data`, required if there are several; None for one device.
      **options: arguments of `couple`.
    """

    def solve_pool(data, labels, pool_key):
        size = data.shape[0]
        noise = random_streams.sample_noise(pool_key, jnp.arange(size), data.shape[1:])
        key = jax.random.fold_in(pool_key, jnp.uint32(SAMPLING_NUMBER))
        return couple(
            noise.reshape(size, -1), data.reshape(size, -1), labels, key, **options
        )

    if mesh is None:
        return solve_pool(data, labels, pool_key)
    # Gathered outside of `shard_map`, whose body is then the same for every mesh.
    inputs = jax.lax.with_sharding_constraint(
        (data, labels, pool_key), NamedSharding(mesh, P())
    )
    return jax.shard_map(
        solve_pool, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
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
    epsilon: float | jax.Array = 0.1,
    max_iterations: int = 200,
    tolerance: float = 0.05,
    class_capacity: int | None = None,
    max_classes: int | None = None,
) -> Coupling:
    """Couples noise and data.

    A data point that is not finite does not affect others: it is coupled as if it were
    the mean of the data, and `nonfinite` counts it.

    Args:
      noise: [n, D].
      data: [n, D].
      labels: [n] integers in [0, num_classes), for `per_class` only. A point with any
        other label keeps the noise of the same index.
      key: random key for 'row_sampling', or None.
      method: 'permutation' uses every data point and every noise sample once.
        'row_sampling' draws noise for each data point from its row of the plan: some is
        used twice and some never, so the noise is no longer exactly N(0, I).
      per_class: pair a data point only with noise whose index belongs to its class.
      num_classes: number of classes, for `per_class`.
      epsilon: entropic regularisation, in standard deviations of the (class's) cost;
        may be traced.
      max_iterations: upper bound on the Sinkhorn iterations.
      tolerance: bound on the L1 error of Sinkhorn's marginals, which sum to 1.
      class_capacity: largest class of the fast path of `per_class`, which takes
        max_classes * class_capacity**2 floats per matrix; None for the mean class size
        plus four standard deviations.
      max_classes: largest number of classes in the fast path; None for `num_classes`.
        Pools with larger or more classes get the same coupling more slowly, without a
        new compilation.

    Returns:
      A `Coupling`.
    """
    chex.assert_equal_shape((noise, data))
    chex.assert_rank(data, 2)
    noise, data = noise.astype(jnp.float32), data.astype(jnp.float32)
    solve_one = functools.partial(
        solve,
        method=method,
        epsilon=epsilon,
        max_iterations=max_iterations,
        tolerance=tolerance,
    )
    if per_class:
        chex.assert_shape(labels, data.shape[:1])
        points, solver_report = class_blocks.solve_classes(
            solve_one,
            _centre(noise),
            _centre(data),
            labels,
            key,
            num_classes=num_classes,
            class_capacity=class_capacity,
            max_classes=max_classes,
        )
    else:
        points, solver_report = solve_one(_centre(noise), _centre(data), None, key)
    report = solver_report | _report(noise, data, points, method)
    return Coupling(
        points['choice'], {k: v.astype(jnp.float32) for k, v in report.items()}
    )


def _centre(points):
    """Points [n, D] minus their mean; points that are not finite become the mean."""
    finite = jnp.isfinite(points).all(1)[:, None]
    count = jnp.maximum(finite.sum(), 1)
    mean = jnp.where(finite, points, 0.0).sum(0, keepdims=True) / count
    return jnp.where(finite, points - mean, 0.0)


def solve(
    noise: jax.Array,
    data: jax.Array,
    group: jax.Array | None,
    key: jax.Array | None,
    num_groups: int = 1,
    *,
    method: Method,
    epsilon: float | jax.Array,
    max_iterations: int,
    tolerance: float,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Couples noise and data of equal group.

    Args:
      noise, data: [n, D] float32, centred.
      group: [n] integers below `num_groups`, of noise i and of data point i; None for a
        single group.
      key: see `couple`.
      num_groups: number of groups.
      method, epsilon, max_iterations, tolerance: see `couple`.

    Returns:
      Values per point [n]. For data points: `choice` (index of the noise),
      `likeliest_noise`, `entropy` and `excess` (similarity below the dual bound). For
      noise samples: `likeliest_data` and `noise_mass` (1 if the marginal is met). And
      scalars: `converged`, `iterations` and `rounds`.
    """
    similarity, scale, count = _similarity(noise, data, group, num_groups)
    plan = sinkhorn.solve(
        similarity, epsilon=epsilon, max_iterations=max_iterations, tolerance=tolerance
    )
    likeliest_noise = assignment.argmax(plan.logits, axis=1)
    price = plan.price
    if method == 'permutation':
        choice, price, rounds = assignment.auction(similarity, price, likeliest_noise)
    else:
        choice = jax.random.categorical(key, plan.logits, axis=1).astype(jnp.int32)
        rounds = jnp.zeros((), jnp.int32)
    # Weak duality: no permutation has a larger similarity than
    # sum_j price_j + sum_i max_j (similarity_ij - price_j).
    profit = similarity - price[None]
    own = jnp.take_along_axis(profit, choice[:, None], axis=1)[:, 0]
    points = {
        'choice': choice,
        'likeliest_noise': likeliest_noise,
        'likeliest_data': assignment.argmax(plan.probability, axis=0),
        # H(P) = log n + mean entropy of the rows.
        'entropy': plan.entropy / jnp.log(jnp.maximum(count, 2.0)),
        'noise_mass': plan.probability.sum(0),
        'excess': (profit.max(1) - own) * scale,
    }
    return points, {
        'converged': plan.converged,
        'iterations': plan.iterations,
        'rounds': rounds,
    }


def _similarity(noise, data, group, num_groups: int):
    """Dot products [data, noise] over their standard deviation within the group.

    Also returns, for each point, that standard deviation and the size of its group.
    """
    size = data.shape[0]
    # Products in full float32: bfloat16 would move the optimum.
    similarity = jnp.matmul(data, noise.T, precision='highest')
    if group is None:
        count = jnp.full(size, float(size))
        square = jnp.full(size, jnp.square(similarity).mean(1).mean())
    else:
        allowed = group[:, None] == group[None]
        count = allowed.sum(1).astype(jnp.float32)

        def within(x):
            return jnp.where(allowed, x, 0.0)

        def group_mean(x):
            return jnp.zeros(num_groups).at[group].add(x / count)[group]

        # Equals the dot products of points that are centred within their group.
        row_mean = within(similarity).sum(1) / count
        column_mean = within(similarity).sum(0) / count
        similarity += (group_mean(row_mean) - row_mean)[:, None] - column_mean[None]
        square = group_mean(within(jnp.square(similarity)).sum(1) / count)
    scale = jnp.where(square > 0, jnp.sqrt(square), 1.0)
    similarity /= scale[:, None]
    if group is not None:
        similarity = jnp.where(allowed, similarity, FORBIDDEN)
    return similarity, scale, count


def _report(noise, data, points, method: Method) -> dict[str, jax.Array]:
    """The part of `couple`'s report that follows from the pairing."""
    finite = jnp.isfinite(data).all(axis=1)
    safe = jnp.where(finite[:, None], data, 0.0)
    count = jnp.maximum(finite.sum(), 1)

    def pair_cost(x0):
        square = jnp.where(finite[:, None], jnp.square(x0 - safe), 0.0)
        return jnp.sum(square) / count

    def share(index):
        return jnp.zeros(data.shape[0]).at[index].set(1.0).mean()

    cost, cost_independent = pair_cost(noise[points['choice']]), pair_cost(noise)
    report = {
        'nonfinite': jnp.sum(~finite),
        'cost': cost,
        'cost_independent': cost_independent,
        'cost_ratio': cost / cost_independent,
        'used_noise': share(points['choice']),
        'entropy': points['entropy'].mean(),
        'marginal_error': jnp.abs(points['noise_mass'] - 1.0).mean(),
        'unique_noise': share(points['likeliest_noise']),
        'unique_data': share(points['likeliest_data']),
    }
    if method == 'permutation':
        excess = 2 * points['excess'].mean()
        best_gain = cost_independent - cost + excess
        report['gap'] = excess / jnp.maximum(best_gain, jnp.finfo(jnp.float32).tiny)
    return report
