"""Files of Stable Diffusion's autoencoder, in the layout of diffusers.

A folder holds `config.json` and `diffusion_pytorch_model.safetensors`. Parameters have
the names of the published files: `encoder.down_blocks.0.resnets.1.conv1.weight` is
`encoder / down_blocks_0 / resnets_1 / conv1 / kernel` in the tree of `models.vae`.
"""

import dataclasses
import functools
import json
from pathlib import Path
import re
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from ism_jax.interchange import hub, tensor_file, tensor_shapes
from ism_jax.models import vae
from ism_jax.runtime import checksums, paths, sharding

CONFIG = 'config.json'
WEIGHTS = 'diffusion_pytorch_model.safetensors'
# Values of `config.json` that `models.vae` implements.
SUPPORTED = {
    '_class_name': ('AutoencoderKL',),
    'act_fn': ('silu',),
    'mid_block_add_attention': (True,),
    'use_quant_conv': (True,),
    'use_post_quant_conv': (True,),
    'shift_factor': (None,),
    'latents_mean': (None,),
    'latents_std': (None,),
}
SUPPORTED_BLOCKS = {
    'down_block_types': 'DownEncoderBlock2D',
    'up_block_types': 'UpDecoderBlock2D',
}
# Names of the attention layers in files of diffusers before 0.12.
OLD_NAMES = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}


def load(path: str, dtype: str = 'float32') -> tuple[vae.Autoencoder, Any]:
    """An autoencoder and its float32 parameters.

    Args:
      path: a folder in the layout of diffusers, a safetensors file (of Stable
        Diffusion's autoencoder, unless a `config.json` lies beside it), or a hub id
        such as 'stabilityai/sd-vae-ft-mse'.
      dtype: dtype of the computation.

    Raises:
      ValueError: the path does not exist, a file is damaged, or the tensors are not
        those of the network.
    """
    config_path, weights_path = locate(path)
    config = read_config(config_path) if config_path else vae.Config()
    autoencoder = vae.Autoencoder(config, dtype)
    tensors, _ = tensor_file.read(weights_path)
    return autoencoder, params_from_tensors(tensors, autoencoder, str(weights_path))


def make_decoder(path: str, mesh, mean=(), std=()):
    """A compiled function from normalised latents to images in about [-1, 1].

    Args:
      path: see `load`.
      mesh: devices that hold the parameters; latents may be split over it.
      mean: [c], subtracted from the latents when they were normalised; () for 0.
      std: [c], divided by when they were normalised; () for 1 / `scaling_factor`.
    """
    autoencoder, params = load(path)
    params = jax.device_put(params, sharding.replicated(mesh))
    mean = jnp.float32(mean or [0.0]).reshape(1, 1, 1, -1)
    std = jnp.float32(std or [1 / autoencoder.config.scaling_factor])
    std = std.reshape(1, 1, 1, -1)

    @jax.jit
    def decode(params, latents):
        return autoencoder.decode(params, latents * std + mean)

    return functools.partial(decode, params)


def locate(path: str) -> tuple[Path | None, Path]:
    """Paths of the config (None if there is none) and of the weights.

    Raises:
      ValueError: there are no weights.
    """
    given = paths.local_path(path, 'the autoencoder')
    if given.is_file():
        config = given.with_name(CONFIG)
        return config if config.is_file() else None, given
    folder = hub.folder(path, (CONFIG, WEIGHTS), 'stabilityai/sd-vae-ft-mse')
    if not (folder / WEIGHTS).is_file():
        found = sorted(p.name for p in folder.iterdir())
        raise ValueError(
            f'{folder} has no {WEIGHTS}; it holds {", ".join(found) or "nothing"}. '
            'Save the autoencoder with safe_serialization=True'
        )
    return folder / CONFIG, folder / WEIGHTS


def digest(path: str) -> str:
    """SHA-256 of the weights file, hexadecimal."""
    return checksums.sha256(locate(path)[1])


def read_config(path) -> vae.Config:
    """The sizes in the `config.json` of an autoencoder.

    Raises:
      ValueError: the file is missing or damaged, or describes another network.
    """
    try:
        content = json.loads(Path(path).read_text())
        sizes = {field.name for field in dataclasses.fields(vae.Config)}
        given = {name: value for name, value in content.items() if name in sizes}
        if 'block_out_channels' in given:
            given['block_out_channels'] = tuple(given['block_out_channels'])
        config = vae.Config(**given)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path} cannot be read ({error}); give the folder of an autoencoder, with '
            'its config.json'
        ) from error
    required = {
        name: ' or '.join(map(repr, values))
        for name, values in SUPPORTED.items()
        if content.get(name, values[0]) not in values
    }
    for name, block in SUPPORTED_BLOCKS.items():
        if set(content.get(name, ())) - {block}:
            required[name] = f'only {block}'
    if any(channels % config.norm_num_groups for channels in config.block_out_channels):
        multiples = f'multiples of norm_num_groups = {config.norm_num_groups}'
        required['block_out_channels'] = multiples
    if required:
        raise ValueError(
            f'{path} describes a network that is not implemented: '
            + '; '.join(
                f'{name} = {content.get(name)!r} must be {values}'
                for name, values in required.items()
            )
        )
    return config


def params_from_tensors(
    tensors, autoencoder: vae.Autoencoder, source: str = 'the file'
):
    """Parameters from tensors with their published names.

    Args:
      tensors: {name: array}, as PyTorch stores them.
      autoencoder: the network of the tensors.
      source: description of the file, for messages.

    Raises:
      ValueError: a tensor is missing, unknown or of the wrong shape.
    """
    tensors = {_current_name(name): array for name, array in tensors.items()}
    leaves = traverse_util.flatten_dict(autoencoder.abstract_params())
    expected = {
        published_name(path): _published_shape(path, leaf.shape)
        for path, leaf in leaves.items()
    }
    for name, array in tensors.items():
        # Old files store dense layers as 1 x 1 convolutions.
        if array.shape == (*expected.get(name, ()), 1, 1):
            tensors[name] = array.reshape(array.shape[:2])
    given = {name: array.shape for name, array in tensors.items()}
    tensor_shapes.check(
        given, expected, source=source, network='the autoencoder of its config'
    )
    params = {}
    for path in leaves:
        array = tensors[published_name(path)]
        if path[-1] == 'kernel':
            array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        params[path] = jnp.asarray(array, jnp.float32)
    return traverse_util.unflatten_dict(params)


def published_name(path: tuple[str, ...]) -> str:
    """Published name of a parameter: ('resnets_0', 'kernel') is 'resnets.0.weight'."""
    *modules, leaf = path
    leaf = {'kernel': 'weight', 'scale': 'weight'}.get(leaf, leaf)
    modules = [re.sub(r'^(.*[a-z])_(\d+)$', r'\1.\2', module) for module in modules]
    return '.'.join([*modules, leaf])


def _published_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Published shape of a parameter: [outputs, inputs, ...] for kernels."""
    if path[-1] != 'kernel':
        return shape
    *window, ins, outs = shape
    return (outs, ins, *window)


def _current_name(name: str) -> str:
    module, _, leaf = name.rpartition('.')
    parent, _, last = module.rpartition('.')
    if parent.endswith('attentions.0') and last in OLD_NAMES:
        return f'{parent}.{OLD_NAMES[last]}.{leaf}'
    return name
