"""Step sizes, guidance draws and averages: the small pieces of arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.method import guidance, time_grid
from ism_jax.training import ema, optimizer


@pytest.mark.parametrize('num_steps', range(1, 129))
def test_every_number_of_steps_has_a_trained_schedule(num_steps):
    steps = time_grid.dyadic_schedule(num_steps)
    assert len(steps) == num_steps and sum(steps) == 1
    time_grid.check_schedule(steps)


def test_named_schedules():
    assert time_grid.dyadic_schedule(1) == (1,)
    assert time_grid.dyadic_schedule(3) == (0.5, 0.25, 0.25)
    assert time_grid.dyadic_schedule(5) == (0.25,) * 3 + (0.125,) * 2
    assert time_grid.dyadic_schedule(8) == (0.125,) * 8


def test_the_network_is_told_zero_for_the_finest_step_only():
    t, d = time_grid.times_and_sizes((1 / 128,) * 128)
    np.testing.assert_array_equal(t, np.arange(128) / 128)
    assert (d == 1 / 128).all() and (time_grid.embedded_step(d, 128) == 0).all()
    _, d = time_grid.times_and_sizes((1 / 64,) * 64)
    np.testing.assert_array_equal(d, time_grid.embedded_step(d, 128))


@pytest.mark.parametrize(
    'steps,message',
    [
        ((0.3, 0.7), 'step 0 of size 0.3 is not one of'),
        ((0.25, 0.5, 0.25), 'starts at t = 0.25'),
        ((0.5, 0.25), 'ends at t = 0.75'),
        ((1 / 256,) * 256, '1/128'),
        ((1.0, 1.0), 'ends at t = 2'),
        ((), 'ends at t = 0'),
    ],
)
def test_schedules_that_were_not_trained(steps, message):
    with pytest.raises(ValueError, match=message):
        time_grid.check_schedule(steps)


@pytest.mark.parametrize('number', [0, 129, -1])
def test_numbers_of_steps_out_of_range(number):
    with pytest.raises(ValueError, match=f'steps = {number} must lie in 1 .. 128'):
        time_grid.dyadic_schedule(number)


@pytest.mark.parametrize('base', [0, 1, 100, 127])
def test_base_steps_must_be_a_power_of_two(base):
    with pytest.raises(ValueError, match='power of two'):
        time_grid.num_levels(base)
    assert time_grid.num_levels(128) == 7


def test_guidance_values_and_interval():
    values = guidance.guidance_values(3.5, 0.25, include_zero=False)
    assert len(values) == 14 and values[0] == 0.25 and values[-1] == 3.5
    assert guidance.guidance_values(3.5, 0.25, include_zero=True)[0] == 0
    drawn = guidance.sample_guidance(jax.random.key(0), 7000, values)
    counts = [(drawn == v).sum() for v in values]
    assert min(counts) > 400 and sum(counts) == 7000
    w = guidance.interval_guidance(
        jnp.array([2.0, 2.0, 2.0]), jnp.array([0.0, 0.3, 0.9]), 0.3
    )
    np.testing.assert_array_equal(w, [0, 2, 2])
    everywhere = guidance.interval_guidance(jnp.ones(2), jnp.array([0.0, 1.0]), 0.0)
    np.testing.assert_array_equal(everywhere, [1, 1])


def test_averages_follow_the_hand_recursion():
    average = hand = 1.0
    warm = hand_warm = 1.0
    for n, value in enumerate([2.0, -1.0, 0.5, 3.0]):
        average = ema.update({'a': average}, {'a': value}, 0.95)['a']
        hand = 0.95 * hand + 0.05 * value
        decay = ema.warmup_decay(0.9999, jnp.int32(n))
        warm = ema.update(warm, value, decay)
        hand_warm = (1 + n) / (10 + n) * hand_warm + 9 / (10 + n) * value
    np.testing.assert_allclose(average, hand, rtol=1e-6)
    np.testing.assert_allclose(warm, hand_warm, rtol=1e-6)
    np.testing.assert_allclose(ema.warmup_decay(0.9999, jnp.int32(10**7)), 0.9999)


def test_learning_rates():
    rate = optimizer.learning_rate(
        peak=1.0, schedule='cosine', warmup_steps=10, num_steps=110
    )
    values = [float(rate(n)) for n in (0, 9, 10, 60, 110)]
    np.testing.assert_allclose(values, [0.1, 0.91, 1.0, 0.5, 0.0], atol=1e-6)
    for name, end in (('constant', 1.0), ('linear', 0.0)):
        rate = optimizer.learning_rate(
            peak=1.0, schedule=name, warmup_steps=0, num_steps=10
        )
        assert float(rate(0)) == 1.0 and float(rate(10)) == end


def test_clipping_and_decay_act_where_they_should():
    params = {'kernel': jnp.ones(4), 'bias': jnp.ones(4)}
    big = {'kernel': 100 * jnp.ones(4), 'bias': jnp.zeros(4)}
    options = dict(b1=0.0, b2=0.0, eps=1.0)
    constant = lambda _: 1.0

    def update(grad, **more):
        tx = optimizer.adamw(
            constant, **options | dict(weight_decay=0.0, clip_norm=0.0) | more
        )
        return tx.update(grad, tx.init(params), params)[0]

    # g / (|g| + 1): 100 / 101 unclipped, 0.5 / 1.5 when clipped to norm 1.
    np.testing.assert_allclose(update(big)['kernel'], -100 / 101, rtol=1e-5)
    np.testing.assert_allclose(update(big, clip_norm=1.0)['kernel'], -1 / 3, rtol=1e-5)
    zero = jax.tree.map(jnp.zeros_like, params)
    decayed = update(zero, weight_decay=0.1)
    np.testing.assert_allclose(decayed['kernel'], -0.1, rtol=1e-6)
    np.testing.assert_array_equal(decayed['bias'], 0)
