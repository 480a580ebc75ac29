"""Softmax attention by the fastest kernel that fits."""

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ('auto', 'xla', 'cudnn')
# Limits of cuDNN's fused attention, forward and backward, on GPUs since Ampere.
CUDNN_DTYPES = ('bfloat16', 'float16')
CUDNN_MAX_HEAD = 128
CUDNN_HEAD_MULTIPLE = 8


def implementation(name: str, platform: str, dtype, head_size: int) -> str:
    """Returns 'xla' or 'cudnn': `name`, or for 'auto' the faster one that works.

    `jax.nn.dot_product_attention` chooses XLA's wherever it is given no choice. cuDNN's
    does not store the scores, but has no forward-mode derivative; a network that is
    differentiated so must not ask for 'auto'.

    Args:
      name: one of `IMPLEMENTATIONS`.
      platform: 'cpu', 'gpu' or 'tpu'.
      dtype: of queries, keys and values.
      head_size: channels of a head.
    """
    if name != 'auto':
        return name
    fits = jnp.dtype(dtype).name in CUDNN_DTYPES
    fits &= head_size <= CUDNN_MAX_HEAD and not head_size % CUDNN_HEAD_MULTIPLE
    return 'cudnn' if fits and platform in ('gpu', 'cuda') else 'xla'


def attention(query, key, value, *, name: str, platform: str) -> jax.Array:
    """Attention of queries to keys and values, all [B, T, heads, head_size]."""
    chosen = implementation(name, platform, query.dtype, query.shape[-1])
    return jax.nn.dot_product_attention(query, key, value, implementation=chosen)
