"""The sampler on flows known in closed form, and on several devices."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import pytest

from ism_jax.method import random_streams, time_grid
from ism_jax.objectives import ism
from ism_jax.runtime import compiled_program, sharding
from ism_jax.sampling.sampler import Sampler, batch_sharding

SHAPE = (2, 2, 1)


def _sampler(apply, **options):
    objective = ism.Objective(num_classes=10)
    return Sampler(objective, apply, SHAPE, **dict(batch_size=4) | options)


def _run(sampler, params=0.0, labels=range(6), guidance=0.0, steps=1, key=0):
    batches = sampler.batches(
        params, jax.random.key(key), list(labels), guidance=guidance,
        schedule=time_grid.dyadic_schedule(steps),
    )  # fmt: skip
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _noise(count, key=0):
    return random_streams.sample_noise(jax.random.key(key), jnp.arange(count), SHAPE)


@pytest.mark.parametrize('steps', [1, 3, 8, 128])
def test_mean_velocities_are_exact_in_any_number_of_steps(steps):
    """dx/dt = x: the mean velocity over d is x (e^d - 1) / d."""

    def apply(params, x, t, d, w, label):
        del params, t, w, label
        d = jnp.where(d > 0, d, 1 / 128)[:, None, None, None]
        return x * (jnp.exp(d) - 1) / d

    images, _ = _run(_sampler(apply), steps=steps)
    np.testing.assert_allclose(images, np.e * _noise(6), rtol=2e-4)


def test_one_network_call_per_step_with_its_inputs():
    calls = []

    def apply(params, x, t, d, w, label):
        jax.debug.callback(lambda *a: calls.append(a), t, d, w, label)
        return params + 0 * x

    _run(_sampler(apply), labels=[3, 1, 2, 0], guidance=1.5, steps=3)
    assert len(calls) == 3
    assert sorted({(float(t[0]), float(d[0])) for t, d, *_ in calls}) == [
        (0, 0.5), (0.5, 0.25), (0.75, 0.25),
    ]  # fmt: skip
    assert all((w == 1.5).all() for _, _, w, _ in calls)
    np.testing.assert_array_equal(calls[0][3], [3, 1, 2, 0])


def test_the_guidance_interval_is_passed_where_the_network_takes_it():
    def apply(params, x, t, d, w, label, interval):
        return 0 * x + (interval[:, 0] + 10 * interval[:, 1])[:, None, None, None]

    objective = ism.Objective(num_classes=10, interval='input', guidance_interval=0.25)
    sampler = Sampler(objective, apply, SHAPE, batch_size=4)
    options = dict(guidance=1.0, schedule=2)

    def draw(**interval):
        batches = sampler.batches(
            0.0, jax.random.key(0), range(6), **options, **interval
        )
        return np.concatenate([images for images, _ in batches]) - _noise(6)

    np.testing.assert_allclose(draw(), 10.25, atol=1e-5)
    np.testing.assert_allclose(draw(interval=(0.5, 0.75)), 8.0, atol=1e-5)
    final = sampler.final(0.0, _noise(2), [0, 1], **options, interval=(0.5, 0.75))
    np.testing.assert_allclose(final - _noise(2), 8.0, atol=1e-5)


def test_noise_belongs_to_the_sample_not_to_the_batch():
    def apply(params, x, t, d, w, label):
        return params + 0 * x

    small, labels = _run(_sampler(apply, batch_size=4), params=0.5)
    large, _ = _run(_sampler(apply, batch_size=100), params=0.5)
    np.testing.assert_array_equal(labels, range(6))
    np.testing.assert_array_equal(small, large)
    np.testing.assert_allclose(small, _noise(6) + 0.5, atol=1e-6)
    assert (small != _run(_sampler(apply), params=0.5, key=1)[0]).all()


def test_one_compilation_for_all_schedules_and_guidance_scales():
    traces = []

    def apply(params, x, t, d, w, label):
        traces.append(1)
        return params + 0 * x

    sampler = _sampler(apply)
    for steps, guidance in ((4, 0.0), (4, 2.0), (8, 0.0), (1, 0.0), (128, 0.0)):
        _run(sampler, steps=steps, guidance=guidance)
        _run(sampler, steps=steps, labels=range(9))
    assert len(traces) <= 2  # A loop's body may be traced twice.


def test_the_cost_of_a_lowered_schedule_is_known():
    params, sampler = jnp.ones((4, 4)), _sampler(_matrix_field)
    programs = [
        compiled_program.read(sampler.lower(params, steps).compile())
        for steps in (1, 8)
    ]
    assert [program.unknown_loops for program in programs] == [0, 0]
    assert programs[1].flops == 8 * programs[0].flops > 0


def _matrix_field(params, x, t, d, w, label):
    return (x.reshape(4, 4) @ params).reshape(x.shape)


def _label_field(params, x, t, d, w, label):
    return params['a'] * x + label[:, None, None, None]


@pytest.mark.parametrize('count', [6, 24])
def test_samples_are_divided_among_the_devices(count, eight_devices):
    params = {'a': jnp.float32(0.5)}
    many = jax.device_put(params, sharding.replicated(sharding.make_mesh()))
    one = jax.device_put(params, jax.devices()[0])
    options = dict(guidance=1.0, schedule=(0.5, 0.5))
    key, labels = jax.random.key(0), np.arange(count) % 3
    sampler = _sampler(_label_field, batch_size=12)  # Not a multiple of 8.
    on_many = list(sampler.batches(many, key, labels, **options))
    on_one = list(sampler.batches(one, key, labels, **options))
    for (a, label_a), (b, label_b) in zip(on_many, on_one, strict=True):
        np.testing.assert_array_equal(label_a, label_b)
        np.testing.assert_allclose(a, b, atol=1e-5)
    split, size = batch_sharding(many, 12)
    assert isinstance(split, NamedSharding) and size == 16
    assert not split.is_fully_replicated and len(split.device_set) == 8
    assert batch_sharding(one, 12) == (None, 12)
    # A slice of the same samples.
    tail = list(sampler.batches(many, key, labels[3:], first=3, **options))
    np.testing.assert_allclose(
        np.concatenate([x for x, _ in tail]),
        np.concatenate([x for x, _ in on_many])[3:],
        atol=1e-5,
    )


def test_trajectory_starts_at_the_noise_and_ends_at_the_sample():
    def decode(latents):
        return jnp.repeat(latents, 3, axis=-1)

    sampler = _sampler(_label_field, decode=decode)
    assert sampler.image_shape == SHAPE and sampler.output_shape() == (2, 2, 3)
    params, key, labels = {'a': 0.5}, jax.random.key(0), [1, 2]
    options = dict(guidance=0.0, schedule=(0.5, 0.25, 0.25))
    noise = sampler.noise(key, [0, 1])
    states = list(sampler.trajectory(params, noise, labels, **options))
    assert len(states) == 4
    np.testing.assert_array_equal(states[0], decode(noise))
    expected = noise
    for d, state in zip(options['schedule'], states[1:], strict=True):
        label = np.asarray(labels)[:, None, None, None]
        expected = expected + d * (0.5 * expected + label)
        np.testing.assert_allclose(state, decode(expected), rtol=1e-5)
    final = sampler.final(params, noise, labels, **options)
    np.testing.assert_array_equal(final, states[-1])
    ((images, _),) = sampler.batches(params, key, labels, **options)
    np.testing.assert_allclose(final, images, rtol=1e-5)


def test_methods_that_add_noise_have_no_trajectory():
    sampler = _sampler(_label_field)
    sampler.deterministic = False
    with pytest.raises(ValueError, match='adds noise between steps'):
        sampler.final({'a': 0.5}, _noise(1), [0], guidance=0, schedule=(1.0,))


def test_untrained_schedules_are_refused():
    sampler = _sampler(lambda params, x, *args: x)
    with pytest.raises(ValueError, match='0.3'):
        next(
            sampler.batches(0, jax.random.key(0), [0], guidance=0, schedule=(0.3, 0.7))
        )
