"""Dyadic schedules, their times and their checks."""

import jax
import numpy as np
import pytest
from scipy import special, stats

from ism_jax.method import time_grid


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


def test_the_network_is_conditioned_on_zero_for_the_finest_step_alone():
    t, d = time_grid.times_and_sizes((1 / 128,) * 128)
    np.testing.assert_array_equal(t, np.arange(128) / 128)
    assert (d == 1 / 128).all() and (time_grid.embedded_step(d, 128) == 0).all()
    _, d = time_grid.times_and_sizes((1 / 64,) * 64)
    np.testing.assert_array_equal(d, time_grid.embedded_step(d, 128))


@pytest.mark.parametrize(
    'steps,message',
    [
        ((0.3, 0.7), 'step 0 of size 0.3, which is not one of'),
        ((0.25, 0.5, 0.25), 'starts at t = 0.25'),
        ((0.5, 0.25), 'ends at t = 0.75'),
        ((1 / 256,) * 256, '1/128'),
        ((1.0, 1.0), 'ends at t = 2'),
        ((), 'ends at t = 0'),
    ],
)
def test_schedules_outside_the_grid_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        time_grid.check_schedule(steps)


@pytest.mark.parametrize('number', [0, 129, -1])
def test_numbers_of_steps_out_of_range_are_refused(number):
    with pytest.raises(ValueError, match=f'steps = {number} must lie in 1 .. 128'):
        time_grid.dyadic_schedule(number)


@pytest.mark.parametrize('base_steps', [-2, 0, 1, 100, 127])
def test_base_steps_are_powers_of_two(base_steps):
    assert not time_grid.is_base_steps(base_steps)
    assert time_grid.is_base_steps(2) and time_grid.is_base_steps(128)


def test_num_levels():
    assert time_grid.num_levels(2) == 1 and time_grid.num_levels(128) == 7


def test_equal_schedules_and_free_step_sizes():
    assert time_grid.equal_schedule(3) == (1 / 3,) * 3
    assert time_grid.equal_schedule(4) == time_grid.dyadic_schedule(4)
    time_grid.check_schedule((0.6, 0.4), dyadic=False)
    time_grid.check_schedule((0.1,) * 10, dyadic=False)  # Their sum is rounded.
    for schedule, fault in (
        ((0.5, 0.4), 'ends at t = 0.9'),
        ((), 'ends at t = 0;'),
        ((1.5, -0.5), 'is not positive'),
        ((0.0, 1.0), 'is not positive'),
        ((float('nan'), 1.0), 'is not positive'),
    ):
        with pytest.raises(ValueError, match=fault):
            time_grid.check_schedule(schedule, dyadic=False)


def test_times_have_the_requested_distribution():
    key = jax.random.key(0)
    uniform = time_grid.sample_times(key, 8000, 'uniform', 0.5, 2.0)
    assert stats.kstest(uniform, 'uniform').pvalue > 0.01
    logit = special.logit(time_grid.sample_times(key, 8000, 'logit_normal', 0.5, 2.0))
    assert stats.kstest(logit, stats.norm(0.5, 2.0).cdf).pvalue > 0.01


def test_random_steps_are_pairs_of_sorted_noise_levels():
    t, d = time_grid.sample_steps(jax.random.key(0), 8000, -0.4, 1.0)
    assert (t > 0).all() and (d >= 0).all() and (t + d < 1).all()
    level = np.concatenate([1 - t, 1 - t - d])
    assert stats.kstest(special.logit(level), stats.norm(-0.4, 1.0).cdf).pvalue > 0.01
