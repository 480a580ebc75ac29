"""The in-context transformer against NumPy, and its conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_network import SHAPE, SMALL, apply, random_inputs, random_params

from ism_jax.models import conditions, in_context
from ism_jax.runtime import sharding

TOKENS = 8 + 4 + 4 + 16


def _model(**options):
    return in_context.InContext(**SMALL | options)


def _numpy_blocks(blocks, h, heads):
    """The blocks in float64, one image at a time; rotations as complex numbers."""
    blocks = jax.tree.map(lambda a: np.asarray(a, np.float64), blocks)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale['scale']

    tokens, width = h.shape
    size = width // heads
    frequencies = 10_000.0 ** (-np.arange(0, size, 2) / size)
    turn = np.exp(1j * np.arange(tokens)[:, None] * frequencies)

    def rotate(x):
        turned = (x[:, 0::2] + 1j * x[:, 1::2]) * turn
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    for layer in range(len(blocks['mlp_gate'])):
        b = jax.tree.map(lambda a, layer=layer: a[layer], blocks)
        x = norm(h, b['attention_norm']) @ b['qkv']['kernel']
        outs = []
        for q, k, v in zip(
            *(np.split(a, heads, 1) for a in np.split(x, 3, 1)), strict=True
        ):
            q, k = rotate(norm(q, b['query_norm'])), rotate(norm(k, b['key_norm']))
            logits = q @ k.T / np.sqrt(size)
            weights = np.exp(logits - logits.max(1, keepdims=True))
            outs.append(weights / weights.sum(1, keepdims=True) @ v)
        h = h + b['attention_gate'] * (
            np.concatenate(outs, 1) @ b['projection']['kernel']
        )
        gate, value = np.split(norm(h, b['mlp_norm']) @ b['mlp_in']['kernel'], 2, 1)
        hidden = gate / (1 + np.exp(-gate)) * value
        h = h + b['mlp_gate'] * (hidden @ b['mlp_out']['kernel'])
    return h


def test_blocks_are_those_of_the_paper():
    params = random_params(_model())['blocks']
    h = np.random.default_rng(2).normal(size=(2, TOKENS, 32)).astype(np.float32)
    angles = jnp.asarray(in_context.rotations(TOKENS, 16))
    ours = h
    for layer in range(3):
        block = in_context.Block(2, 4.0, jnp.float32, 'xla', sharding.BatchSharding())
        own = jax.tree.map(lambda a, layer=layer: a[layer], params)
        ours, _ = block.apply({'params': own}, ours, angles)
    for image, found in zip(h, ours, strict=True):
        expected = _numpy_blocks(params, image.astype(np.float64), heads=2)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(np.asarray(ours) - h).max() > 0.1


@pytest.mark.parametrize('step_embedding', conditions.STEP_EMBEDDINGS)
def test_every_condition_acts_and_vanishes_where_it_should(step_embedding):
    model = _model(step_embedding=step_embedding, interval_input=True)
    params = random_params(model)

    def out(d=0.0, w=0.0, t=0.0, label=0, interval=(0.0, 1.0)):
        x, times, d, w, labels = random_inputs(d=d, w=w)
        interval = jnp.tile(jnp.array([interval]), (4, 1))
        inputs = x, times / 2 + t, d, w, labels + label, interval
        return apply(model, params, *inputs)

    base = out()
    for change in (dict(d=0.5), dict(w=1.0), dict(t=0.3), dict(label=1)):
        assert jnp.abs(out(**change) - base).max() > 1e-3, change
    assert jnp.abs(out(w=1.0, interval=(0.3, 0.9)) - out(w=1.0)).max() > 1e-4
    np.testing.assert_array_equal(out(interval=(0.3, 0.9)), base)
    for name in ('step_embedding', 'guidance_embedding'):
        without = params | {name: jax.tree.map(jnp.zeros_like, params[name])}
        inputs = random_inputs()
        np.testing.assert_array_equal(
            apply(model, without, *inputs), apply(model, params, *inputs)
        )


def test_positions_are_seen():
    """The patches of an image in another order give another image."""
    model = _model()
    params = random_params(model)
    x, *rest = random_inputs()
    moved = np.roll(x, 2, axis=1)
    out, other = (apply(model, params, a, *rest) for a in (x, moved))
    assert jnp.abs(jnp.roll(out, 2, axis=1) - other).max() > 1e-2


def test_bfloat16_and_the_velocity_head():
    model = _model(dtype='bfloat16', velocity_head=1)
    params = conditions.init_params(model, SHAPE, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    params = random_params(model)
    coarse = apply(model, params, *random_inputs(d=0.5), with_velocity=True)
    fine = _model(velocity_head=1)
    fine = apply(fine, params, *random_inputs(d=0.5), with_velocity=True)
    for a, b in zip(coarse, fine, strict=True):
        assert a.dtype == jnp.float32 and a.shape == (4, *SHAPE)
        assert 1e-5 < jnp.abs(a - b).max() / jnp.abs(b).max() < 0.1
    assert jnp.abs(fine[0] - fine[1]).max() > 1e-2


def test_parameters_of_a_block():
    """4 C^2 + 3 r C^2 with r = 8 / 3, as in iMF-B/2: 89M in 12 layers of width 768."""
    options = dict(hidden_size=768, depth=12, num_heads=12, mlp_ratio=8 / 3)
    model = _model(**options, num_classes=1000)
    params = conditions.abstract_params(model, (32, 32, 4))
    count = sum(np.prod(a.shape) for a in jax.tree.leaves(params['blocks']))
    assert count / (12 * 12 * 768**2) == pytest.approx(1.0003, abs=3e-4)
    assert conditions.num_parameters(model, (32, 32, 4)) == pytest.approx(
        89e6, rel=0.03
    )
