"""Potentials against a closed form, OTT and SciPy; pools against their laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ott.geometry import costs, semidiscrete_pointcloud
from ott.problems.linear import semidiscrete_linear_problem
from ott.solvers.linear import semidiscrete as ott_semidiscrete
import pytest
from scipy import stats
from scipy.optimize import linear_sum_assignment

from ism_jax import config as config_lib
from ism_jax.data import array_source
from ism_jax.experiment import Experiment
from ism_jax.method import random_streams
from ism_jax.runtime import sharding
from ism_jax.transport import semidiscrete

KEY = jax.random.key(5)


def _fit(points, samples=2000):
    (potential,), report = semidiscrete.fit_potentials(
        [points], KEY, samples_per_point=samples
    )
    return potential - potential.mean(), report


def _noise(size, dimension, seed=0):
    return np.random.default_rng(seed).normal(size=(size, dimension))


def _owners(noise, points, potential):
    return np.argmax(noise @ points.T + potential, axis=1)


def test_in_one_dimension_cells_are_quantile_intervals():
    points = np.array([-2.0, -1.5, 0.0, 0.25, 0.5, 3.0])[:, None].astype(np.float32)
    potential, report = _fit(points, samples=40_000)
    # The cells of neighbours meet where x0 (x1' - x1) = g - g', at the quantile j / n.
    border = -np.diff(potential) / np.diff(points[:, 0])
    np.testing.assert_allclose(
        border, stats.norm.ppf(np.arange(1, 6) / 6), rtol=0, atol=0.03
    )
    assert report['hit_error'] < 0.2  # Of 16 hits per point.
    noise = _noise(10_000, 1)
    expected = np.floor(6 * stats.norm.cdf(noise[:, 0]))
    assert np.mean(_owners(noise, points, potential) == expected) > 0.97


@functools.cache
def _cloud():
    """100 points [100, 8] of unequal lengths in clusters, and their potentials."""
    rng = np.random.default_rng(1)
    centres = 2 * rng.normal(size=(5, 8))
    points = centres[np.arange(100) % 5] * rng.uniform(0.2, 2, (100, 1))
    points = (points + rng.normal(size=(100, 8))).astype(np.float32)
    return points, *_fit(points)


def test_potentials_are_those_of_ott():
    points, potential, _ = _cloud()
    geometry = semidiscrete_pointcloud.SemidiscretePointCloud(
        jax.random.normal, jnp.asarray(points), costs.NegDotProduct(), epsilon=0.0
    )
    steps = 3000
    solver = ott_semidiscrete.SemidiscreteSolver(
        num_iterations=steps,
        batch_size=256,
        optimizer=optax.sgd(optax.cosine_decay_schedule(20.0, steps)),
        error_eval_every=steps,
        potential_ema=0.02,  # The weight of the new potentials.
    )
    problem = semidiscrete_linear_problem.SemidiscreteLinearProblem(geometry)
    with jax.numpy_rank_promotion('allow'):
        found = np.asarray(jax.jit(solver)(KEY, problem).g)
    found = found - found.mean()
    assert np.std(potential) > 3
    assert np.std(found - potential) < 0.03 * np.std(potential)
    noise = _noise(10_000, 8)
    agree = _owners(noise, points, found) == _owners(noise, points, potential)
    assert np.mean(agree) > 0.95


def test_pairs_are_those_of_an_exact_assignment_of_many_samples():
    points, potential, _ = _cloud()
    noise = _noise(2000, 8)
    product = noise @ points.T
    # Each point takes 20 noise samples.
    _, column = linear_sum_assignment(-np.repeat(product, 20, axis=1))
    exact, own = column // 20, _owners(noise, points, potential)
    gain = lambda owner: np.mean(product[np.arange(2000), owner])
    assert np.mean(exact == own) > 0.7
    assert abs(gain(own) / gain(exact) - 1) < 0.02
    # The dual value bounds every coupling with equal shares.
    dual = np.mean(np.max(product + potential, axis=1)) - potential.mean()
    assert gain(exact) <= dual + 1e-6 < 1.005 * gain(exact)


def test_the_report_is_that_of_the_pairs():
    points, potential, report = _cloud()
    noise = _noise(200_000, 8)
    owner = _owners(noise, points, potential)
    hits = np.bincount(owner, minlength=100)
    assert np.std(hits / hits.mean()) < 0.06  # 0.022 with equal probabilities.
    assert report['hit_error'] < 0.06
    cost = np.mean(np.sum((noise - points[owner]) ** 2, axis=1))
    independent = 8 + np.mean(np.sum(points**2, axis=1))
    np.testing.assert_allclose(report['cost'], cost, rtol=0.05)
    np.testing.assert_allclose(report['cost_independent'], independent, rtol=1e-4)
    # Few samples leave an error, and the report says so.
    assert _fit(points, samples=1)[1]['hit_error'] > 0.2


def test_fewer_points_than_dimensions_and_uneven_classes():
    """The rotated problem has the same solution; classes do not affect each other."""
    rng = np.random.default_rng(2)
    many = rng.normal(size=(300, 6)).astype(np.float16)
    wide = np.zeros((40, 400), np.float16)
    wide[:, 100:140] = rng.uniform(0, 3, (40, 40))
    one, none = np.ones((1, 400), np.float16), np.zeros((0, 400), np.float16)
    found, report = semidiscrete.fit_potentials(
        [none, wide, one], KEY, samples_per_point=2000
    )
    assert [len(g) for g in found] == [0, 40, 1] and np.isfinite(found[2]).all()
    owner = _owners(_noise(40_000, 400), wide.astype(float), found[1])
    assert np.std(np.bincount(owner, minlength=40)) < 0.06 * 1000
    assert report['hit_error'] < 0.2  # Of 25 hits per point.
    potential, _ = _fit(many, samples=100)  # Padded to 512.
    hits = np.bincount(_owners(_noise(30_000, 6), many, potential), minlength=300)
    assert np.std(hits) < 0.3 * 100


def _pairing(shape=(4, 6, 2), seed=3):
    rng = np.random.default_rng(seed)
    labels = np.array([0, 1, 1, 2, 1, 0, 2, 2, 2, 1])
    data = rng.normal(size=(10, *shape)).astype(np.float16)
    members = [np.flatnonzero(labels == c) for c in range(3)]
    points = [data[m].reshape(len(m), -1) for m in members]
    potentials = rng.normal(size=10).astype(np.float32)
    pairing = semidiscrete.Pairing(
        points, members, potentials, image_shape=shape, seed_key=KEY
    )
    return pairing, data, labels, potentials


def test_a_pairing_is_the_argmax_and_flips_images():
    pairing, data, labels, potentials = _pairing()
    rng = np.random.default_rng(4)
    wanted, flip = rng.integers(0, 3, 60), rng.random(60) < 0.5
    index = pairing(7, wanted, flip)
    np.testing.assert_array_equal(labels[index], wanted)
    pool_key = random_streams.stream(KEY, random_streams.NOISE, 7)
    noise = np.asarray(random_streams.sample_noise(pool_key, np.arange(60), (4, 6, 2)))
    for i in range(60):
        images = data[:, :, ::-1] if flip[i] else data
        value = np.sum(noise[i] * images, axis=(1, 2, 3)) + potentials
        value[labels != wanted[i]] = -np.inf
        assert index[i] == np.argmax(value)
    # A sample's data depend on its own number, class and flip alone.
    other, kept = wanted.copy(), np.arange(60) < 30
    other[~kept] = 0
    np.testing.assert_array_equal(pairing(7, other, flip)[kept], index[kept])
    assert np.any(pairing(8, wanted, flip) != index)
    assert np.any(pairing(7, wanted, ~flip) != index)


@pytest.fixture(scope='module')
def experiment():
    """Digits of 16x16 with flips, and potentials of 64 samples per point."""
    config = config_lib.with_argument(config_lib.default(), 'runlocal')
    config.data.update(image_size=16, flip=True)
    config.wavelet.levels = 4
    config.train.batch_size = 256
    config.transport.update(method='semidiscrete', samples_per_point=64, batches=8)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    source = array_source.embedded_mnist(16)
    return Experiment(config.lock(), mesh=mesh, source=source)


@pytest.fixture(scope='module')
def pools(experiment):
    """Noise, data and labels of 10 pools, and a coupling report."""
    loader, pools = experiment.make_loader(), []
    for _ in range(10):
        pool, report = experiment.next_pool(loader)
        key = random_streams.stream(
            experiment.seed_key, random_streams.NOISE, pool.number
        )
        index = pool.noise_index.reshape(-1)
        noise = random_streams.sample_noise(key, index, (256,))
        pools.append((noise, pool.data.reshape(-1, 16, 16), pool.labels.reshape(-1)))
    loader.close()
    arrays = zip(*pools, strict=True)
    return *(np.concatenate([np.asarray(x) for x in a]) for a in arrays), report


def _accuracy(noise, labels):
    """Accuracy on the second half of a linear classifier of labels from noise."""
    half = len(noise) // 2
    targets = np.eye(10)[labels[:half]] - 0.1
    weights, *_ = np.linalg.lstsq(noise[:half], targets, rcond=None)
    return np.mean(np.argmax(noise[half:] @ weights, axis=1) == labels[half:])


def test_noise_of_pools_is_normal_given_the_class(experiment, pools):
    noise, _, labels, _ = pools
    counts = np.bincount(labels, minlength=10)
    # Epochs of the 500 digits per class: 20,480 labels are four epochs and 480 more.
    assert np.all((counts >= 2000) & (counts <= 2120))
    for label in range(10):
        own = noise[labels == label].astype(float)
        mean = len(own) * np.sum(own.mean(0) ** 2)
        assert stats.chi2.sf(mean, 256) > 1e-4
        # The variance along every direction, in units of its own deviation.
        eigenvalues = np.linalg.eigvalsh(np.cov(own.T))
        edge = 1 + np.sqrt(256 / len(own))  # Marchenko-Pastur.
        assert eigenvalues[-1] < 1.05 * edge**2
        assert eigenvalues[0] > 0.9 * (2 - edge) ** 2
    chance = 0.1 + 5 * np.sqrt(0.1 * 0.9 / 10_240)
    assert _accuracy(noise, labels) < chance
    # Choosing the data first, whatever their class, makes noise depend on the class.
    members, points = experiment.class_points
    everything = np.concatenate(points).astype(np.float32)
    potentials = experiment.potentials[np.concatenate(members)]
    noise = noise[:4096]
    blind = np.repeat(np.arange(10), 500)[_owners(noise, everything, potentials)]
    assert _accuracy(noise, blind) > 2 * chance


def test_data_of_pools_are_uniform_within_classes(experiment, pools):
    _, data, labels, _ = pools
    known = experiment.source.images[..., 0]
    position = {image.tobytes(): i for i, image in enumerate(known)}
    pixels = np.rint((data + 1) * 127.5).astype(np.uint8)
    index = [
        position.get(x.tobytes(), position.get(x[:, ::-1].tobytes())) for x in pixels
    ]
    np.testing.assert_array_equal(experiment.source.labels[index], labels)
    flipped = np.mean([x.tobytes() not in position for x in pixels])
    assert abs(flipped - 0.5) < 5 * 0.5 / np.sqrt(len(pixels))

    def variance(hits):
        """Relative variance of the points' probabilities, from their counts."""
        total = hits.sum()
        return 5000 * np.sum(hits * (hits - 1.0)) / (total * (total - 1.0)) - 1

    # 0.125^2 from 64 samples per point, and the deviation of this estimate, 0.005.
    assert variance(np.bincount(index, minlength=5000)) < 0.125**2 + 0.025
    pairing = experiment.pairing
    nearest = semidiscrete.Pairing(
        pairing._points, pairing._members, np.zeros(5000, np.float32),
        image_shape=(16, 16, 1), seed_key=experiment.seed_key,
    )  # fmt: skip
    hits = nearest(0, labels, np.zeros(len(labels), bool))
    assert variance(np.bincount(hits, minlength=5000)) > 1


def test_pools_cost_less_than_those_of_scaling_optimal_transport(experiment, pools):
    noise, data, labels, report = pools
    flat = data.reshape(len(data), -1)
    cost = np.mean(np.sum((noise[-2048:] - flat[-2048:]) ** 2, axis=1))
    np.testing.assert_allclose(report['transport/cost'], cost, rtol=1e-4)
    ratio = float(report['transport/cost_ratio'])
    config = experiment.config.copy_and_resolve_references()
    with config.unlocked():
        config.transport.method = 'permutation'
    pooled = Experiment(config.lock(), mesh=experiment.mesh, source=experiment.source)
    key = random_streams.stream(pooled.seed_key, random_streams.NOISE, 0)
    coupling = pooled.coupling(data[-2048:, ..., None], labels[-2048:], key)
    assert ratio < float(coupling.report['cost_ratio']) < 1
