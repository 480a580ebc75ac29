"""Targets of Shortcut Models for the exact map."""

import functools

from ideal_networks import FLOW, NULL, expand, grid_points, guided_in_steps
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.objectives import shortcut


def _finest_error(base_steps, w, target):
    """Largest error of `target(x, t, d, label)` for two of the finest steps."""
    x, t, label = grid_points(64)
    d = jnp.full_like(t, 1 / base_steps)
    exact = FLOW.mean_velocity(x, t, 2 * d, jnp.full_like(t, w), label)
    return float(jnp.abs(target(x, t, d, label) - exact).max())


@pytest.mark.parametrize('w', [0.0, 0.5])
def test_shortcut_targets_of_the_exact_map(w):
    """Exact except for the finest level, where a velocity replaces a step: O(d)."""
    make = lambda **kw: shortcut.Objective(
        num_classes=NULL, guidance=w, **dict(target_clip=float('inf')) | kw
    )
    network = guided_in_steps(w)
    x, t, label = grid_points(64)
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
    network = guided_in_steps(0.5)
    x, t, label = grid_points(64)
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

    The velocity does not depend on x or t; it is 1 for the class and 0 for null.
    """
    objective = shortcut.Objective(
        num_classes=NULL, guidance=0.5, cfg_levels=levels, target_clip=100.0
    )
    scales = {0.0: 1.0}  # Velocity of the class by step size.

    def network(params, x, t, d, w, label):
        scale = scales[float(d[0])]
        return jnp.where(expand(label == NULL), 0.0, scale) * jnp.ones_like(x)

    x, t, label = grid_points(2)
    for level in range(6, -1, -1):
        d = jnp.full_like(t, 0.5 ** (level + 1))
        target = objective.bootstrap_target(network, None, x, 0 * t, d, label)
        scales[0.5**level] = float(target.mean())
    assert scales[1.0] == pytest.approx(expected)
