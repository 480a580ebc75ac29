"""The train step: EMAs, skipped steps, accumulation, meshes, switches."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ism_jax import config as config_lib
from ism_jax import experiment
from ism_jax.method import interpolant, loss_distance, random_streams
from ism_jax.models import conditions, sit
from ism_jax.objectives import ism
from ism_jax.objectives.base import BaseObjective
from ism_jax.runtime import sharding
from ism_jax.training import paired_pool, train_state, train_step

SHAPE = (8, 8, 1)
MODEL = sit.SiT(num_classes=4, patch_size=4, hidden_size=64, depth=2, num_heads=2)
SEED_KEY = jax.random.key(7)


def _pool(batches=2, size=32, number=0, images=None):
    rng = np.random.default_rng(number)
    shape = (batches, size)
    if images is None:
        images = rng.normal(size=(*shape, *SHAPE)).astype(np.float32)
    return paired_pool.Pool(
        jnp.asarray(images),
        jnp.asarray(rng.integers(0, 4, shape), jnp.int32),
        jnp.asarray(rng.permutation(batches * size).reshape(shape), jnp.int32),
        jnp.int32(number),
    )


def _sgd():
    return optax.sgd(0.1)


def _setup(tx=None, *, mesh=None, twin=True, objective=None, distance=None, **options):
    """State and compiled step, as `train` makes them."""
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    tx = tx or optax.adam(1e-2)
    state, shardings = train_state.create(
        lambda: conditions.init_params(MODEL, SHAPE, jax.random.key(1)),
        tx,
        mesh,
        twin_ema=twin,
    )
    whole = sharding.replicated(mesh)
    accumulate = options.get('accumulate', 1)
    groups = mesh if accumulate > 1 and mesh.size > 1 else None
    axes = ('data', 'fsdp') if groups is None else ('fsdp',)
    model = MODEL.clone(batch_sharding=sharding.BatchSharding(mesh, axes))
    apply = lambda params, *inputs: model.apply({'params': params}, *inputs)
    step = functools.partial(
        train_step.train_step,
        apply=sharding.apply_in_groups(apply, mesh) if groups else apply,
        groups=groups,
        objective=objective or ism.Objective(num_classes=4),
        distance=distance or loss_distance.squared_error,
        tx=tx,
        **dict(
            accumulate=1,
            target_decay=0.9,
            infer_decay=0.99,
            ema_warmup=True,
            num_steps=100,
        )
        | options,
    )
    pool_shardings = experiment.pool_shardings(mesh)
    step = jax.jit(
        step, in_shardings=(shardings, pool_shardings, whole),
        out_shardings=(shardings, whole), donate_argnums=0,
    )  # fmt: skip

    def run(state, pool, key=SEED_KEY):
        return step(
            state, jax.device_put(pool, pool_shardings), jax.device_put(key, whole)
        )

    run.compiled = step
    return state, run


def _host(tree):
    return jax.tree.map(np.array, tree)


def _assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def _mix(decay, ema, params):
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, ema, params)


def test_emas_follow_a_hand_written_recursion():
    state, step = _setup()
    target = infer = _host(state.params)
    for n in range(3):
        state, _ = step(state, _pool())
        params = _host(state.params)
        decay = min(0.99, (1 + n) / (10 + n))
        target = _mix(0.9, target, params)
        infer = _mix(decay, infer, params)
    _assert_close(_host(state.target), target, rtol=1e-4, atol=1e-6)
    _assert_close(_host(state.infer), infer, rtol=1e-4, atol=1e-6)
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), target, infer)
    assert max(jax.tree.leaves(difference)) > 1e-3


def test_without_twin_ema_the_inference_ema_makes_targets():
    state, step = _setup(twin=False)
    assert state.target is None and state.target_params() is state.infer
    state, metrics = step(state, _pool())
    assert np.isfinite(metrics['loss'])
    assert 'distance/online_target' not in train_step.state_metrics(state)
    twin, _ = _setup(twin=True)
    assert twin.target_params() is twin.target


def test_a_non_finite_step_changes_nothing_but_the_counters():
    state, step = _setup()
    state, _ = step(state, _pool())
    before = _host(state)
    images = np.array(_pool().data)
    images[1, 3] = np.nan
    bad = _pool(images=images)
    state, metrics = step(state, bad)
    after = _host(state)
    assert not np.isfinite(metrics['loss'])
    assert (after.step, after.skipped, after.skipped_in_row) == (2, 1, 1)
    for name in ('params', 'opt_state', 'target', 'infer'):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(before, name), getattr(after, name)
        )
    state, metrics = step(state, _pool())
    assert (int(state.skipped), int(state.skipped_in_row)) == (1, 0)
    assert np.isfinite(metrics['loss'])


class Deterministic(BaseObjective):
    """A loss without randomness, so that accumulated parts equal the batch."""

    def __call__(self, apply, params, target_params, batch, key, *, distance, progress):
        half = jnp.full(batch.label.shape, 0.5)
        x = interpolant.interpolate(batch.noise, batch.data, half)
        error = apply(params, x, half, half, half, batch.label) - batch.data
        loss = distance(error)[0].mean()
        return loss, {'velocity/loss': loss}


def test_accumulated_parts_equal_the_batch(eight_devices):
    """On one device, and in two groups of devices that accumulate separately."""
    objective = Deterministic(num_classes=4)
    one = sharding.make_mesh(devices=jax.devices()[:1])
    four = sharding.make_mesh(2, 2, devices=jax.devices()[:4])
    results = []
    for parts, mesh in ((1, one), (4, one), (4, four)):
        state, step = _setup(_sgd(), objective=objective, accumulate=parts, mesh=mesh)
        state, metrics = step(state, _pool())
        results.append((_host(state.params), float(metrics['loss'])))
    for result in results[1:]:
        _assert_close(results[0], result, rtol=1e-4, atol=1e-6)


def test_accumulated_parts_draw_differently():
    same = jax.random.normal(jax.random.key(0), (1, 1, *SHAPE))
    images = np.broadcast_to(same, (1, 56, *SHAPE))
    pool = _pool(1, 56, images=images)._replace(
        labels=jnp.zeros((1, 56), jnp.int32), noise_index=jnp.zeros((1, 56), jnp.int32)
    )
    losses = []
    for parts in (1, 2):
        state, step = _setup(_sgd(), accumulate=parts)
        losses.append(float(step(state, pool)[1]['loss']))
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    'devices,fsdp',
    [(8, 2), *(pytest.param(*m, marks=pytest.mark.slow) for m in ((2, 1), (8, 8)))],
)
def test_meshes_give_the_same_parameters(devices, fsdp, eight_devices):
    """Data parallel, fully sharded and both, against one device."""
    results = []
    for mesh in (
        sharding.make_mesh(devices=jax.devices()[:1]),
        sharding.make_mesh(fsdp=fsdp, devices=jax.devices()[:devices]),
    ):
        state, step = _setup(_sgd(), mesh=mesh)
        split = state.params['blocks']['mlp_in']['kernel'].sharding
        assert split.is_fully_replicated == (mesh.shape['fsdp'] == 1)
        for number in range(2):
            state, metrics = step(state, _pool(number=number))
        results.append(
            (_host(state.params), _host(state.infer), float(metrics['loss']))
        )
    assert mesh.size == devices
    _assert_close(results[0], results[1], rtol=2e-4, atol=2e-6)


def test_one_compilation_and_donated_buffers():
    state, step = _setup()
    first = state.params['final']['kernel']
    for number in range(5):
        state, _ = step(state, _pool(number=number))
    assert step.compiled._cache_size() == 1
    assert first.is_deleted()


def test_a_step_is_a_function_of_seed_and_step():
    def run(key):
        state, step = _setup()
        for number in range(2):
            state, metrics = step(state, _pool(number=number), key)
        return _host(state.params), float(metrics['loss'])

    first, again, other = run(SEED_KEY), run(SEED_KEY), run(jax.random.key(8))
    jax.tree.map(np.testing.assert_array_equal, first[0], again[0])
    assert first[1] == again[1] != other[1]


def test_the_batch_is_paired_as_the_pool_says():
    pool = _pool(3, 4, number=5)
    batch = paired_pool.pool_batch(pool, jnp.int32(4), SEED_KEY)  # Its second batch.
    np.testing.assert_array_equal(batch.data, pool.data[1])
    np.testing.assert_array_equal(batch.label, pool.labels[1])
    key = random_streams.stream(SEED_KEY, random_streams.NOISE, 5)
    for place, number in enumerate(pool.noise_index[1]):
        noise = jax.random.normal(jax.random.fold_in(key, number), SHAPE)
        np.testing.assert_array_equal(batch.noise[place], noise)


def test_random_streams_are_distinct():
    keys = {
        tuple(
            jax.random.key_data(
                random_streams.stream(SEED_KEY, domain, number)
            ).tolist()
        )
        for domain in range(3)
        for number in range(50)
    }
    assert len(keys) == 150


SWITCHES = ('intrinsic_guidance', 'interval', 'wavelet', 'twin')


@pytest.mark.parametrize('on', list(itertools.product((False, True), repeat=4)))
def test_components_switch_off_alone_and_together(on):
    """All parts except transport, which is switched in `train` and tested there."""
    switch = dict(zip(SWITCHES, on, strict=True))
    config = config_lib.default()
    config.wavelet.update(enabled=switch['wavelet'], levels=3)
    distance = loss_distance.squared_error
    if switch['wavelet']:
        weights = tuple(range(1, 11))
        distance = functools.partial(
            loss_distance.wavelet_error, weights=weights, levels=3, wavelet='haar'
        )
    objective = ism.Objective(
        num_classes=4,
        intrinsic_guidance=switch['intrinsic_guidance'],
        guidance_interval=0.3 if switch['interval'] else 0.0,
    )
    tx = _sgd()
    state = train_state.TrainState(
        step=jnp.int32(0), params=jnp.float32(1), opt_state=tx.init(jnp.float32(1)),
        target=jnp.float32(0.5) if switch['twin'] else None, infer=jnp.float32(0.2),
        skipped=jnp.int32(0), skipped_in_row=jnp.int32(0),
    )  # fmt: skip

    def apply(params, x, t, d, w, label):
        scalar = params * (1 + t + d + w + label)
        return jnp.sin(x) * scalar[:, None, None, None]

    state, metrics = train_step.train_step(
        state, _pool(), SEED_KEY, apply=apply, objective=objective, distance=distance,
        tx=tx, accumulate=1, target_decay=0.9, infer_decay=0.99, ema_warmup=False,
        num_steps=100,
    )  # fmt: skip
    metrics |= train_step.state_metrics(state)
    assert ('guidance/loss' in metrics) == switch['intrinsic_guidance']
    assert ('velocity/band_d1' in metrics) == switch['wavelet']
    assert ('distance/online_target' in metrics) == switch['twin']
    for name in ('loss', 'norm/gradient', 'norm/update', 'distance/online_infer'):
        assert np.isfinite(metrics[name]), name
    LOSSES[on] = float(metrics['loss'])


LOSSES = {}


def test_each_switch_changed_the_loss():
    if len(LOSSES) != 16:
        pytest.skip('runs after test_components_switch_off_alone_and_together')
    for on, loss in LOSSES.items():
        for i in range(4):
            other = tuple(not v if j == i else v for j, v in enumerate(on))
            # Without guidance the interval has no effect.
            if i == 1 and not on[0]:
                assert loss == LOSSES[other]
            else:
                assert loss != LOSSES[other]
