"""Converts to and from the official SiT code (github.com/willisma/SiT).

The converted network computes the same function. Times run from noise at 0 to data at 1
and enter the sinusoids unscaled (`time_scale` 1), and the output is the velocity
x1 - x0. This holds for the official defaults, the linear path and velocity prediction;
the tensors do not reveal other choices. A network with `learn_sigma` has twice the
output channels: the first half is the velocity, and the second half is dropped, as in
the official sampler.

These files have no embeddings of the step size d and the guidance scale w, so ours are
initialised; at d = 0, w = 0 they have no effect. The last row of the class table
becomes the null embedding: every checkpoint trained with label dropout has one.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.interchange import converted_network, tensor_shapes
from ism_jax.models import conditions, sit

NETWORK = 'an official SiT or DiT'
# The sin-cos positions were computed by another library, at worst in float32.
POSITION_TOLERANCE = 1e-5
_BLOCK_LAYERS = {
    'modulation': 'adaLN_modulation.1',
    'qkv': 'attn.qkv',
    'projection': 'attn.proj',
    'mlp_in': 'mlp.fc1',
    'mlp_out': 'mlp.fc2',
}


def from_tensors(
    tensors: Mapping[str, Any], num_heads: int = 0
) -> converted_network.ConvertedNetwork:
    """The official SiT, converted to our network.

    Args:
      tensors: its state dict.
      num_heads: number of attention heads, which the shapes do not determine; 0 for
        that of the preset with the same width and depth.

    Raises:
      ValueError: a tensor is missing, unknown or of the wrong shape.
    """
    converted, outputs = _read_shapes(tensors, num_heads)
    channels = converted.image_shape[-1]

    def linear(name):
        return {
            'kernel': jnp.asarray(tensors[f'{name}.weight']).T,
            'bias': jnp.asarray(tensors[f'{name}.bias']),
        }

    def velocity_channels(array):
        *rest, _ = array.shape
        per_pixel = array.reshape(*rest, -1, outputs)[..., :channels]
        return per_pixel.reshape(*rest, -1)

    patches = jnp.asarray(tensors['x_embedder.proj.weight']).transpose(2, 3, 1, 0)
    params = {
        'patch_embedding': {
            'kernel': patches.reshape(-1, patches.shape[-1]),
            'bias': jnp.asarray(tensors['x_embedder.proj.bias']),
        },
        'time_embedding': {
            'hidden': linear('t_embedder.mlp.0'),
            'out': linear('t_embedder.mlp.2'),
        },
        'class_embedding': {
            'embedding': jnp.asarray(tensors['y_embedder.embedding_table.weight'])
        },
        'blocks': {
            ours: converted_network.stack_layers(
                [
                    linear(f'blocks.{i}.{theirs}')
                    for i in range(converted.model['depth'])
                ]
            )
            for ours, theirs in _BLOCK_LAYERS.items()
        },
        'final_modulation': linear('final_layer.adaLN_modulation.1'),
        'final': jax.tree.map(velocity_channels, linear('final_layer.linear')),
    }
    return converted._replace(params=params)


def to_tensors(
    params: Mapping[str, Any], patch_size: int, image_shape: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """The state dict of an official SiT without `learn_sigma`; inverts `from_tensors`.

    The embeddings of d, w and the interval are left out: at d = 0, w = 0 they have no
    effect, and `torch_network.fold` moves them into the class embeddings.

    Args:
      params: parameters of a `sit.SiT`. Its time enters the official network times
        `time_scale`.
      patch_size: side of a patch.
      image_shape: (H, W, C).
    """
    params = jax.tree.map(np.asarray, params)
    channels = image_shape[-1]

    def linear(name, layer):
        return {f'{name}.weight': layer['kernel'].T, f'{name}.bias': layer['bias']}

    patches = params['patch_embedding']['kernel']
    width = patches.shape[-1]
    patches = patches.reshape(patch_size, patch_size, channels, width)
    tensors = {
        'pos_embed': sit.position_embedding(width, image_shape[0] // patch_size)[None],
        'x_embedder.proj.weight': patches.transpose(3, 2, 0, 1),
        'x_embedder.proj.bias': params['patch_embedding']['bias'],
        **linear('t_embedder.mlp.0', params['time_embedding']['hidden']),
        **linear('t_embedder.mlp.2', params['time_embedding']['out']),
        'y_embedder.embedding_table.weight': params['class_embedding']['embedding'],
        **linear('final_layer.linear', params['final']),
        **linear('final_layer.adaLN_modulation.1', params['final_modulation']),
    }
    # With a velocity head the last blocks of the mean velocity are another stack.
    stacks = [params[name] for name in ('blocks', 'mean_blocks') if name in params]
    blocks = jax.tree.map(lambda *leaves: np.concatenate(leaves), *stacks)
    for ours, theirs in _BLOCK_LAYERS.items():
        for i, kernel in enumerate(blocks[ours]['kernel']):
            layer = {'kernel': kernel, 'bias': blocks[ours]['bias'][i]}
            tensors |= linear(f'blocks.{i}.{theirs}', layer)
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _read_shapes(
    tensors, num_heads: int
) -> tuple[converted_network.ConvertedNetwork, int]:
    """A SiT or DiT without parameters, and its output channels; checks all tensors."""

    def shape(name, rank):
        return tensor_shapes.require(tensors, name, rank, NETWORK).shape

    width, channels, patch, _ = shape('x_embedder.proj.weight', 4)
    rows, _ = shape('y_embedder.embedding_table.weight', 2)
    _, tokens, _ = shape('pos_embed', 3)
    mlp, _ = shape('blocks.0.mlp.fc1.weight', 2)
    (final,) = shape('final_layer.linear.bias', 1)
    depth = tensor_shapes.count(tensors, 'blocks.', '.mlp.fc1.weight')
    side = round(tokens**0.5)
    # With `learn_sigma` each channel also has a variance.
    outputs = channels if final == patch**2 * channels else 2 * channels

    def linear(name, outs, ins):
        return {f'{name}.weight': (outs, ins), f'{name}.bias': (outs,)}

    expected = {
        'pos_embed': (1, side**2, width),
        'x_embedder.proj.weight': (width, channels, patch, patch),
        'x_embedder.proj.bias': (width,),
        **linear('t_embedder.mlp.0', width, conditions.FREQUENCY_FEATURES),
        **linear('t_embedder.mlp.2', width, width),
        'y_embedder.embedding_table.weight': (rows, width),
        **linear('final_layer.linear', patch**2 * outputs, width),
        **linear('final_layer.adaLN_modulation.1', 2 * width, width),
    }
    for i in range(depth):
        expected |= {
            **linear(f'blocks.{i}.attn.qkv', 3 * width, width),
            **linear(f'blocks.{i}.attn.proj', width, width),
            **linear(f'blocks.{i}.mlp.fc1', mlp, width),
            **linear(f'blocks.{i}.mlp.fc2', width, mlp),
            **linear(f'blocks.{i}.adaLN_modulation.1', 6 * width, width),
        }
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    tensor_shapes.check(given, expected, network=NETWORK)
    _check_positions(tensors['pos_embed'], width, side)
    converted = converted_network.ConvertedNetwork(
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
        image_shape=(side * patch, side * patch, channels),
    )
    return converted, outputs


def _check_positions(positions, width: int, side: int) -> None:
    expected = sit.position_embedding(width, side)
    error = float(np.abs(np.asarray(positions)[0] - expected).max())
    if not error < POSITION_TOLERANCE:
        raise ValueError(
            f'pos_embed differs from the fixed sin-cos positions by {error:.2g}; our '
            'positions are fixed, so a network with others cannot be converted'
        )
