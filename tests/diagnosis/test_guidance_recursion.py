"""Proposition 1: the recursion against its own definition, and where it is exact."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.diagnosis import compounding_guidance, guidance_recursion
from ism_jax.diagnosis import subject as subjects


def test_a_large_step_is_the_recursion_of_the_method(batch, curved_field, null):
    x, t, label = batch()
    no_label = jnp.full_like(label, null)
    g, base, field = 1.5, 8, curved_field
    quarter, eighth = jnp.full_like(t, 2 / base), jnp.full_like(t, 1 / base)

    def guide(first, x, t):
        return first(x, t, no_label) + g * (first(x, t, label) - first(x, t, no_label))

    def double(step, x, t, d):
        first = step(x, t)
        return (first + step(x + d[:, None, None, None] * first, t + d)) / 2

    def two(x, t, label):
        if label is no_label:
            return double(lambda x, t: field(x, t, no_label), x, t, eighth)
        return double(lambda x, t: guide(field, x, t), x, t, eighth)

    expected = {
        'all': double(lambda x, t: guide(two, x, t), x, t, quarter),
        'finest': double(lambda x, t: two(x, t, label), x, t, quarter),
        'velocity': subjects.cfg_velocity(field, x, t, 4 * eighth, label, null, 4, g),
    }
    for guided, value in expected.items():
        found = guidance_recursion.shortcut_velocity(
            field, x, t, label, null, 4, base, g, guided
        )
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5)
    assert np.abs(expected['all'] - expected['finest']).max() > 0.05


@pytest.fixture
def scales(batch, normal, null):
    """Effective scales of the recursion in a field."""

    def measure(field, guided, base=32, g=1.5):
        _, _, label = batch(16)
        noise, data = (jnp.asarray(x) for x in normal(2, 16, 2, 2, 1))
        rng = np.random.default_rng(0)

        @jax.jit
        def small_steps(x, t, d, steps, scale):
            return subjects.cfg_velocity(field, x, t, d, label, null, steps, scale)

        scales = {}
        for steps in subjects.step_sizes(base):
            x, t, d = subjects.step_starts(rng, noise, data, steps, base)
            large_step = guidance_recursion.shortcut_velocity(
                field, x, t, label, null, steps, base, g, guided
            )
            small = functools.partial(small_steps, x, t, d, steps)
            scales[steps] = compounding_guidance.effective_scale(large_step, small)
        return scales

    return measure


@pytest.mark.parametrize(
    'guided, expected',
    [
        ('all', lambda n: 1.5 ** math.log2(n)),
        ('finest', lambda n: 1.5 if n > 1 else 1.0),
        ('velocity', lambda n: 1.5),
    ],
)
def test_proposition_1_is_exact_where_it_should_be(
    scales, affine_field, guided, expected
):
    found = scales(affine_field, guided)
    assert list(found) == [1, 2, 4, 8, 16, 32]
    for steps, scale in found.items():
        assert scale.scale == pytest.approx(expected(steps), rel=2e-3), steps
        assert scale.explained > 0.9999 and scale.is_clear()


def test_the_scale_of_guided_steps_is_found_in_any_field(scales, curved_field):
    found = scales(curved_field, 'velocity')
    assert all(e.scale == pytest.approx(1.5, abs=5e-3) for e in found.values())


def test_the_closed_form_deviates_as_its_docstring_says():
    std = guidance_recursion.DATA_STD
    found = guidance_recursion.closed_form_scales(0.9 * std)
    compounded = {n: found['SM, all levels'][n].scale for n in (8, 32, 64)}
    assert compounded == pytest.approx({8: 3.381, 32: 7.820, 64: 12.236}, rel=2e-3)
    assert found['SM, all levels'][128].scale > 1.3 * 1.5**7
    for name, first in (('SM, finest', 1.0), ('iSM', 1.5)):
        scales = [e.scale for e in found[name].values()]
        assert scales == pytest.approx([first] + 7 * [1.5], abs=5e-3)
    table = guidance_recursion.scale_table(found, 1.5).splitlines()
    assert table[0].split() == 'N g ** log2 N SM, all levels SM, finest iSM'.split()
    assert table[4].split() == ['8', '3.375', '3.381', '1.500', '1.500']
