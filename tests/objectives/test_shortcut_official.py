"""Shortcut Models against numbers from the official code.

`fixtures/shortcut_official.json` holds the random draws and the targets of that code
(see its `about`). The draws are replayed here: for the bootstrap targets alone, and for
a whole batch, where every input of the network and every target must be equal.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.method.training_batch import Batch
from ism_jax.objectives import shortcut

NULL = 3
EVERY = 4
TARGET_EMA, ONLINE = 3.0, 0.7  # The network's one parameter, p.
FIXTURE = pathlib.Path(__file__).parents[1] / 'fixtures' / 'shortcut_official.json'


def _official():
    """{part: {name: array}}; images are [samples, 2, 2, 1]."""
    parts = json.loads(FIXTURE.read_text())

    def array(name, values):
        if name in ('label', 'label_dropped', 'level'):
            return np.asarray(values, np.int32)
        values = np.asarray(values, np.float32)
        return values if name == 't' else values.reshape(-1, 2, 2, 1)

    return {
        part: {name: array(name, values) for name, values in parts[part].items()}
        for part in ('bootstrap', 'flow')
    }


def _network(params, x, t, d, w, label):
    """The function that replaced the official network; its `dt_base` is a level."""
    assert w.shape == t.shape
    level = jnp.where(d == 0, 7.0, -jnp.log2(jnp.where(d == 0, 1.0, d)))
    scalar = params + jnp.sin(3 * t) + 0.1 * level + 0.3 * label
    return jnp.cos(x) * scalar[:, None, None, None]


def _targets(guidance, **options):
    official = _official()['bootstrap']
    objective = shortcut.Objective(num_classes=NULL, guidance=guidance, **options)
    half = 0.5 ** (official['level'] + 1.0)
    target = objective.bootstrap_target(
        _network,
        TARGET_EMA,
        *(jnp.asarray(official[name]) for name in ('x', 't')),
        jnp.asarray(half, jnp.float32),
        jnp.asarray(official['label']),
    )
    return official, np.asarray(target)


@pytest.mark.parametrize('guidance, name', [(0.0, 'target'), (0.5, 'target_guided')])
def test_bootstrap_targets_are_the_official_ones(guidance, name):
    official, target = _targets(guidance)
    np.testing.assert_allclose(target, official[name], atol=1e-5)


def test_fixture_depends_on_guidance_and_both_clippings():
    official, unclipped = _targets(0.5, target_clip=1e9)
    guided = np.abs(official['target'] - official['target_guided']).max((1, 2, 3)) > 0.1
    np.testing.assert_array_equal(guided, official['level'] == 6)
    outside = np.abs(unclipped) > 4
    assert outside.any() and not outside.all()
    # Where the target is within the limits, only the midpoint was clipped.
    moved = np.abs(unclipped - official['target_guided']) > 0.01
    assert (moved & ~outside).any()


def test_guidance_at_all_levels_is_not_the_official_rule():
    official, target = _targets(0.5, cfg_levels='all')
    difference = np.abs(target - official['target_guided']).max((1, 2, 3))
    differs = set(official['level'][difference > 1e-3])
    assert differs == set(range(6))


def test_whole_batch_is_the_official_one(monkeypatch):
    """Inputs, targets and loss equal the official ones for the official draws."""
    bootstrap, flow = _official().values()
    patterns = len(bootstrap['t'])
    # The official code sorts by level; ours cycles through the levels.
    order = np.r_[np.arange(14).reshape(7, 2)[::-1].T.ravel(), 14, 15]
    bootstrap = {name: values[order] for name, values in bootstrap.items()}
    np.testing.assert_array_equal(
        bootstrap['level'], [*range(7), *range(7), 0, 0], 'the order of our levels'
    )

    def interleave(first, second):
        """One bootstrapped sample, then EVERY - 1 of flow matching, repeated."""
        second = second.reshape(patterns, EVERY - 1, *second.shape[1:])
        both = np.concatenate([first[:, None], second], axis=1)
        return both.reshape(-1, *both.shape[2:])

    batch = Batch(
        *(
            jnp.asarray(interleave(bootstrap[name], flow[name]))
            for name in ('noise', 'data', 'label')
        )
    )

    def draw(values):
        """A replacement of a function of jax.random that returns the official draw."""

        def drawn(key, *args, **kwargs):
            del key, args, kwargs
            return jnp.asarray(values)

        return drawn

    monkeypatch.setattr(jax.random, 'randint', draw((flow['t'] * 128).astype(np.int32)))
    monkeypatch.setattr(jax.random, 'uniform', draw(bootstrap['t'] + 1e-4))
    dropped = flow['label'] != flow['label_dropped']
    assert dropped.any()
    monkeypatch.setattr(jax.random, 'bernoulli', draw(dropped))
    calls, errors = [], []

    def apply(params, *inputs):
        calls.append((params, *inputs))
        return _network(params, *inputs)

    def distance(error):
        errors.append(error)
        return jnp.mean(error**2, axis=(1, 2, 3)), {}

    loss, _ = shortcut.Objective(num_classes=NULL, bootstrap_every=EVERY, guidance=0.5)(
        apply,
        ONLINE,
        TARGET_EMA,
        batch,
        jax.random.key(0),
        distance=distance,
        progress=0,
    )

    assert [call[0] for call in calls] == [TARGET_EMA, TARGET_EMA, ONLINE]
    _, x, t, d, w, label = calls[-1]
    np.testing.assert_allclose(x, interleave(bootstrap['x'], flow['x']), atol=1e-6)
    np.testing.assert_array_equal(t, interleave(bootstrap['t'], flow['t']))
    size = 0.5 ** bootstrap['level'].astype(np.float32)
    np.testing.assert_array_equal(
        d, interleave(size, np.zeros(len(flow['t']), np.float32))
    )
    np.testing.assert_array_equal(w, 0)
    np.testing.assert_array_equal(
        label, interleave(bootstrap['label'], flow['label_dropped'])
    )
    targets = interleave(bootstrap['target_guided'], flow['target'])
    prediction = np.asarray(_network(*calls[-1]))
    error = prediction - targets
    np.testing.assert_allclose(
        interleave(*(np.asarray(error) for error in errors)), error, atol=1e-5
    )
    np.testing.assert_allclose(loss, np.mean(error**2), rtol=1e-5)
