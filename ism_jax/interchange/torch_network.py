"""Our SiT for PyTorch: as an official SiT, or whole, with a module that samples it.

The condition of the blocks is a sum, time(t) + class(c) + step(d) + guidance(w). At one
step size and one guidance scale the last two terms are constants, so adding them to all
class embeddings gives an official SiT that computes the same function.
"""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from ism_jax.interchange import official_sit
from ism_jax.models import sit
from ism_jax.runtime import files, paths

WEIGHTS, MODULE = 'weights.safetensors', 'ism_torch.py'
# Attributes of the model that the module reads.
MODEL_OPTIONS = (
    *('num_classes', 'patch_size', 'hidden_size', 'depth', 'num_heads', 'mlp_ratio'),
    *('step_embedding', 'time_scale', 'guidance_embedding', 'interval_input'),
)
# Names of our embeddings in the module.
_EMBEDDINGS = {
    'step_embedding': 'step_embedding',
    'guidance_embedding': 'guidance_embeddings.guidance',
    'interval_start_embedding': 'guidance_embeddings.start',
    'interval_end_embedding': 'guidance_embeddings.end',
}


def fold(
    model: sit.SiT,
    params: Mapping[str, Any],
    *,
    d: float,
    w: float,
    interval: tuple[float, float],
) -> dict[str, Any]:
    """Parameters that give at d = 0, w = 0 what `params` give at this d and w.

    All class embeddings change, also the null embedding.

    Args:
      model: the network.
      params: its parameters.
      d, w: step size and guidance scale that the network is conditioned on.
      interval: start and end time of guidance; unused unless it is an input.
    """
    fields = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.init and field.name not in ('name', 'parent')
    }
    apply = jax.jit(sit.StepAndGuidance(**fields).apply)
    inputs = jnp.array([d]), jnp.array([w]), jnp.array([interval])
    terms = apply({'params': params}, *inputs)
    table = params['class_embedding']['embedding'] + terms
    return {**params, 'class_embedding': {'embedding': table}}


def write_official(path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict.

    Args:
      path: `.safetensors`, or `.pt` for `torch.load`, which needs PyTorch.
      tensors: by name.

    Raises:
      ValueError: another suffix, or PyTorch is missing.
    """
    path = paths.to_path(path)
    if path.suffix == '.safetensors':
        return files.write_bytes(path, safetensors.numpy.save(dict(tensors)))
    if path.suffix != '.pt':
        raise ValueError(f'--out {path} must end in .safetensors or .pt')
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f'--out {path} needs PyTorch: pip install torch, or write a .safetensors '
            'file'
        ) from error
    state = {name: torch.from_numpy(t.copy()) for name, t in tensors.items()}
    with files.replacing(path) as temporary:
        torch.save(state, temporary)


def write_whole(
    folder,
    model: sit.SiT,
    params: Mapping[str, Any],
    image_shape: tuple[int, int, int],
    sampler_options: Mapping[str, Any],
) -> None:
    """Writes the weights, and the module that samples them.

    Args:
      folder: created if missing.
      model: the network.
      params: its parameters.
      image_shape: (H, W, C).
      sampler_options: what `sample` of the module reads besides the model's attributes.
    """
    params = jax.device_get(params)
    tensors = official_sit.to_tensors(params, model.patch_size, image_shape)
    for ours, theirs in _EMBEDDINGS.items():
        if ours not in params:
            continue
        if 'embedding' in params[ours]:
            tensors[f'{theirs}.weight'] = params[ours]['embedding']
            continue
        for layer, index in (('hidden', 0), ('out', 2)):
            name, weights = f'{theirs}.mlp.{index}', params[ours][layer]
            tensors[f'{name}.weight'] = np.ascontiguousarray(weights['kernel'].T)
            tensors[f'{name}.bias'] = weights['bias']
    options = {name: getattr(model, name) for name in MODEL_OPTIONS}
    options |= {'image_shape': list(image_shape), **sampler_options}
    content = safetensors.numpy.save(tensors, {'options': json.dumps(options)})
    folder = paths.to_path(folder)
    files.write_bytes(folder / WEIGHTS, content)
    module = Path(__file__).with_name(MODULE).read_bytes()
    files.write_bytes(folder / MODULE, module)
