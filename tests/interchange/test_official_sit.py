"""The converted SiT against the official code."""

import jax
import numpy as np
from official_tensors import (
    CHANNELS,
    HEADS,
    PATCH,
    SIT,
    TIMES,
    assert_official,
    torch_shapes,
)
import pytest

from ism_jax.interchange import official_sit
from ism_jax.models import conditions, sit


@pytest.mark.parametrize('w', [0.0, 1.5])
def test_computes_the_same_as_the_official_code(w):
    converted = official_sit.from_tensors(SIT, HEADS)
    assert converted.model['time_scale'] == 1.0
    assert converted.fresh == ('step_embedding', 'guidance_embedding')
    # Step size and guidance scale have no effect until they are learned.
    assert_official(converted, 'sit', TIMES, w / 3, w)


def test_learned_variances_are_dropped():
    per_patch = (PATCH**2, 2 * CHANNELS)
    tensors = dict(SIT)
    for leaf in ('weight', 'bias'):
        name = f'final_layer.linear.{leaf}'
        array = SIT[name].reshape(*per_patch, *SIT[name].shape[1:])[:, :CHANNELS]
        tensors[name] = array.reshape(-1, *SIT[name].shape[1:])
    assert {n: t.shape for n, t in tensors.items()} == torch_shapes(outputs=CHANNELS)
    both, one = (official_sit.from_tensors(t, HEADS) for t in (SIT, tensors))
    jax.tree.map(np.testing.assert_array_equal, both.params, one.params)
    assert both[1:] == one[1:]


def test_the_official_xl2_has_the_shapes_of_our_preset():
    """Only shapes: none of the 675 million parameters is allocated."""
    shapes = torch_shapes(
        width=1152, depth=28, classes=1000, side=32, channels=4, outputs=8, mlp=4608
    )
    assert len(shapes) == 292
    assert sum(np.prod(shape) for shape in shapes.values()) == 675_129_632
    tensors = {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in shapes.items()}
    positions = {'pos_embed': sit.position_embedding(1152, 16)[None]}
    del tensors['pos_embed']
    rest = {}

    def convert(tensors):
        converted = official_sit.from_tensors(tensors | positions)
        rest.update(converted._asdict(), fresh=converted.fresh)
        return converted.params

    params = jax.eval_shape(convert, tensors)
    preset = sit.preset('XL/2')
    assert {name: rest['model'][name] for name in preset} == preset
    assert rest['image_shape'] == (32, 32, 4) and rest['num_classes'] == 1000
    expected = conditions.abstract_params(
        sit.SiT(num_classes=1000, **preset), (32, 32, 4)
    )
    for name in rest['fresh']:
        del expected[name]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), expected
    )


@pytest.mark.parametrize(
    'change,message',
    [
        ({'x_embedder.proj.weight': None}, 'no tensor x_embedder.proj.weight'),
        ({'blocks.1.attn.qkv.bias': None}, '1 missing: blocks.1.attn.qkv.bias'),
        ({'blocks.0.attn.q_norm.weight': (16,)}, '1 unknown: blocks.0.attn.q_norm'),
        (
            {'blocks.1.mlp.fc2.weight': (48, 100)},
            r'blocks.1.mlp.fc2.weight is \(48, 100\), expected \(48, 192\)',
        ),
        (
            {'final_layer.linear.bias': (36,)},
            r'final_layer.linear.bias is \(36,\), expected \(24,\)',
        ),
        ({'pos_embed': (1, 9, 48)}, 'pos_embed differs .* by'),
        ({'pos_embed': (1, 8, 48)}, r'pos_embed is \(1, 8, 48\), expected \(1, 9'),
        ({'x_embedder.proj.weight': (48, 12)}, 'not 4 axes'),
    ],
)
def test_the_message_names_a_tensor_of_another_network(change, message):
    tensors = dict(SIT)
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape:
            tensors[name] = np.ones(shape, np.float32)
    with pytest.raises(ValueError, match=message):
        official_sit.from_tensors(tensors, HEADS)


def test_the_number_of_heads_is_required_outside_the_presets():
    with pytest.raises(ValueError, match='width 48 and depth 2, .* give --num_heads'):
        official_sit.from_tensors(SIT)
