"""The U-Net against NumPy, its conditions, and the same values on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_network import SHAPE, random_inputs, random_params

from ism_jax import config as config_lib
from ism_jax import config_check, cost
from ism_jax.models import conditions, unet
from ism_jax.runtime import sharding, traced_flops

SMALL = dict(
    num_classes=5,
    hidden_size=8,
    patch_size=2,
    channel_multipliers=(1, 2),
    blocks_per_level=1,
    attention_levels=1,
    num_heads=2,
)


def _model(**options):
    return unet.UNet(**SMALL | options)


def _apply(model):
    return jax.jit(lambda params, *inputs: model.apply({'params': params}, *inputs))


def _numpy_norm(x, params):
    groups = np.gcd(32, max(1, x.shape[-1] // 4))
    grouped = x.reshape(*x.shape[:2], groups, -1)
    mean = grouped.mean((0, 1, 3), keepdims=True)
    deviation = np.sqrt(grouped.var((0, 1, 3), keepdims=True) + 1e-6)
    out = ((grouped - mean) / deviation).reshape(x.shape)
    return out * params['scale'] + params['bias']


def _numpy_conv(x, params):
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    height, width, _ = x.shape
    products = [
        padded[i : i + height, j : j + width] @ params['kernel'][i, j]
        for i, j in np.ndindex(3, 3)
    ]
    return sum(products) + params['bias']


def _numpy_block(params, x, condition):
    """A block in float64, for one image."""
    silu = lambda a: a / (1 + np.exp(-a))
    h = _numpy_conv(silu(_numpy_norm(x, params['norm_1'])), params['conv_1'])
    modulation = condition @ params['modulation']['kernel']
    scale, shift = np.split(modulation + params['modulation']['bias'], 2)
    h = silu(_numpy_norm(h, params['norm_2']) * (1 + scale) + shift)
    h = _numpy_conv(h, params['conv_2'])
    shortcut = params['shortcut']
    return x @ shortcut['kernel'] + shortcut['bias'] + h


def test_block_is_that_of_adm():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 4, 8)).astype('f')
    condition = rng.normal(size=(2, 12)).astype('f')
    block = unet.Block(16, jnp.float32, sharding.BatchSharding())
    params = block.init(jax.random.key(0), x, condition)['params']
    params = jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape), params)
    ours = block.apply({'params': params}, x, condition)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    for image, vector, found in zip(x, condition, ours, strict=True):
        expected = _numpy_block(params, image.astype(np.float64), vector)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_folding_keeps_neighbours_together():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    folded = unet.fold(x, 2)
    np.testing.assert_array_equal(folded[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(unet.unfold(folded, 2), x)


def test_residuals_and_output_are_initialised_to_zero():
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 8)).astype('f')
    block, attention = (
        unet.Block(8, jnp.float32, sharding.BatchSharding()),
        unet.Attention(2, jnp.float32, 'xla', sharding.BatchSharding()),
    )
    out, _ = block.init_with_output(jax.random.key(0), x, np.ones((2, 12), 'f'))
    np.testing.assert_array_equal(out, x)
    out, _ = attention.init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(out, x)
    params = conditions.init_params(_model(), SHAPE, jax.random.key(0))
    assert not _apply(_model())(params, *random_inputs(d=0.5, w=1.0)).any()


@pytest.mark.parametrize('step_embedding', ['level', 'size'])
def test_every_condition_acts_and_vanishes_where_it_should(step_embedding):
    model = _model(step_embedding=step_embedding, interval_input=True)
    params, apply = random_params(model), _apply(model)

    def out(d=0.0, w=0.0, t=0.0, label=0, interval=(0.0, 1.0)):
        x, times, d, w, labels = random_inputs(d=d, w=w)
        interval = jnp.tile(jnp.array([interval]), (4, 1))
        return apply(params, x, times / 2 + t, d, w, labels + label, interval)

    base = out()
    assert base.shape == (4, *SHAPE)
    for change in (dict(d=0.5), dict(w=1.0), dict(t=0.3), dict(label=1)):
        assert jnp.abs(out(**change) - base).max() > 1e-3, change
    assert jnp.abs(out(w=1.0, interval=(0.3, 0.9)) - out(w=1.0)).max() > 1e-4
    np.testing.assert_array_equal(out(interval=(0.3, 0.9)), base)
    # Before training, d and w have no effect anywhere.
    for name in ('step_embedding', 'guidance_embedding'):
        fresh = conditions.init_params(model, SHAPE, jax.random.key(0))[name]
        params = params | {name: fresh}
    np.testing.assert_array_equal(
        apply(params, *random_inputs()), apply(params, *random_inputs(d=0.5))
    )


def test_every_parameter_has_a_gradient_and_derivatives_are_those_of_differences():
    model = _model(interval_input=True, step_embedding='size', time_scale=1.0)
    params, apply = random_params(model), _apply(model)
    x, t, d, w, label = random_inputs(d=0.5, w=1.0)
    gradient = jax.grad(lambda p: jnp.square(apply(p, x, t, d, w, label)).sum())(params)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert jnp.abs(leaf).max() > 0, path
    along = lambda t: apply(params, x, t, d, w, label)
    _, derivative = jax.jvp(along, (t,), (np.ones_like(t),))
    difference = (along(t + 0.01) - along(t - 0.01)) / 0.02
    error = jnp.abs(derivative - difference).max() / jnp.abs(derivative).max()
    assert error < 0.01


def test_options_that_keep_the_function():
    """Remat and bfloat16, whose parameters are float32."""
    params, inputs = random_params(_model()), random_inputs(d=0.5, w=1.0)
    base = _apply(_model())(params, *inputs)
    same = _apply(_model(remat='full'))(params, *inputs)
    np.testing.assert_allclose(same, base, rtol=1e-4, atol=1e-5)
    coarse = _apply(_model(dtype='bfloat16'))(params, *inputs)
    assert coarse.dtype == jnp.float32
    assert 1e-5 < jnp.abs(coarse - base).max() / jnp.abs(base).max() < 0.1


def test_dots_recomputes_no_convolution():
    def convolutions(**options):
        model = _model(**options)
        loss = lambda p: model.apply({'params': p}, *random_inputs(d=0.5)).sum()
        jaxpr = jax.make_jaxpr(jax.grad(loss))(random_params(model))
        return str(jaxpr).count('conv_general_dilated[')

    once = convolutions()
    assert convolutions(remat='dots') == once < convolutions(remat='full')


def test_a_mesh_changes_nothing(eight_devices):
    mesh = sharding.make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    options = dict(hidden_size=32, attention_levels=0)
    params, inputs = random_params(_model(**options)), random_inputs(d=0.5, w=1.0)

    def value_and_grad(model, params, inputs):
        loss = lambda p: jnp.square(model.apply({'params': p}, *inputs)).mean()
        return jax.value_and_grad(loss)(params)

    alone = jax.jit(functools.partial(value_and_grad, _model(**options)))
    value, gradient = alone(params, inputs)
    shardings = sharding.tree_shardings(params, mesh)
    split = jax.device_put(params, shardings)
    assert not split['middle']['conv_1']['kernel'].is_fully_replicated
    batch = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    together = jax.jit(
        functools.partial(
            value_and_grad,
            _model(**options, batch_sharding=sharding.BatchSharding(mesh)),
        )
    )
    value2, gradient2 = together(split, jax.device_put(inputs, batch))
    np.testing.assert_allclose(value, value2, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, atol=1e-3 * np.abs(a).max() + 1e-6
        ),
        gradient,
        gradient2,
    )


def _config(**changes):
    config = config_lib.default()
    config.data.image_size = 28
    config_lib.use_best(config, guidance_max=2.5)
    model = dict(backbone='unet', hidden_size=16, patch_size=2, num_heads=2)
    config.model.update(model, channel_multipliers=(1, 2))
    config.update_from_flattened_dict({f'model.{k}': v for k, v in changes.items()})
    return config


def test_plan_counts_what_is_made():
    config = _config()
    plan = cost.make_plan(config, 1, 10)
    model = _model(num_classes=10, hidden_size=16, interval_input=True)
    model = model.clone(step_embedding='size')
    params = conditions.init_params(model, (28, 28, 1), jax.random.key(0))
    assert plan.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    x, one, label = jnp.zeros((1, 28, 28, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    inputs = x, one, one, one, label
    forward = traced_flops.count_flops(model.apply, {'params': params}, *inputs)
    # Forward passes per sample: 3 for the gradient, and the teachers'.
    passes = config.train.batch_size * (3 + 3 / 4 + 2 / 4)
    assert plan.flops_per_step == pytest.approx(passes * forward, rel=0.02)


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(channel_multipliers=(1, 2, 2, 2)), 'no multiple of model.patch_size'),
        (dict(channel_multipliers=()), 'must be one to eight integers'),
        (dict(channel_multipliers=(1, 0)), 'must be one to eight integers'),
        (dict(blocks_per_level=0), 'model.blocks_per_level = 0 must be in 1'),
        (dict(attention_levels=3), 'model.attention_levels = 3 must be at most 2'),
        (dict(num_heads=3), 'does not divide the width of level 1 = 32'),
        (dict(velocity_head=1), 'model.velocity_head = 1'),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    config_check.validate(_config())
    with pytest.raises(ValueError, match=message):
        config_check.validate(_config(**changes))


def test_class_embeddings_start_as_in_adm():
    params = conditions.init_params(_model(), SHAPE, jax.random.key(0))
    assert 0.9 < params['class_embedding']['embedding'].std() < 1.1
