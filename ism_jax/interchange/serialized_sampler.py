"""A sampler with its weights as StableHLO, which runs without this package.

    from jax import export
    sampler = export.deserialize(open('sampler.bin', 'rb').read())
    images = sampler.call(noise, labels, guidance)

`noise` is [B, H, W, C] float32, `labels` are [B] int32 and `guidance` is a float32
scalar. Reading the file needs the packages jax and flatbuffers.
"""

from collections.abc import Callable
import importlib.util

import jax
from jax import export
import jax.numpy as jnp

PLATFORMS = ('cpu', 'cuda', 'tpu')
# FlatBuffers, the format of the file, addresses its bytes with 31 bits.
MAX_BYTES = 2**31 - 2**20


def serialize(
    sample: Callable[..., jax.Array], params, image_shape: tuple[int, int, int]
) -> bytes:
    """The content of the file, for any batch size.

    Args:
      sample: (params, noise, labels, guidance) -> images.
      params: become constants of the program.
      image_shape: (H, W, C) of the noise.

    Raises:
      ValueError: FlatBuffers is missing, or the weights do not fit into a file.
    """
    if importlib.util.find_spec('flatbuffers') is None:
        raise ValueError('stablehlo needs FlatBuffers: pip install flatbuffers')
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if size > MAX_BYTES:
        raise ValueError(
            f'the weights have {size / 2**30:.1f} GiB, and a serialized sampler holds '
            'less than 2 GiB; export the run instead, with the command export'
        )
    params = jax.device_get(params)
    (batch,) = export.symbolic_shape('batch')
    arguments = (
        jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    sampler = jax.jit(lambda *inputs: sample(params, *inputs))
    return bytes(export.export(sampler, platforms=PLATFORMS)(*arguments).serialize())
