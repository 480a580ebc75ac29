"""Semidiscrete optimal transport: noise N(0, I) against the whole data set.

Each data point j has one number, its potential g_j, and a noise sample x0 belongs to

    argmax_j <x0, x1_j> + g_j    over the points x1_j of its class

(arXiv 2509.25519, 2510.15038). At the right potentials every point of a class gets
noise with the same probability, and no coupling with these marginals has a lower cost.
The potentials are learned once. A pool is then paired without solving a problem of its
own, however large the pool: labels and noise are drawn independently, so noise is
N(0, I) given the class, and the data point follows from both.

**Cost.** The negative dot product, as in `coupling`: squared norms of data go into the
potentials. Adding a vector to all points of a class changes nothing, so they are
centred.

**Epsilon is 0.** With an entropic plan x0 would draw its point from a softmax. That is
a less sharp coupling with the same marginals, for one more random number. The gradient
needs no smoothing either: averaging over the last half of the ascent does that.

**Ascent.** The semidual is concave, and its gradient in g_j is 1/n minus the
probability that x0 belongs to j. OTT's `SemidiscreteSolver` ascends the same function
and finds the same potentials (a test compares them). We do not use it, because it
compiles a program for each class size and number of steps, and averages by an EMA,
whose decay would have to follow the number of steps. Here a class of any size runs the
program of its padded size, and the average is that of the last half. On two CPU cores a
step takes about 0.8 times as long as OTT's.

**Identical points** share their noise unevenly, as the argmax picks the first. The
pairs are the same.

Points are float16, in which pixels and latents differ from float32 by less than one
grey level; 1.28 million latents of 4,096 values take 10.5 GB of the host's memory. They
visit the device one class at a time.
"""

from collections.abc import Sequence
import functools
import hashlib

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
import numpy as np

from ism_jax.method import random_streams
from ism_jax.transport import assignment
from ism_jax.transport.coupling import Coupling

# Sizes of the first step and of those in the last half, as the relative change of a
# point's probability that follows from a relative error of 1 in it. With 32 samples per
# point of Fashion-MNIST, hit errors are 0.21 to 0.25, or 0.31 to 0.41 with 0.05 from
# the start; with 128 samples both give 0.11 to 0.12.
FIRST_RATE, LAST_RATE = 0.4, 0.05
# Bounds on the noise samples of a step, and on the values that they take.
MAX_BATCH, MAX_VALUES = 2**12, 2**26
# Class sizes are rounded up to a multiple, so that few programs are compiled.
SIZE_MULTIPLE = 256
# So are the noise samples of a class in a pool.
ROW_MULTIPLE = 32
# Noise samples per point that the report is measured with.
REPORT_SAMPLES = 16


def fit_potentials(
    points: Sequence[np.ndarray], key: jax.Array, *, samples_per_point: int
) -> tuple[list[np.ndarray], dict[str, float]]:
    """Learns the potentials of each class.

    Memory on the device: a few copies of one class in float32, and of `MAX_VALUES`
    values.

    Args:
      points: for each class its points [n_c, D]; n_c may be 0.
      key: random key.
      samples_per_point: noise samples from which the potentials are learned, per point.
        Relative errors of probabilities are at least 1 / sqrt(samples_per_point).

    Returns:
      For each class [n_c] float32, and a report measured on fresh noise:
        hit_error: relative standard deviation of the points' probabilities within
          their class, without the sampling error of the measurement; 0 is perfect.
        cost, cost_independent: mean squared distance of pairs, and of independent ones.
        cost_ratio: their ratio.
    """
    potentials, sums = [], []
    for label, members in enumerate(points):
        size = len(members)
        if not size:
            potentials.append(np.zeros(0, np.float32))
            continue
        padded = _padded(members)
        batch = min(len(padded), MAX_BATCH, max(1, MAX_VALUES // len(padded)))
        potential, sums_of_class = _fit_class(
            padded,
            size,
            jax.random.fold_in(key, label),
            steps=-(-samples_per_point * size // batch),
            # At least two, so that the variance can be estimated.
            report_steps=-(-REPORT_SAMPLES * size // batch) + 1,
            batch=batch,
        )
        potentials.append(np.asarray(potential)[:size])
        sums.append([float(s) for s in sums_of_class])
    count = sum(map(len, points))
    chi2, square, product = np.sum(sums, axis=0) / count
    independent = points[0].shape[1] + square
    cost = independent - 2 * product
    report = {
        'hit_error': max(chi2, 0.0) ** 0.5,
        'cost': cost,
        'cost_independent': independent,
        'cost_ratio': cost / independent,
    }
    return potentials, {name: float(value) for name, value in report.items()}


def _padded(members: np.ndarray) -> np.ndarray:
    """Points [n, D] and rows of zeros up to a multiple of `SIZE_MULTIPLE`."""
    return np.pad(members, ((0, -len(members) % SIZE_MULTIPLE), (0, 0)))


@functools.partial(jax.jit, static_argnames='batch')
def _fit_class(points, count, key, *, steps, report_steps, batch):
    """Potentials [n] of padded points, of which `count` are real.

    Also returns, summed over the points, the relative squared error of their
    probabilities, their squared norms, and their <x0, x1>.
    """
    real = jnp.arange(len(points)) < count
    mean = jnp.sum(points, axis=0, dtype=jnp.float32, keepdims=True) / count
    centred = jnp.where(real[:, None], points - mean, 0.0)
    square = jnp.sum(jnp.square(centred), axis=1)
    if centred.shape[0] < centred.shape[1]:
        # The products of N(0, I) with the points have the Gram matrix as covariance,
        # so fewer dimensions suffice: R' of X' = Q R has the same Gram matrix.
        centred = jnp.linalg.qr(centred.T, mode='r').T
    learn, check = jax.random.split(key)
    potential = _ascend(centred, jnp.sqrt(square), real, count, learn, steps, batch)
    hits, product = _hits(centred, potential, check, report_steps, batch)
    samples = batch * report_steps
    # Unbiased, because E[h (h - 1)] = S (S - 1) p^2 for a binomial h (arXiv 2509.25519,
    # equation 3.5).
    pairs = jnp.sum(hits * ((hits - 1) / samples)) / (samples - 1)
    return potential, (
        count * (count * pairs - 1),
        jnp.sum(square) + count * jnp.sum(jnp.square(mean)),
        count * product,
    )


def _ascend(points, length, real, count, key, steps, batch) -> jax.Array:
    """Averaged stochastic gradient ascent of the semidual; potentials [n].

    If the values <x0, x1_j> were independent with standard deviations s_j, g_j = -q s_j
    would give each point the probability 1 / n, where a normal variable exceeds q with
    that probability. This is the start. It also sets the size of a step: in this model
    a change of g_j by s_j / q changes the logarithm of the probability by about 1. The
    size decreases over the first half of the steps; the average is over the last half.
    """
    quantile = norm.isf(1 / jnp.maximum(count, 2))
    start = jnp.where(real, -quantile * length, -jnp.inf)
    unit = jnp.sum(length) / count / jnp.maximum(quantile, 1.0)
    # With fewer samples than points, one hit is worth n / B points' shares.
    unit *= jnp.minimum(1.0, batch / count)

    def step(number, carry):
        potential, mean = carry
        noise = _noise(key, number, batch, points)
        owner, _ = _owners(noise, points, potential)
        relative = jnp.zeros(len(points)).at[owner].add(count / batch)
        progress = jnp.minimum(1.0, 2 * number / steps)
        rate = FIRST_RATE * (LAST_RATE / FIRST_RATE) ** progress
        potential += rate * unit * (1.0 - relative)
        late = jnp.maximum(number - steps // 2 + 1, 1)  # In the last half.
        mean = jnp.where(real, mean + (potential - mean) / late, -jnp.inf)
        return potential, mean

    return jax.lax.fori_loop(0, steps, step, (start, start))[1]


def _hits(points, potential, key, steps, batch):
    """Hits of each point [n] in batch * steps samples, and the mean of <x0, x1>."""

    def step(number, carry):
        hits, product = carry
        noise = _noise(key, number, batch, points)
        owner, products = _owners(noise, points, potential)
        return hits.at[owner].add(1.0), product + products.mean() / steps

    start = jnp.zeros(len(points)), jnp.zeros(())
    return jax.lax.fori_loop(0, steps, step, start)


def _noise(key, number, batch, points):
    shape = batch, points.shape[1]
    return jax.random.normal(jax.random.fold_in(key, number), shape)


def _owners(noise, points, potential):
    """The point that each noise sample [B, D] belongs to [B], and its <x0, x1> [B]."""
    # Products in full float32, so that learning and pairing agree on every device.
    value = jnp.matmul(noise, points.T, precision='highest') + potential[None]
    owner = assignment.argmax(value, axis=1)
    return owner, value.max(1) - potential[owner]


class Pairing:
    """Chooses the data of a pool: the point of each noise sample, given its class.

    Thread-safe. The result depends on the arguments and the key alone, so all processes
    agree.

    Args:
      points: for each class its points [n_c, D].
      members: for each class the indices [n_c] of its points in the data set.
      potentials: [N] float32, by index in the data set.
      image_shape: (H, W, C) of a noise sample, with D = H W C.
      seed_key: the run's key.
    """

    def __init__(self, points, members, potentials, *, image_shape, seed_key):
        self._points = points
        self._members = members
        self._potentials = potentials
        self._seed_key = seed_key
        self._choose = jax.jit(functools.partial(_choose, image_shape=image_shape))

    def __repr__(self):
        digest = hashlib.sha256(self._potentials.tobytes()).hexdigest()[:12]
        return f'Pairing({len(self._potentials)} potentials, sha256 {digest})'

    def __call__(self, number: int, labels: np.ndarray, flip: np.ndarray) -> np.ndarray:
        """Indices [n] in the data set, for noise 0 .. n - 1 of a pool.

        A flipped image is paired with the noise whose mirror image belongs to the
        image: <x0, flip(x1)> = <flip(x0), x1>, and flip(x0) is N(0, I) too.

        Args:
          number: number of the pool.
          labels: [n] class of each sample.
          flip: [n] bool, whether its image will be mirrored.
        """
        pool_key = random_streams.stream(self._seed_key, random_streams.NOISE, number)
        index = np.empty(len(labels), np.int64)
        for label in np.unique(labels):
            (places,) = np.nonzero(labels == label)
            members = self._members[label]
            points = _padded(self._points[label])
            potential = np.full(len(points), -np.inf, np.float32)
            potential[: len(members)] = self._potentials[members]
            rows = np.pad(places, (0, -len(places) % ROW_MULTIPLE), 'edge')
            owner = self._choose(points, potential, pool_key, rows, flip[rows])
            index[places] = members[np.asarray(owner)[: len(places)]]
        return index


def _choose(points, potential, pool_key, numbers, flip, *, image_shape):
    """The point [n] of each noise sample of a pool, given by its number [n]."""
    noise = random_streams.sample_noise(pool_key, numbers, image_shape)
    noise = jnp.where(flip[:, None, None, None], noise[:, :, ::-1], noise)
    flat = noise.reshape(len(numbers), -1)
    return _owners(flat, points.astype(jnp.float32), potential)[0]


def couple_pool(data: jax.Array, labels: jax.Array, pool_key: jax.Array) -> Coupling:
    """The coupling of a pool whose data a `Pairing` chose: data point i with noise i.

    To be called under `jax.jit`, like `coupling.couple_pool`, whose report has more.

    Args:
      data: [n, ...].
      labels: [n], not used.
      pool_key: scalar key, one per pool.
    """
    del labels
    number = jnp.arange(len(data), dtype=jnp.int32)
    noise = random_streams.sample_noise(pool_key, number, data.shape[1:])
    square = lambda x: jnp.sum(jnp.square(x)) / len(x)
    cost, independent = square(noise - data), data[0].size + square(data)
    report = {
        'cost': cost,
        'cost_independent': independent,
        'cost_ratio': cost / independent,
    }
    return Coupling(number, report)
