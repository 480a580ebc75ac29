"""Converts checkpoints of shortcut-models (github.com/kvfrans/shortcut-models).

If `train_type` is shortcut, the converted network computes the same function at d = 1,
1/2, ..., 1/32768; its d = 0 is the official d = 1 / `base_steps`. For any other
`train_type` the function would differ, and the tensors do not reveal the type.

- The sinusoidal embedding of log2(1/d) becomes rows of our table of step sizes, and the
  row of the finest step moves into the class table.
- Queries absorb the official scale of the attention scores.
- The log-variances, which the official network never uses, are dropped.
- The official code computes in bfloat16, so outputs differ by its rounding.

These files have no embedding of the guidance scale w, so ours is initialised; at w = 0
it has no effect. The last row of the class table becomes the null embedding.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.interchange import converted_network, tensor_shapes
from ism_jax.models import conditions

NETWORK = 'shortcut-models'


def from_tensors(
    tensors: Mapping[str, Any],
    *,
    image_size: int,
    base_steps: int = 128,
    num_heads: int = 0,
) -> converted_network.ConvertedNetwork:
    """The network of shortcut-models, converted to ours.

    Args:
      tensors: its parameters, named by their path in the tree, joined with '/'.
      image_size: side of the images or latents, which the tensors do not determine.
      base_steps: the official flag `denoise_timesteps`.
      num_heads: see `official_sit.from_tensors`.

    Raises:
      ValueError: a tensor is missing, unknown or of the wrong shape.
    """
    converted = _read_shapes(tensors, image_size, num_heads)

    def linear(name):
        return {
            leaf: jnp.asarray(tensors[f'{name}/{leaf}']) for leaf in ('kernel', 'bias')
        }

    def qkv(block):
        key, query, value = (linear(f'{block}/Dense_{i}') for i in (1, 2, 3))
        # The official code divides queries by the head dimension; we divide the
        # scores by its square root.
        width = converted.model['hidden_size']
        scale = (width // converted.model['num_heads']) ** -0.5
        query = jax.tree.map(lambda a: a * scale, query)
        return jax.tree.map(
            lambda *parts: jnp.concatenate(parts, axis=-1), query, key, value
        )

    def layers(make):
        blocks = [make(f'DiTBlock_{i}') for i in range(converted.model['depth'])]
        return converted_network.stack_layers(blocks)

    embedding = [linear(f'TimestepEmbedder_1/Dense_{i}') for i in (0, 1)]
    steps = _embed(*embedding, np.arange(conditions.MAX_LEVELS))
    finest = _embed(*embedding, np.log2([base_steps]))
    classes = jnp.asarray(tensors['LabelEmbedder_0/Embed_0/embedding'])
    patches = linear('PatchEmbed_0/Conv_0')
    params = {
        'patch_embedding': {
            'kernel': patches['kernel'].reshape(-1, patches['kernel'].shape[-1]),
            'bias': patches['bias'],
        },
        'time_embedding': {
            'hidden': linear('TimestepEmbedder_0/Dense_0'),
            'out': linear('TimestepEmbedder_0/Dense_1'),
        },
        'class_embedding': {'embedding': classes + finest},
        'step_embedding': {'embedding': steps - finest},
        'blocks': {
            'modulation': layers(lambda block: linear(f'{block}/Dense_0')),
            'qkv': layers(qkv),
            'projection': layers(lambda block: linear(f'{block}/Dense_4')),
            'mlp_in': layers(lambda block: linear(f'{block}/MlpBlock_0/Dense_0')),
            'mlp_out': layers(lambda block: linear(f'{block}/MlpBlock_0/Dense_1')),
        },
        'final_modulation': linear('FinalLayer_0/Dense_0'),
        'final': linear('FinalLayer_0/Dense_1'),
    }
    return converted._replace(params=params)


def _read_shapes(
    tensors, image_size: int, num_heads: int
) -> converted_network.ConvertedNetwork:
    """A shortcut model without parameters; checks all tensors."""

    def shape(name, rank):
        return tensor_shapes.require(tensors, name, rank, NETWORK).shape

    patch, _, channels, width = shape('PatchEmbed_0/Conv_0/kernel', 4)
    rows, _ = shape('LabelEmbedder_0/Embed_0/embedding', 2)
    _, mlp = shape('DiTBlock_0/MlpBlock_0/Dense_0/kernel', 2)
    depth = tensor_shapes.count(tensors, 'DiTBlock_', '/MlpBlock_0/Dense_0/kernel')

    def linear(name, ins, outs):
        return {f'{name}/kernel': (ins, outs), f'{name}/bias': (outs,)}

    expected = {
        'PatchEmbed_0/Conv_0/kernel': (patch, patch, channels, width),
        'PatchEmbed_0/Conv_0/bias': (width,),
        'LabelEmbedder_0/Embed_0/embedding': (rows, width),
        'Embed_0/embedding': (256, 1),  # Log-variances.
        **linear('FinalLayer_0/Dense_0', width, 2 * width),
        **linear('FinalLayer_0/Dense_1', width, patch**2 * channels),
    }
    for embedder in ('TimestepEmbedder_0', 'TimestepEmbedder_1'):  # Time, step size.
        expected |= {
            **linear(f'{embedder}/Dense_0', conditions.FREQUENCY_FEATURES, width),
            **linear(f'{embedder}/Dense_1', width, width),
        }
    for i in range(depth):
        block = f'DiTBlock_{i}'
        expected |= linear(f'{block}/Dense_0', width, 6 * width)
        for part in (1, 2, 3, 4):  # Keys, queries, values, projection.
            expected |= linear(f'{block}/Dense_{part}', width, width)
        expected |= linear(f'{block}/MlpBlock_0/Dense_0', width, mlp)
        expected |= linear(f'{block}/MlpBlock_0/Dense_1', mlp, width)
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    tensor_shapes.check(given, expected, network=NETWORK)
    return converted_network.ConvertedNetwork(
        params={},
        model=dict(
            patch_size=patch,
            hidden_size=width,
            depth=depth,
            num_heads=num_heads or converted_network.preset_heads(width, depth),
            mlp_ratio=mlp / width,
            step_embedding='level',
            time_scale=1.0,
        ),
        num_classes=rows - 1,
        image_shape=(image_size, image_size, channels),
    )


def _embed(hidden, out, x) -> jax.Array:
    """Two-layer embedding of scalars, [N] -> [N, width]."""

    def dense(x, layer):
        product = jnp.dot(x, layer['kernel'], precision='highest')
        return product + layer['bias'][None]

    features = conditions.frequency_features(jnp.asarray(x, jnp.float32))
    return dense(jax.nn.silu(dense(features, hidden)), out)
