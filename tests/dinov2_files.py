"""Folders of small DINOv2 networks, as transformers writes them."""

import json

import numpy as np
from safetensors import numpy as safetensors

from ism_jax.models import dinov2

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=56)


def random_tensors(config: dinov2.Config, seed=0):
    """A random state dict with the names of transformers."""
    rng = np.random.default_rng(seed)
    width, mlp = config.hidden_size, config.mlp_width
    gated = config.use_swiglu_ffn
    names = ('weights_in', 'weights_out') if gated else ('fc1', 'fc2')
    patch = (width, 3, config.patch_size, config.patch_size)
    positions = (config.image_size // config.patch_size) ** 2 + 1
    out = {
        'embeddings.cls_token': rng.normal(size=(1, 1, width)),
        'embeddings.mask_token': rng.normal(size=(1, width)),
        'embeddings.position_embeddings': rng.normal(size=(1, positions, width)),
        'embeddings.patch_embeddings.projection.weight': 0.1 * rng.normal(size=patch),
        'embeddings.patch_embeddings.projection.bias': rng.normal(size=width),
        'layernorm.weight': rng.uniform(0.5, 1.5, width),
        'layernorm.bias': rng.normal(size=width),
    }
    for number in range(config.num_hidden_layers):
        layer = f'encoder.layer.{number}'
        for name, shape in (
            ('attention.attention.query', (width, width)),
            ('attention.attention.key', (width, width)),
            ('attention.attention.value', (width, width)),
            ('attention.output.dense', (width, width)),
            (f'mlp.{names[0]}', (mlp * (1 + gated), width)),
            (f'mlp.{names[1]}', (width, mlp)),
        ):
            scale = 2 / shape[1] ** 0.5
            out[f'{layer}.{name}.weight'] = scale * rng.normal(size=shape)
            out[f'{layer}.{name}.bias'] = rng.normal(size=shape[0])
        for name in ('norm1', 'norm2'):
            out[f'{layer}.{name}.weight'] = rng.uniform(0.5, 1.5, width)
            out[f'{layer}.{name}.bias'] = rng.normal(size=width)
        for name in ('layer_scale1', 'layer_scale2'):
            out[f'{layer}.{name}.lambda1'] = rng.uniform(0.5, 1.5, width)
    return {name: tensor.astype(np.float32) for name, tensor in out.items()}


def write(folder, config: dinov2.Config, tensors=None, **change):
    folder.mkdir(exist_ok=True)
    content = {**vars(config), 'model_type': 'dinov2', 'qkv_bias': True, **change}
    (folder / 'config.json').write_text(json.dumps(content))
    tensors = random_tensors(config) if tensors is None else tensors
    safetensors.save_file(tensors, folder / 'model.safetensors')
    return folder
