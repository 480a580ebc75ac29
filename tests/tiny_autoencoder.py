"""A tiny autoencoder for tests, and files of autoencoders."""

import dataclasses
from pathlib import Path

from flax import traverse_util
import jax
import numpy as np
import safetensors.numpy

from ism_jax.interchange import autoencoder_weights
from ism_jax.models import vae
from ism_jax.runtime import files

CONFIG = vae.Config(
    block_out_channels=(8, 16, 16),
    layers_per_block=1,
    norm_num_groups=4,
    scaling_factor=0.3,
)


def make():
    """The autoencoder, and parameters in which no bias is 0 and no scale is 1."""
    autoencoder = vae.Autoencoder(CONFIG)
    params = autoencoder.init(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return autoencoder, jax.tree.unflatten(treedef, leaves)


def images(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def save(folder, autoencoder: vae.Autoencoder, params) -> None:
    """Writes a folder that `autoencoder_weights.load` and diffusers read."""
    levels = len(autoencoder.config.block_out_channels)
    config = dataclasses.asdict(autoencoder.config) | {
        '_class_name': 'AutoencoderKL',
        'act_fn': 'silu',
        **{
            name: [block] * levels
            for name, block in autoencoder_weights.SUPPORTED_BLOCKS.items()
        },
    }
    files.write_json(Path(folder) / autoencoder_weights.CONFIG, config)
    # diffusers requires the tag of PyTorch.
    weights = safetensors.numpy.save(tensors_from_params(params), {'format': 'pt'})
    files.write_bytes(Path(folder) / autoencoder_weights.WEIGHTS, weights)


def tensors_from_params(params) -> dict[str, np.ndarray]:
    """Inverse of `params_from_tensors`, with the names of current files."""
    tensors = {}
    for path, array in traverse_util.flatten_dict(params).items():
        array = np.asarray(array, np.float32)
        if path[-1] == 'kernel':
            array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
        name = autoencoder_weights.published_name(path)
        tensors[name] = np.ascontiguousarray(array)
    return tensors
