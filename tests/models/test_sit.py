"""The network against a NumPy SiT, its conditions, remat and bfloat16."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_network import SHAPE, SMALL, apply, random_inputs, random_params

from ism_jax.models import conditions, in_context, sit


def _numpy_sit(params, x, t, label, *, patch, heads):
    """SiT written from its paper in float64, one image at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def dense(layer, v):
        return v @ layer['kernel'] + layer['bias']

    def silu(v):
        return v / (1 + np.exp(-v))

    def norm(v):
        centred = v - v.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)

    def gelu(v):
        return 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))

    width = p['patch_embedding']['bias'].shape[0]
    side = x.shape[1] // patch
    outputs = []
    for image, time, c in zip(x, t, label, strict=True):
        tokens = []
        for i in range(side):
            for j in range(side):
                piece = image[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
                position = []
                for place in (j, i):
                    omega = 10000.0 ** (-np.arange(width // 4) / (width // 4))
                    position += [np.sin(place * omega), np.cos(place * omega)]
                tokens.append(
                    dense(p['patch_embedding'], piece.ravel())
                    + np.concatenate(position)
                )
        h = np.stack(tokens)
        omega = np.exp(-np.log(10000.0) * np.arange(128) / 128)
        angles = 1000 * time * omega
        features = np.concatenate([np.cos(angles), np.sin(angles)])
        time_mlp = p['time_embedding']
        condition = dense(time_mlp['out'], silu(dense(time_mlp['hidden'], features)))
        condition = silu(condition + p['class_embedding']['embedding'][c])
        for layer in range(p['blocks']['qkv']['bias'].shape[0]):
            b = jax.tree.map(lambda a, layer=layer: a[layer], p['blocks'])
            sa, ca, ga, sm, cm, gm = np.split(dense(b['modulation'], condition), 6)
            q, k, v = np.split(dense(b['qkv'], norm(h) * (1 + ca) + sa), 3, axis=1)
            heads_out = []
            for head in np.split(np.arange(width), heads):
                logits = q[:, head] @ k[:, head].T / np.sqrt(len(head))
                weights = np.exp(logits - logits.max(1, keepdims=True))
                heads_out.append(weights / weights.sum(1, keepdims=True) @ v[:, head])
            h = h + ga * dense(b['projection'], np.concatenate(heads_out, axis=1))
            mlp = gelu(dense(b['mlp_in'], norm(h) * (1 + cm) + sm))
            h = h + gm * dense(b['mlp_out'], mlp)
        shift, scale = np.split(dense(p['final_modulation'], condition), 2)
        h = dense(p['final'], norm(h) * (1 + scale) + shift)
        out = np.zeros_like(image, np.float64)
        for number, token in enumerate(h):
            i, j = divmod(number, side)
            out[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = (
                token.reshape(patch, patch, -1)
            )
        outputs.append(out)
    return np.stack(outputs)


def test_at_d_0_and_w_0_it_is_a_sit():
    model = sit.SiT(**SMALL)
    params = random_params(model)
    x, t, d, w, label = random_inputs()
    ours = apply(model, params, x, t, d, w, label)
    theirs = _numpy_sit(params, x, t, label, patch=2, heads=2)
    np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())


@pytest.mark.parametrize('step_embedding', conditions.STEP_EMBEDDINGS)
@pytest.mark.parametrize('d,w', [(0.5, 0.0), (0.0, 1.5)])
def test_d_and_w_have_no_effect_at_initialisation_and_can_learn_one(
    d, w, step_embedding
):
    model = sit.SiT(**SMALL, step_embedding=step_embedding)
    x, t, d, w, label = random_inputs(d=d, w=w)
    zeros = np.zeros_like(d)

    def effect(params):
        out = apply(model, params, x, t, d, w, label)
        plain = apply(model, params, x, t, zeros, zeros, label)
        return float(jnp.abs(out - plain).max())

    fresh = random_params(model)
    initial = conditions.init_params(model, SHAPE, jax.random.key(0))
    for name in ('step_embedding', 'guidance_embedding'):
        if 'embedding' in fresh[name]:  # A table of zeros.
            fresh[name] = jax.tree.map(jnp.zeros_like, fresh[name])
            assert not np.any(initial[name]['embedding'])
            continue
        fresh[name]['out'] = jax.tree.map(jnp.zeros_like, fresh[name]['out'])
        assert not np.any(initial[name]['out']['kernel'])
        assert np.any(initial[name]['hidden']['kernel'])
    assert effect(fresh) == 0 and effect(random_params(model)) > 1e-3


def test_size_embedding_is_smooth_in_d():
    """MeanFlow differentiates in d, also at 0, where the network is a SiT."""
    model = sit.SiT(**SMALL, step_embedding='size', time_scale=1.0)
    params = random_params(model)
    x, t, d, w, label = random_inputs()
    out = lambda d: apply(model, params, x, t, d, w, label)
    for at in (0.0, 0.3):
        start, direction = jnp.full_like(t, at), jnp.ones_like(t)
        value, slope = jax.jvp(out, (start,), (direction,))
        np.testing.assert_allclose(value, out(start), atol=1e-6)
        ratio = (out(start + 1e-2) - value) / 1e-2
        assert jnp.abs(slope).max() > 1e-2
        np.testing.assert_allclose(ratio, slope, atol=0.1 * jnp.abs(slope).max())
    at_zero = out(jnp.zeros_like(t))
    no_embedding = jax.tree.map(jnp.zeros_like, params['step_embedding'])
    params = params | {'step_embedding': no_embedding}
    without = apply(model, params, x, t, jnp.full_like(t, 0.5), w, label)
    np.testing.assert_array_equal(at_zero, without)


@pytest.mark.parametrize('embedding', conditions.GUIDANCE_EMBEDDINGS)
def test_the_interval_acts_with_guidance_only(embedding):
    model = sit.SiT(**SMALL, interval_input=True, guidance_embedding=embedding)
    params = random_params(model)

    def out(w, start, end):
        interval = np.tile(np.array([[start, end]], 'f'), (4, 1))
        return apply(model, params, *random_inputs(w=w), interval)

    assert jnp.abs(out(1.5, 0.0, 1.0) - out(1.5, 0.3, 1.0)).max() > 1e-3
    assert jnp.abs(out(1.5, 0.0, 1.0) - out(1.5, 0.0, 0.7)).max() > 1e-3
    np.testing.assert_array_equal(out(0.0, 0.0, 1.0), out(0.0, 0.3, 0.7))
    everywhere = apply(model, params, *random_inputs(w=1.5))
    np.testing.assert_array_equal(everywhere, out(1.5, 0.0, 1.0))
    # At w = 0 the network is the SiT of its other parameters.
    plain = apply(sit.SiT(**SMALL), params, *random_inputs())
    np.testing.assert_array_equal(out(0.0, 0.3, 0.7), plain)


def test_the_ratio_embedding_saturates_for_large_guidance():
    outs = {}
    for embedding in conditions.GUIDANCE_EMBEDDINGS:
        model = sit.SiT(**SMALL, guidance_embedding=embedding)
        params = random_params(model)
        outs[embedding] = [
            apply(model, params, *random_inputs(w=w)) for w in (0.0, 100.0, 200.0)
        ]
    np.testing.assert_array_equal(outs['scale'][0], outs['ratio'][0])
    change = {name: jnp.abs(b - a).max() for name, (_, a, b) in outs.items()}
    assert change['ratio'] < 0.1 * change['scale']


def test_the_velocity_head_shares_a_trunk():
    model = sit.SiT(**SMALL, velocity_head=2)
    params = random_params(model)
    stacks = {n: p['qkv']['bias'].shape[0] for n, p in params.items() if 'blocks' in n}
    assert stacks == {'blocks': 1, 'mean_blocks': 2, 'velocity_blocks': 2}
    inputs = random_inputs(d=0.5, w=1.0)
    mean = apply(model, params, *inputs)
    both = apply(model, params, *inputs, with_velocity=True)
    np.testing.assert_array_equal(both[0], mean)
    assert mean.shape == both[1].shape and jnp.abs(both[1] - mean).max() > 1e-3

    def norms(output):
        loss = lambda p: jnp.sum(
            apply(model, p, *inputs, with_velocity=True)[output] ** 2
        )
        gradient = jax.grad(loss)(params)
        return {n: float(jnp.abs(gradient[n]['qkv']['bias']).max()) for n in stacks}

    mean, velocity = norms(0), norms(1)
    assert mean['velocity_blocks'] == 0 == velocity['mean_blocks']
    assert min(mean['blocks'], velocity['blocks']) > 0
    # Without the head, the same network.
    whole = sit.SiT(**SMALL)
    joined = {
        k: v for k, v in params.items() if 'velocity' not in k and k != 'mean_blocks'
    }
    joined['blocks'] = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b]), params['blocks'], params['mean_blocks']
    )
    np.testing.assert_allclose(apply(whole, joined, *inputs), both[0], atol=1e-4)


def test_output_is_continuous_in_w_and_differs_between_step_sizes():
    model = sit.SiT(**SMALL)
    params = random_params(model)

    def out(d, w):
        return apply(model, params, *random_inputs(d=d, w=w))

    assert jnp.abs(out(0, 1e-4) - out(0, 0)).max() < 1e-2
    levels = [out(2.0**-k, 0) for k in range(7)]
    for a, b in itertools.pairwise(levels):
        assert jnp.abs(a - b).max() > 1e-3


def test_parameter_counts_of_the_presets():
    """SiT's table 1: 33M, 130M, 458M, 675M."""
    expected = {'S/2': 33e6, 'B/2': 130e6, 'L/2': 458e6, 'XL/2': 675e6}
    for name, count in expected.items():
        model = sit.SiT(num_classes=1000, **sit.preset(name))
        measured = conditions.num_parameters(model, (32, 32, 4))
        # SiT lacks the embeddings of d and w, and has 8 output channels instead of 4.
        assert abs(measured / count - 1) < (0.01 if name == 'XL/2' else 0.03), measured
    assert set(sit.PRESETS) == {
        f'{s}/{p}' for s in ('S', 'B', 'L', 'XL') for p in (2, 4, 8)
    }


@pytest.mark.parametrize(
    'change', [dict(remat='full'), dict(remat='dots'), dict(unroll=3)]
)
@pytest.mark.parametrize('network', [sit.SiT, in_context.InContext])
def test_remat_and_unrolling_keep_values_and_gradients(network, change):
    base, other = network(**SMALL), network(**SMALL, **change)
    assert base != other
    params = random_params(base)

    def loss(params, model):
        out = apply(model, params, *random_inputs(d=0.25, w=1.0))
        return jnp.sum(jnp.square(out))

    value, grad = jax.value_and_grad(loss)(params, base)
    value2, grad2 = jax.value_and_grad(loss)(params, other)
    np.testing.assert_allclose(value, value2, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, atol=1e-4 * np.abs(a).max() + 1e-6
        ),
        grad,
        grad2,
    )


def test_remat_recomputes():
    """The GELU's tanh runs once, forward, and again where its input is not kept."""

    def tanhs(**change):
        model = sit.SiT(**SMALL, **change)
        params = random_params(model)
        loss = lambda p: apply(model, p, *random_inputs()).sum()
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count('= tanh')

    assert (tanhs(), tanhs(remat='dots'), tanhs(remat='full')) == (1, 2, 2)


def test_bfloat16_rounds_the_computation_and_not_the_parameters():
    model = sit.SiT(**SMALL, dtype='bfloat16')
    params = conditions.init_params(model, SHAPE, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    params = random_params(model)
    coarse = apply(model, params, *random_inputs())
    fine = apply(sit.SiT(**SMALL), params, *random_inputs())
    assert coarse.dtype == jnp.float32
    error = jnp.abs(coarse - fine).max() / jnp.abs(fine).max()
    assert 1e-5 < error < 0.1


def test_bfloat16_rounds_little_of_what_adds_up_over_the_layers():
    """With a residual stream, condition and end layers in bfloat16: 0.7 to 1.0 %."""
    size = dict(SMALL, depth=12)
    params = random_params(sit.SiT(**size))
    inputs = random_inputs(batch=16, d=0.25, w=1.0)

    def gradient(dtype):
        model = sit.SiT(**size, dtype=dtype)
        loss = lambda p: jnp.mean(jnp.square(apply(model, p, *inputs) - 1))
        return jax.jit(jax.grad(loss))(params)

    def norm(tree):
        return np.sqrt(sum(float(jnp.sum(a**2)) for a in jax.tree.leaves(tree)))

    fine, coarse = gradient('float32'), gradient('bfloat16')
    difference = jax.tree.map(jnp.subtract, fine, coarse)
    errors = {name: norm(difference[name]) / norm(fine[name]) for name in fine}
    print({name: f'{100 * error:.2f} %' for name, error in errors.items()})
    for name in ('patch_embedding', 'class_embedding', 'blocks'):
        assert 1e-4 < errors[name] < 0.006, name
