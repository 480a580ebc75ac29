"""Every objective against a Gaussian flow whose velocity and flow map are known.

The flow takes the place of the network. If the formulas of a method are right, then
the exact map is self-consistent, it is a stationary point of the loss, the sampler
that uses it makes the data, and a small network that is trained comes near it. Each of
the four is asked here of every objective, and each check is shown to fail where the
map, the guidance or the training is not the right one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ism_jax import objectives
from ism_jax.method import time_grid, training_batch
from ism_jax.method.gaussian_flow import GaussianFlow
from ism_jax.method.training_batch import Batch
from ism_jax.objectives import (
    alpha_flow,
    consistency,
    flow_matching,
    imm,
    ism,
    meanflow,
    shortcut,
)

# Class means are +-0.8 times the rows of a Hadamard matrix: over all classes they have
# the mean 0 and the covariance 0.64 I. The regression of the velocity on x alone is
# then that of N(0, S^2 I), S^2 = s^2 + 0.64, although there are only eight classes.
_ROW = np.array([[1, 1], [1, -1]])
_MEANS = 0.8 * np.concatenate([np.kron(_ROW, _ROW), -np.kron(_ROW, _ROW)])
NULL = 8
SHAPE = (2, 2, 1)
FLOW = GaussianFlow(_MEANS.reshape(NULL, *SHAPE), 0.5, float(np.sqrt(0.25 + 0.64)))
_flow = jax.jit(FLOW.apply)  # Many tests call it outside of any compilation.


def _square(error):
    return jnp.mean(error**2, axis=(1, 2, 3)), {}


def _expand(array):
    return array[:, None, None, None]


def _batch(key, size):
    keys = jax.random.split(key, 3)
    label = jax.random.randint(keys[0], (size,), 0, NULL)
    noise = jax.random.normal(keys[1], (size, *SHAPE))
    return Batch(noise, FLOW.sample_data(keys[2], label), label)


def _places(size, seed=0):
    """Inputs x, t, label for steps that end at t + d <= 1 for d up to 1/2."""
    rng = np.random.default_rng(seed)
    t = jnp.asarray(rng.integers(0, 64, size) / 128, jnp.float32)
    label = jnp.asarray(rng.integers(0, NULL, size))
    x = jnp.asarray(rng.normal(size=(size, *SHAPE)), jnp.float32)
    return x, t, label


# --- Ideal networks: what a network has to return for the method to be consistent. ---


def _plain(params, x, t, d, w, label):
    return _flow(params, x, t, d, jnp.zeros_like(w), label)


def _baked(guidance):
    """Guidance is part of the training, and the network is not told it."""

    def apply(params, x, t, d, w, label):
        return _flow(params, x, t, d, jnp.full_like(w, guidance), label)

    return apply


def _baked_in_steps(guidance):
    """SM's network: steps are guided, the velocity is not."""

    def apply(params, x, t, d, w, label):
        return _flow(params, x, t, d, guidance * (d > 0), label)

    return apply


def _from(begin):
    """iSM's network where guidance acts from the time `begin` on."""

    def apply(params, x, t, d, w, label):
        before = jnp.clip(begin - t, 0, d)
        middle = FLOW.flow_map(x, t, before, jnp.zeros_like(w), label)
        end = FLOW.flow_map(middle, t + before, d - before, w, label)
        mean = (end - x) / _expand(jnp.where(d > 0, d, 1.0))
        now = FLOW.velocity(x, t, jnp.where(t >= begin, w, 0.0), label)
        return jnp.where(_expand(d > 0), mean, now)

    return apply


def _to_the_end(objective):
    """iCT's network: the mean velocity up to the end at sigma_min, told d = 0."""

    def apply(params, x, t, d, w, label):
        rest = 1 / (1 + objective.sigma_min) - t
        return _flow(params, x, t, jnp.maximum(rest, 0.0), w, label)

    return apply


def _descaled(objective):
    """IMM's network, whose input has unit deviation."""

    def apply(params, x, t, d, w, label):
        scale = jnp.sqrt((t * objective.data_std) ** 2 + (1 - t) ** 2)
        return _flow(params, _expand(scale) * x, t, d, w, label)

    return apply


# --- Self-consistency: steps of the exact map compose. ---


def _finest_error(base_steps, w, target):
    """Largest error of `target(x, t, d, label)` for two of the finest steps."""
    x, t, label = _places(64)
    d = jnp.full_like(t, 1 / base_steps)
    exact = FLOW.mean_velocity(x, t, 2 * d, jnp.full_like(t, w), label)
    return float(jnp.abs(target(x, t, d, label) - exact).max())


@pytest.mark.parametrize('w', [0.0, 0.5])
def test_shortcut_targets_of_the_exact_map(w):
    """Exact but for the finest level, where a velocity stands in for a step: O(d)."""
    make = lambda **kw: shortcut.Objective(
        num_classes=NULL, guidance=w, **dict(target_clip=float('inf')) | kw
    )
    network = _baked_in_steps(w)
    x, t, label = _places(64)
    errors = {}
    for steps in (2, 4, 8, 16, 32, 64):
        d = jnp.full_like(t, 1 / steps)
        start = jnp.floor(t * steps / 2) / steps * 2
        target = make().bootstrap_target(network, None, x, start, d, label)
        exact = network(None, x, start, 2 * d, jnp.zeros_like(t), label)
        errors[steps] = float(jnp.abs(target - exact).max())
    assert max(errors.values()) < 2e-5, errors

    finest = [
        _finest_error(
            steps,
            w,
            functools.partial(make(base_steps=steps).bootstrap_target, network, None),
        )
        for steps in (32, 64, 128)
    ]
    assert finest[-1] > 1e-3
    ratios = np.divide(finest[:-1], finest[1:])
    assert ((ratios > 1.8) & (ratios < 2.2)).all(), ratios

    clipped = make(target_clip=0.5).bootstrap_target(
        network, None, x, t, jnp.full_like(t, 1 / 128), label
    )
    assert jnp.abs(clipped).max() == 0.5


def test_shortcut_guidance_at_all_levels_is_not_consistent():
    network = _baked_in_steps(0.5)
    x, t, label = _places(64)
    d, t = jnp.full_like(t, 1 / 8), jnp.floor(t * 4) / 4
    exact = network(None, x, t, 2 * d, jnp.zeros_like(t), label)
    error = {}
    for levels in ('finest', 'all'):
        objective = shortcut.Objective(
            num_classes=NULL, cfg_levels=levels, target_clip=float('inf')
        )
        target = objective.bootstrap_target(network, None, x, t, d, label)
        error[levels] = jnp.abs(target - exact).mean()
    assert error['finest'] < 1e-5 < 0.05 < error['all']


@pytest.mark.parametrize('levels, expected', [('finest', 1.5), ('all', 1.5**7)])
def test_shortcut_guidance_compounds_at_all_levels(levels, expected):
    """Proposition 1 of iSM: 1.5 becomes 1.5^7 = 17 in a step over 128.

    Velocities that do not depend on x or t: 1 for the class, 0 for no class.
    """
    objective = shortcut.Objective(
        num_classes=NULL, guidance=0.5, cfg_levels=levels, target_clip=100.0
    )
    scales = {0.0: 1.0}  # Of the class, by the step size that the network is told.

    def network(params, x, t, d, w, label):
        scale = scales[float(d[0])]
        return jnp.where(_expand(label == NULL), 0.0, scale) * jnp.ones_like(x)

    x, t, label = _places(2)
    for level in range(6, -1, -1):
        d = jnp.full_like(t, 0.5 ** (level + 1))
        target = objective.bootstrap_target(network, None, x, 0 * t, d, label)
        scales[0.5**level] = float(target.mean())
    assert scales[1.0] == pytest.approx(expected)


def test_ism_targets_of_the_exact_guided_map():
    """As for SM, with any w: the network is told it, and targets need no guidance."""

    def errors(base_steps):
        objective = ism.Objective(
            num_classes=NULL,
            base_steps=base_steps,
            batch_split=(0, 0, 1),
            guidance_interval=0.0,
        )
        calls, seen = [], []

        def apply(params, *inputs):
            calls.append(inputs)
            return _flow(params, *inputs)

        def distance(error):
            seen.append(np.abs(error).max((1, 2, 3)))
            return _square(error)

        batch = _batch(jax.random.key(0), 512)
        objective(
            apply, None, None, batch, jax.random.key(1), distance=distance, progress=0.0
        )
        _, _, size, w, _ = calls[-1]
        assert len(set(np.asarray(w).tolist())) == 15
        fine = np.asarray(size) == 2 / base_steps
        return seen[0][~fine].max(), seen[0][fine].mean()

    coarse, finest = zip(*map(errors, (64, 128)))
    assert max(coarse) < 1e-4 < finest[1]
    assert 1.5 < finest[0] / finest[1] < 2.7


def _moving(size=64):
    x, t, label = _places(size)
    d = jnp.asarray(np.random.default_rng(1).uniform(0.01, 0.5, size), jnp.float32)
    return training_batch.Inputs(x, t, d, jnp.zeros_like(t), label)


@pytest.mark.parametrize('w', [0.0, 1.0])
def test_meanflow_target_of_the_exact_map(w):
    """With the marginal velocity as tangent the target is u itself."""
    objective = meanflow.Objective(num_classes=NULL, guidance=w)
    inputs = _moving()
    apply = _baked(w)
    velocity = FLOW.velocity(inputs.x, inputs.t, jnp.full(64, w), inputs.label)
    exact = apply(None, *inputs)
    target = objective.mean_velocity(apply, None, inputs, velocity, 0.0)
    np.testing.assert_allclose(target, exact, atol=2e-5)
    assert jnp.abs(exact - velocity).max() > 0.3  # The derivative is needed.
    # A pair's own velocity is another tangent. The target is affine in it, so its
    # average over pairs is the target of the average velocity.
    shift = jax.random.normal(jax.random.key(0), velocity.shape)
    above, below = (
        objective.mean_velocity(apply, None, inputs, velocity + sign * shift, 0.0)
        for sign in (1, -1)
    )
    assert jnp.abs(above - below).max() > 0.3
    np.testing.assert_allclose((above + below) / 2, exact, atol=2e-5)


@pytest.mark.parametrize('w, mix', [(0.0, 0.5), (1.0, 0.0), (1.0, 0.5), (2.0, 0.9)])
def test_meanflow_guidance_has_its_fixed_point_at_the_guided_velocity(w, mix):
    """E v_g = v_w where the network's own conditional velocity is v_w."""
    objective = meanflow.Objective(num_classes=NULL, guidance=w, guidance_mix=mix)
    x, t, label = _places(64)
    plain, guided, unconditional = (
        FLOW.velocity(x, t, jnp.full(64, strength), c)
        for strength, c in (
            (0.0, label),
            (w, label),
            (0.0, jnp.full_like(label, NULL)),
        )
    )
    mixed = objective.guided_velocity(plain, guided, unconditional, t, label)
    if not w:  # Then the loss leaves the mix out.
        mixed = plain
    np.testing.assert_allclose(mixed, guided, atol=2e-5)
    null = jnp.full_like(label, NULL)
    np.testing.assert_array_equal(
        objective.guided_velocity(plain, guided, unconditional, t, null), plain
    )


def _curved(params, x, t, d, w, label):
    """No flow at all; depends on everything, not linearly."""
    scalar = jnp.sin(3 * t) + d**2 + 0.7 * d * t + 0.1 * label
    return jnp.cos(x * (1 + _expand(d))) * _expand(scalar)


def test_alpha_flow_between_flow_matching_and_meanflow():
    """alpha = 1: target v. alpha -> 0: MeanFlow's, for any network and any tangent."""
    make = lambda alpha, **kw: alpha_flow.Objective(
        num_classes=NULL, guidance=0.0, alpha=alpha, **kw
    )
    inputs = _moving()
    velocity = jax.random.normal(jax.random.key(0), inputs.x.shape)
    target = lambda alpha: make(alpha).mean_velocity(
        _curved, None, inputs, velocity, 0.0
    )
    np.testing.assert_allclose(target(1.0), velocity, atol=1e-5)
    derivative = meanflow.Objective(num_classes=NULL).mean_velocity(
        _curved, None, inputs, velocity, 0.0
    )
    np.testing.assert_allclose(target(0.0), derivative, atol=1e-6)
    distances = [float(jnp.abs(target(a) - derivative).mean()) for a in (0.1, 0.05)]
    assert 1e-3 < distances[1] and 1.8 < distances[0] / distances[1] < 2.2


def test_alpha_flow_of_the_exact_map():
    """alpha = 1/2 from the network's own step is SM's target, and exact."""
    inputs = _moving()
    x, t, d, w, label = inputs
    exact = _flow(None, *inputs)
    velocity = FLOW.velocity(x, t, w, label)

    def error(alpha, direction, velocity=velocity):
        objective = alpha_flow.Objective(
            num_classes=NULL, guidance=0.0, alpha=alpha, direction=direction
        )
        target = objective.mean_velocity(_flow, None, inputs, velocity, 0.0)
        return float(jnp.abs(target - exact).mean())

    for alpha in (0.25, 0.5, 0.75):
        assert error(alpha, 'network', jnp.full_like(velocity, jnp.nan)) < 1e-5
    # The data's velocity makes a first step of Euler: O(alpha).
    errors = [error(alpha, 'data') for alpha in (0.1, 0.05, 0.025)]
    assert errors[-1] > 1e-3
    ratios = np.divide(errors[:-1], errors[1:])
    assert ((ratios > 1.8) & (ratios < 2.2)).all(), ratios
    assert error(0.0, 'data') < 1e-5


def test_alpha_flow_anneals_from_flow_matching_to_meanflow():
    objective = alpha_flow.Objective(num_classes=NULL, anneal_start=0.2, anneal_end=0.8)
    progress = jnp.linspace(0, 1, 101)
    alpha = jax.vmap(objective.current_alpha)(progress)
    assert (alpha[:20] == 1).all() and (alpha[81:] == 0).all()
    assert alpha[50] == pytest.approx(0.5, abs=1e-4)
    assert (np.diff(alpha) <= 0).all()
    inside = alpha[(alpha > 0) & (alpha < 1)]
    assert inside.min() >= 0.005 and inside.max() <= 0.995 and len(inside) > 20
    assert objective.current_alpha(0.55) == pytest.approx(
        1 - 1 / (1 + np.exp(-25 * (0.35 / 0.6 - 0.5))), rel=1e-5
    )


def test_consistency_function_is_the_identity_at_the_end():
    objective = consistency.Objective(num_classes=NULL)
    x, _, label = _places(8)
    end = jnp.full(8, 1 / (1 + objective.sigma_min), jnp.float32)
    np.testing.assert_array_equal(objective.jump(_curved, None, x, end, label), x)
    moved = objective.jump(_curved, None, x, end - 0.1, label)
    assert jnp.abs(moved - x).max() > 0.01


def test_consistency_function_is_constant_along_the_flow():
    objective = consistency.Objective(num_classes=NULL)
    network = _to_the_end(objective)
    x, t, label = _places(64)
    zero = jnp.zeros_like(t)
    values = [
        objective.jump(network, None, FLOW.flow_map(x, t, d, zero, label), t + d, label)
        for d in (0 * t, 0.2 + 0 * t, 0.4 + 0 * t)
    ]
    np.testing.assert_allclose(values[1], values[0], atol=1e-5)
    np.testing.assert_allclose(values[2], values[0], atol=1e-5)


# --- Data of one point: paths are the flow, so every loss is exactly zero. ---


def _to_a_point(params, x, t, d, w, label):
    """All data are the class mean: x stays on its path, and v = (mu - x) / (1 - t)."""
    mean = jnp.asarray(FLOW.means, jnp.float32)[label]
    return (1 + params) * (mean - x) / _expand(1 - t)


POINT_OBJECTIVES = {
    'flow_matching': flow_matching.Objective(NULL, label_dropout=0.0),
    'shortcut': shortcut.Objective(
        NULL, label_dropout=0.0, guidance=0.0, target_clip=float('inf')
    ),
    'ism': ism.Objective(NULL, label_dropout=0.0, intrinsic_guidance=False),
    'meanflow': meanflow.Objective(NULL, label_dropout=0.0, guidance=0.0),
    'alpha_flow': alpha_flow.Objective(NULL, label_dropout=0.0, guidance=0.0),
    'consistency': consistency.Objective(NULL),
    'imm': imm.Objective(NULL, label_dropout=0.0),
}


@pytest.mark.parametrize('name', objectives.names())
def test_straight_paths_cost_nothing(name):
    objective = POINT_OBJECTIVES[name]
    network = _to_a_point
    if name == 'imm':

        def network(params, x, t, d, w, label):
            scale = jnp.sqrt((t * objective.data_std) ** 2 + (1 - t) ** 2)
            return _to_a_point(params, _expand(scale) * x, t, d, w, label)

    @jax.jit
    def loss(params, progress):
        key = jax.random.key(0)
        batch = _batch(key, 512)
        batch = batch._replace(data=jnp.asarray(FLOW.means, jnp.float32)[batch.label])
        return objective(
            network, params, params, batch, key, distance=_square, progress=progress
        )[0]

    for progress in (0.0, 0.5, 0.99):
        exact, near, far = (loss(error, progress) for error in (0.0, 0.05, 0.1))
        assert abs(exact) < 1e-4 * near and 0 < near < far


# --- The exact map is a stationary point of every loss. ---


def _gradients(objective, ideal, wrong, *, progress=0.99, calls=48, size=1024):
    """Mean and standard error of the loss's gradient, [2, 4] each, at two networks.

    A network is the ideal one, or the wrong one, plus parameters times features. x and
    the class mean are the only directions that this flow has, each with factors 1, t,
    d and w / 4.
    """
    means = jnp.asarray(np.concatenate([FLOW.means, 0 * FLOW.means[:1]]), jnp.float32)

    def loss(params, target_params, is_wrong, key):
        def apply(params, x, t, d, w, label):
            along, toward = params @ jnp.stack([jnp.ones_like(t), t, d, w / 4])
            features = _expand(along) * x + _expand(toward) * means[label]
            inputs = None, x, t, d, w, label
            return jnp.where(is_wrong, wrong(*inputs), ideal(*inputs)) + features

        key_batch, key = jax.random.split(key)
        batch = _batch(key_batch, size)
        return objective(
            apply, params, target_params, batch, key,
            distance=_square, progress=progress,
        )[0]  # fmt: skip

    @jax.jit
    def gradients(is_wrong):
        zero = jnp.zeros((2, 4))
        gradient = lambda key: jax.grad(loss)(zero, zero, is_wrong, key)
        return jax.lax.map(gradient, jax.random.split(jax.random.key(7), calls))

    for is_wrong in (False, True):
        values = np.asarray(gradients(is_wrong))
        yield values.mean(0), values.std(0) / np.sqrt(calls)


def _off(network):
    """The network with velocities that are 5 % too large."""
    return lambda *inputs: 1.05 * network(*inputs)


def _case(objective, network, wrong=None):
    return objective, network, wrong or _off(network)


_ICT = consistency.Objective(NULL)
_IMM = imm.Objective(NULL)
STATIONARY = {
    'flow_matching': _case(flow_matching.Objective(NULL), _plain),
    'shortcut': _case(
        shortcut.Objective(NULL, guidance=0.5, target_clip=float('inf')),
        _baked_in_steps(0.5),
    ),
    # Wrong: guidance from another time on.
    'ism': _case(ism.Objective(NULL, guidance_interval=0.3), _from(0.3), _from(0.0)),
    # Without the adaptive weight, which for the `null` label would need x and v to be
    # jointly normal and not only to have the right covariance.
    'meanflow': _case(
        meanflow.Objective(NULL, guidance=1.0, norm_power=0.0), _baked(1.0)
    ),
    'meanflow weighted': _case(
        meanflow.Objective(NULL, guidance=0.0, label_dropout=0.0), _plain
    ),
    'consistency': _case(_ICT, _to_the_end(_ICT)),
    'imm': _case(_IMM, _descaled(_IMM)),
}


@pytest.mark.parametrize('name', STATIONARY)
def test_exact_map_is_a_stationary_point(name, monkeypatch):
    """Gradients within four standard errors, and 5e-4 for discretisation.

    The latter is for self-consistency, whose targets have no noise but err by O(1/128)
    at the finest level. alpha-Flow ends as MeanFlow, which is shown above.
    """
    # One in M of IMM's pairs are of a sample with itself, so that y and z are not
    # independent. That shifts the map by O(ETA_STEP); the gradient at the exact map is
    # 0.0112(6) with the source's step and 0.0034(7) with a quarter of it.
    monkeypatch.setattr(imm, 'ETA_STEP', imm.ETA_STEP / 16)
    excess = [
        np.max(np.abs(mean) / (4 * error + 5e-4))
        for mean, error in _gradients(*STATIONARY[name])
    ]
    assert excess[0] < 1 and excess[1] > 2, excess


def test_consistency_training_is_biased_by_few_levels():
    """iCT starts with 10 intervals: the exact map is no stationary point of those."""
    objective, network, wrong = STATIONARY['consistency']
    assert objective.num_intervals(0.0) == 10
    mean, error = next(_gradients(objective, network, wrong, progress=0.0))
    assert np.max(np.abs(mean) / (4 * error + 5e-4)) > 2


# --- Samplers: with the ideal network they make the data. ---


def _sample(objective, network, steps, w=0.0, size=512):
    """Samples, those of a network 5 % off, the flow's end from the noise, labels."""
    keys = jax.random.split(jax.random.key(3), 3)
    noise = jax.random.normal(keys[0], (size, *SHAPE))
    label = jax.random.randint(keys[1], (size,), 0, NULL)
    guidance = jnp.full((size,), w)
    finest = objective.base_steps
    times = time_grid.times_and_sizes(time_grid.dyadic_schedule(steps, finest), finest)
    sample = jax.jit(
        lambda scale: objective.sample(
            lambda scale, *inputs: scale * network(None, *inputs),
            scale, noise, label, guidance, *times, keys[2],
        )
    )  # fmt: skip
    begin, start, end = jnp.full((size,), objective.start_time), noise, 1.0
    if isinstance(objective, consistency.Objective):
        start = (1 - objective.start_time) * noise
        end = 1 / (1 + objective.sigma_min)
    exact = FLOW.flow_map(start, begin, end - begin, guidance, label)
    return sample(1.0), sample(1.05), exact, label


DETERMINISTIC = {
    'shortcut': (shortcut.Objective(NULL, guidance=0.5), _baked_in_steps(0.5), 0.5),
    'ism': (ism.Objective(NULL, guidance_interval=0.0), FLOW.apply, 2.0),
    'meanflow': (meanflow.Objective(NULL, guidance=1.0), _baked(1.0), 1.0),
    'alpha_flow': (alpha_flow.Objective(NULL, guidance=1.0), _baked(1.0), 1.0),
    'imm': (_IMM, _descaled(_IMM), 0.0),
}


@pytest.mark.parametrize('name', DETERMINISTIC)
@pytest.mark.parametrize('steps', [1, 2, 4])
def test_samplers_follow_the_exact_map(name, steps):
    objective, network, w = DETERMINISTIC[name]
    low, high = objective.guidance_range
    assert low <= w <= high
    sample, wrong, exact, _ = _sample(objective, network, steps, w)
    np.testing.assert_allclose(sample, exact, atol=5e-5)
    assert np.abs(wrong - exact).max() > 0.02


FINEST = {
    'flow_matching': (flow_matching.Objective, {}, _plain, 0.0),
    'flow_matching guided': (flow_matching.Objective, {}, _plain, 1.5),
    'shortcut': (shortcut.Objective, {'guidance': 0.5}, _baked_in_steps(0.5), 0.5),
    'ism': (ism.Objective, {}, FLOW.apply, 2.0),
}


@pytest.mark.parametrize('name', FINEST)
def test_steps_of_velocity_tend_to_the_exact_map(name):
    """First order in the step; for SM and iSM that is the finest level alone.

    In SM's network the velocity is not guided: the sampler guides it.
    """
    make, options, network, w = FINEST[name]
    error = {}
    for steps in (32, 128):
        if make is not flow_matching.Objective:
            options = options | {'base_steps': steps}
        objective = make(num_classes=NULL, **options)
        sample, _, exact, label = _sample(objective, network, steps, w, size=128)
        error[steps] = float(jnp.abs(sample - exact).mean())
    assert 1e-4 < error[128] < 0.05 and 3 < error[32] / error[128] < 5
    if w:  # The guidance is there.
        rest = np.asarray(sample) - FLOW.means[label]
        assert np.mean(rest * FLOW.means[label]) / np.mean(FLOW.means**2) > 0.1


STOCHASTIC = {
    'consistency': (_ICT, _to_the_end(_ICT)),
    'imm restart': (imm.Objective(NULL, sampler='restart'), _descaled(_IMM)),
}


@pytest.mark.parametrize('name', STOCHASTIC)
@pytest.mark.parametrize('steps', [1, 2, 4])
def test_samplers_that_add_noise_make_the_data(name, steps):
    size = 16384
    sample, wrong, exact, label = _sample(*STOCHASTIC[name], steps, size=size)
    distance = np.abs(sample - exact)
    if steps == 1:  # Nothing is added: the map itself.
        assert distance.max() < 5e-5
    else:
        assert distance.mean() > 0.05
    sample, wrong = (np.asarray(a) - FLOW.means[label] for a in (sample, wrong))
    # Along its mean, in units of it; chance alone gives 0.005.
    shifts = [
        np.mean(rest * FLOW.means[label]) / np.mean(FLOW.means**2)
        for rest in (sample, wrong)
    ]
    assert abs(shifts[0]) < 0.015 and abs(shifts[1]) > 0.03
    assert sample.std() == pytest.approx(FLOW.class_std, rel=0.02)


def test_imm_guides_its_jumps():
    """Classifier-free guidance of the jump of one step, not of the flow."""
    network = _descaled(_IMM)
    x, t, label = _places(16)
    d, w = jnp.full_like(t, 0.25), jnp.full_like(t, 1.5)
    zero, null = jnp.zeros_like(w), jnp.full_like(label, NULL)
    jump = lambda c: _flow(None, x, t, d, zero, c)
    np.testing.assert_allclose(
        _IMM.velocity(network, None, x, t, d, w, label),
        2.5 * jump(label) - 1.5 * jump(null),
        atol=1e-5,
    )


# --- Training: a small network comes near the map. ---

WIDTH = 64


def _initial(key):
    """Parameters of `_small_network`, which is 0 at first."""
    sizes = (4 + NULL + 1, WIDTH, WIDTH, 1 + np.prod(SHAPE))
    keys = jax.random.split(key, 3)
    weights = [
        jax.random.normal(k, shape) / np.sqrt(shape[0])
        for k, shape in zip(keys, zip(sizes, sizes[1:]))
    ]
    weights[-1] *= 0
    return [(weight, jnp.zeros((1, weight.shape[1]))) for weight in weights]


def _small_network(params, x, t, d, w, label):
    """a x + b, with a and b a perceptron of t, d, w and the label."""
    scalars = jnp.stack([t, d, jnp.sqrt(d + 1e-4), 0.3 * w], axis=1)
    hidden = jnp.concatenate([scalars, jax.nn.one_hot(label, NULL + 1)], axis=1)
    for number, (weight, bias) in enumerate(params):
        hidden = hidden @ weight + bias
        if number < 2:
            hidden = jax.nn.silu(hidden)
    return _expand(hidden[:, 0]) * x + hidden[:, 1:].reshape(-1, *SHAPE)


def _train(objective, *, num_steps=2000, size=256, rate=1e-2):
    """Parameters before and after; the latter are the slow average's."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps))
    average = lambda decay, old, new: jax.tree.map(
        lambda a, b: decay * a + (1 - decay) * b, old, new
    )

    def body(state, step):
        params, target, infer, moments = state
        key_batch, key = jax.random.split(jax.random.fold_in(jax.random.key(1), step))
        gradient = jax.grad(
            lambda params: objective(
                _small_network,
                params,
                target,
                _batch(key_batch, size),
                key,
                distance=_square,
                progress=step / num_steps,
            )[0]
        )(params)
        updates, moments = optimizer.update(gradient, moments)
        params = optax.apply_updates(params, updates)
        target, infer = average(0.95, target, params), average(0.98, infer, params)
        return (params, target, infer, moments), None

    first = _initial(jax.random.key(0))
    state = first, first, first, optimizer.init(first)
    run = jax.jit(lambda state: jax.lax.scan(body, state, jnp.arange(num_steps))[0])
    return first, run(state)[2]


def _map_error(objective, params, steps, w):
    """RMS error of the map from noise to data that the sampler makes.

    The unit is the true map's RMS deviation from the identity, so that the error of a
    network that is 0 is 1.
    """
    size = 2048
    keys = jax.random.split(jax.random.key(99), 3)
    noise = jax.random.normal(keys[0], (size, *SHAPE))
    label = jax.random.randint(keys[1], (size,), 0, NULL)
    guidance, zero = jnp.full((size,), w), jnp.zeros((size,))
    finest = objective.base_steps
    times = time_grid.times_and_sizes(time_grid.dyadic_schedule(steps, finest), finest)
    sample = objective.sample(
        _small_network, params, noise, label, guidance, *times, keys[2]
    )
    exact = FLOW.flow_map(noise, zero, zero + 1, guidance, label)
    square = jnp.mean((sample - exact) ** 2) / jnp.mean((exact - noise) ** 2)
    return float(jnp.sqrt(square))


# Objective, steps and guidance of the sampler, and the largest error that was measured
# with four seeds.
TRAINED = {
    'flow_matching': (flow_matching.Objective(NULL), 128, 0.5, 0.013),
    'shortcut': (
        shortcut.Objective(NULL, guidance=0.5, bootstrap_every=2), 1, 0.5, 0.071,
    ),
    'ism': (
        ism.Objective(
            NULL, guidance_interval=0.0, guidance_max=2.0, batch_split=(1, 1, 2)
        ),
        1, 1.0, 0.053,
    ),
    # Wider times than the default: a step over the whole path is else hardly seen.
    'meanflow': (
        meanflow.Objective(NULL, guidance=0.5, batch_split=(1, 1), time_std=2.0),
        1, 0.5, 0.055,
    ),
    'alpha_flow': (
        alpha_flow.Objective(NULL, guidance=0.5, batch_split=(1, 1), time_std=2.0),
        1, 0.5, 0.035,
    ),
    'consistency': (consistency.Objective(NULL, last_intervals=160), 1, 0.0, 0.038),
    'imm': (_IMM, 1, 0.0, 0.060),
}  # fmt: skip


@pytest.mark.parametrize('name', objectives.names())
def test_training_ends_near_the_exact_map(name):
    objective, steps, w, measured = TRAINED[name]
    first, trained = _train(objective)
    errors = [_map_error(objective, params, steps, w) for params in (first, trained)]
    assert errors[1] < 2 * measured < 0.5 < errors[0], errors
