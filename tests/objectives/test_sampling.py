"""Samplers of all objectives: with the ideal network they reproduce the data."""

from ideal_networks import (
    FLOW,
    NULL,
    SHAPE,
    guided,
    guided_in_steps,
    plain,
    to_the_end,
    unscaled,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.method import time_grid
from ism_jax.objectives import (
    alpha_flow,
    consistency,
    flow_matching,
    imf,
    imm,
    ism,
    meanflow,
    shortcut,
)

_ICT = consistency.Objective(NULL)
_IMM = imm.Objective(NULL)
flow_map = jax.jit(FLOW.flow_map)


def _sample(objective, network, steps, w=0.0, size=512):
    """Samples, those of a network 5 % off, the flow's end from the noise, labels."""
    keys = jax.random.split(jax.random.key(3), 3)
    noise = jax.random.normal(keys[0], (size, *SHAPE))
    label = jax.random.randint(keys[1], (size,), 0, NULL)
    guidance = jnp.full((size,), w)
    times = time_grid.times_and_sizes(objective.schedule(steps))
    sample = jax.jit(
        lambda scale: objective.sample(
            lambda scale, *inputs: scale * network(None, *inputs),
            scale,
            noise,
            label,
            guidance,
            *times,
            keys[2],
        )
    )
    begin, start, end = jnp.full((size,), objective.start_time), noise, 1.0
    if isinstance(objective, consistency.Objective):
        start = (1 - objective.start_time) * noise
        end = 1 / (1 + objective.sigma_min)
    exact = flow_map(start, begin, end - begin, guidance, label)
    return sample(1.0), sample(1.05), exact, label


DETERMINISTIC = {
    'shortcut': (shortcut.Objective(NULL, guidance=0.5), guided_in_steps(0.5), 0.5),
    'ism': (ism.Objective(NULL, guidance_interval=0.0), FLOW.apply, 2.0),
    'meanflow': (meanflow.Objective(NULL, guidance=1.0), guided(1.0), 1.0),
    'alpha_flow': (alpha_flow.Objective(NULL, guidance=1.0), guided(1.0), 1.0),
    'imf': (imf.Objective(NULL), FLOW.apply, 2.0),
    'imm': (_IMM, unscaled(_IMM), 0.0),
    'ism derivative': (
        ism.Objective(NULL, guidance_interval=0.0, step_draw='ends'),
        FLOW.apply,
        2.0,
    ),
}


@pytest.mark.parametrize('name', DETERMINISTIC)
@pytest.mark.parametrize('steps', [1, 2, 3, 4])
def test_samplers_follow_the_exact_map(name, steps):
    objective, network, w = DETERMINISTIC[name]
    low, high = objective.guidance_range
    assert low <= w <= high
    sample, wrong, exact, _ = _sample(objective, network, steps, w)
    np.testing.assert_allclose(sample, exact, atol=5e-5)
    assert np.abs(wrong - exact).max() > 0.02


@pytest.mark.parametrize('name', ['imf', 'ism derivative'])
def test_methods_of_all_steps_sample_with_any_schedule(name):
    objective, network, w = DETERMINISTIC[name]
    for schedule in ((0.6, 0.4), (0.1, 0.2, 0.7)):
        sample, wrong, exact, _ = _sample(objective, network, schedule, w)
        np.testing.assert_allclose(sample, exact, atol=5e-5)
        assert np.abs(wrong - exact).max() > 0.02
    assert objective.schedule(3) == (1 / 3,) * 3
    assert ism.Objective(NULL).schedule(3) == (0.5, 0.25, 0.25)
    with pytest.raises(ValueError, match='size 0.6, which is not one of'):
        ism.Objective(NULL).schedule((0.6, 0.4))


FINEST = {
    'flow_matching': (flow_matching.Objective, {}, plain, 0.0),
    'flow_matching guided': (flow_matching.Objective, {}, plain, 1.5),
    'shortcut': (shortcut.Objective, {'guidance': 0.5}, guided_in_steps(0.5), 0.5),
    'ism': (ism.Objective, {}, FLOW.apply, 2.0),
}


@pytest.mark.parametrize('name', FINEST)
def test_finest_steps_converge_to_the_exact_map(name):
    """First order in the step size; for SM and iSM this is only the finest level.

    SM does not train a guided velocity: its sampler applies the guidance.
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
    if w:  # Guidance applies.
        rest = np.asarray(sample) - FLOW.means[label]
        assert np.mean(rest * FLOW.means[label]) / np.mean(FLOW.means**2) > 0.1


STOCHASTIC = {
    'consistency': (_ICT, to_the_end(_ICT)),
    'imm restart': (imm.Objective(NULL, sampler='restart'), unscaled(_IMM)),
}


@pytest.mark.parametrize('name', STOCHASTIC)
@pytest.mark.parametrize('steps', [1, 2, 4])
def test_stochastic_samplers_reproduce_the_data(name, steps):
    size = 16384
    sample, wrong, exact, label = _sample(*STOCHASTIC[name], steps, size=size)
    distance = np.abs(sample - exact)
    if steps == 1:  # No noise is added.
        assert distance.max() < 5e-5
    else:
        assert distance.mean() > 0.05
    sample, wrong = (np.asarray(a) - FLOW.means[label] for a in (sample, wrong))
    # Shift of each class along its mean, relative to it; chance gives 0.005.
    shifts = [
        np.mean(rest * FLOW.means[label]) / np.mean(FLOW.means**2)
        for rest in (sample, wrong)
    ]
    assert abs(shifts[0]) < 0.015 and abs(shifts[1]) > 0.03
    assert sample.std() == pytest.approx(FLOW.class_std, rel=0.02)


@pytest.mark.parametrize('name', [*DETERMINISTIC, 'flow_matching', 'consistency'])
@pytest.mark.parametrize(('steps', 'guided'), [(2, False), (2, True), (128, True)])
def test_network_calls_are_those_that_the_sampler_makes(name, steps, guided):
    others = {'flow_matching': flow_matching.Objective(NULL), 'consistency': _ICT}
    objective = others[name] if name in others else DETERMINISTIC[name][0]
    w = min(objective.guidance_range[1], 1.0) if guided else objective.guidance_range[0]
    evaluated = []

    def network(_, x, *inputs):
        jax.debug.callback(lambda x: evaluated.append(len(x)), x)
        return 0.0 * x

    size = 3
    label = jnp.zeros((size,), int)
    times = time_grid.times_and_sizes(objective.schedule(steps))
    noise, key = jnp.zeros((size, *SHAPE)), jax.random.key(0)
    jax.block_until_ready(
        objective.sample(network, None, noise, label, jnp.full(size, w), *times, key)
    )
    jax.effects_barrier()
    assert sum(evaluated) == size * objective.network_calls(steps, w)
