"""Weights of DINOv2 in the layout of transformers: `config.json`, `model.safetensors`.

Oquab et al. 2023 (arXiv 2304.07193). The positions were learned on a grid of 37 x 37
patches and are interpolated to the 16 x 16 patches of a 224 x 224 image, as in the
authors' code.
"""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from ism_jax.interchange import named_tensors, tensor_shapes
from ism_jax.models import dinov2, resize

# The authors' code interpolates positions by the factor (16 + 0.1) / 37 instead of
# 16 / 37. This shifts positions by up to a tenth of a patch, and FD-DINOv2 is defined
# with it; transformers uses 0.
POSITION_OFFSET = 0.1
_TORCH_SHARPNESS = -0.75  # Parameter a of PyTorch's bicubic interpolation.
# Values of `config.json` that `models.dinov2` implements.
_FIXED = {
    'model_type': 'dinov2',
    'hidden_act': 'gelu',
    'num_channels': 3,
    'qkv_bias': True,
}


def read_config(path) -> dinov2.Config:
    """The sizes in the `config.json` of a DINOv2 network.

    Raises:
      ValueError: the file is missing or damaged, or describes another network.
    """
    try:
        content = json.loads(Path(path).read_text())
        sizes = [field.name for field in dataclasses.fields(dinov2.Config)]
        config = dinov2.Config(**{n: content[n] for n in sizes if n in content})
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f'{path} is not the config.json of a DINOv2 network ({error}); give a '
            'folder such as that of facebook/dinov2-large'
        ) from error
    problems = [
        f'{name} = {content[name]!r} must be {value!r}'
        for name, value in _FIXED.items()
        if content.get(name, value) != value
    ]
    if config.hidden_size % config.num_attention_heads:
        problems.append(
            f'num_attention_heads = {config.num_attention_heads} must divide '
            f'hidden_size = {config.hidden_size}'
        )
    if dinov2.SIDE % config.patch_size or config.image_size % config.patch_size:
        problems.append(
            f'patch_size = {config.patch_size} must divide image_size = '
            f'{config.image_size} and {dinov2.SIDE}, the side of resized images'
        )
    if problems:
        raise ValueError(
            f'{path}: {"; ".join(problems)}. Give a network such as '
            'facebook/dinov2-large'
        )
    return config


def params_from_tensors(
    tensors: Mapping[str, np.ndarray], config: dinov2.Config
) -> dict:
    """Parameters of `dinov2.Dinov2` from the tensors of a `Dinov2Model`.

    Args:
      tensors: name to array, as from `tensor_file.read`.
      config: sizes of the network.

    Raises:
      ValueError: a tensor is missing, unknown or of the wrong shape.
    """
    network = f'DINOv2 of {config}'
    expected = named_tensors.abstract_params(dinov2.Dinov2(config))
    tensors = named_tensors.NamedTensors(tensors, network)
    # Replaces masked patches in the training of DINOv2.
    if 'embeddings.mask_token' in tensors:
        tensors.take('embeddings.mask_token', 2)
    patches = 'embeddings.patch_embeddings.projection'
    kernel = tensors.take(f'{patches}.weight', 4).transpose(2, 3, 1, 0)
    kernel = kernel.reshape(-1, kernel.shape[-1])
    name = 'embeddings.position_embeddings'
    positions = tensors.take(name, 3)
    learned = 1 + (config.image_size // config.patch_size) ** 2
    tensor_shapes.check(
        {name: positions.shape},
        {name: (1, learned, config.hidden_size)},
        network=network,
    )
    params = {
        'patches': {'kernel': kernel, 'bias': tensors.take(f'{patches}.bias')},
        'class_token': tensors.take('embeddings.cls_token', 3)[0],
        'positions': interpolate_positions(
            positions[0], dinov2.SIDE // config.patch_size, POSITION_OFFSET
        ),
        'norm': tensors.layer_norm('layernorm'),
    }
    mlp = ('weights_in', 'weights_out') if config.use_swiglu_ffn else ('fc1', 'fc2')
    blocks = []
    for number in range(config.num_hidden_layers):
        layer = f'encoder.layer.{number}'
        attention = f'{layer}.attention.attention'
        block = {n: tensors.dense(f'{attention}.{n}') for n in dinov2.ATTENTION}
        block |= {n: tensors.layer_norm(f'{layer}.{n}') for n in ('norm1', 'norm2')}
        block |= {
            'projection': tensors.dense(f'{layer}.attention.output.dense'),
            'mlp_in': tensors.dense(f'{layer}.mlp.{mlp[0]}'),
            'mlp_out': tensors.dense(f'{layer}.mlp.{mlp[1]}'),
            'scale1': tensors.take(f'{layer}.layer_scale1.lambda1'),
            'scale2': tensors.take(f'{layer}.layer_scale2.lambda1'),
        }
        blocks.append(block)
    params['blocks'] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    tensors.check(params, expected)
    return params


def interpolate_positions(
    positions: np.ndarray, grid: int, offset: float
) -> np.ndarray:
    """Positions for another number of patches, by PyTorch's bicubic interpolation.

    Args:
      positions: [1 + G^2, F]; the first is that of the class token.
      grid: g, number of patches along a side.
      offset: see `POSITION_OFFSET`; samples are G / (g + offset) apart.

    Returns:
      [1 + g^2, F] float32; unchanged if g = G.
    """
    count, width = positions.shape
    learned = round((count - 1) ** 0.5)
    if learned == grid:
        return positions
    samples = (np.arange(grid) + 0.5) * (learned / (grid + offset)) - 0.5
    low = np.floor(samples).astype(int)
    weights = np.zeros((grid, learned))
    for tap in range(-1, 3):
        # Beyond the border the outermost position is repeated.
        index = np.clip(low + tap, 0, learned - 1)
        value = resize.keys_cubic(samples - (low + tap), _TORCH_SHARPNESS)
        np.add.at(weights, (np.arange(grid), index), value)
    square = positions[1:].astype(np.float64).reshape(learned, learned, width)
    square = np.einsum('ai,bj,ijf->abf', weights, weights, square, optimize=True)
    square = square.reshape(grid**2, width).astype(np.float32)
    return np.concatenate([positions[:1], square])
