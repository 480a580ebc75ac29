"""Converts checkpoints of the official DiT code (github.com/facebookresearch/DiT).

DiT has the architecture of SiT and is trained for another task: it predicts the noise
of a variance-preserving path at timesteps 0 .. 999, where 0 is data. The time embedding
is converted so that our network at time t computes what DiT computes at timestep
1000 (1 - t), with `time_scale` 1000. Only the half of the output that predicts the
noise is kept. The result is not a velocity: it can initialise training and cannot be
sampled from. The authors license their weights for non-commercial use (CC BY-NC).

`official_sit` says which modules are initialised and explains the null embedding.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ism_jax.interchange import converted_network, official_sit
from ism_jax.models import conditions

TIMESTEPS = 1000


def from_tensors(
    tensors: Mapping[str, Any], num_heads: int = 0
) -> converted_network.ConvertedNetwork:
    """The official DiT, converted; arguments and errors as in `official_sit`."""
    converted = official_sit.from_tensors(tensors, num_heads)
    time = converted.params['time_embedding']
    # cos(1000 w - s w) and sin(1000 w - s w) are a rotation of cos(s w) and sin(s w),
    # which the first layer absorbs.
    angles = TIMESTEPS * conditions.frequencies()
    cos, sin = (jnp.asarray(f(angles), jnp.float32)[:, None] for f in (np.cos, np.sin))
    by_cos, by_sin = jnp.split(time['hidden']['kernel'], 2)
    kernel = jnp.concatenate([by_cos * cos + by_sin * sin, by_cos * sin - by_sin * cos])
    time = time | {'hidden': time['hidden'] | {'kernel': kernel}}
    return converted._replace(
        params=converted.params | {'time_embedding': time},
        model=converted.model | {'time_scale': float(TIMESTEPS)},
    )
