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


def split_heads(qkv: jax.Array, num_heads: int) -> list[jax.Array]:
    """Queries, keys and values [B, T, heads, head_size], of qkv [B, T, 3 width].

    The three are split first. On TPUs an array whose last axis is a head of 72 channels
    is padded to 128; splitting that one takes copies, 9 % of the time of a step of XL/2
    (docs/performance.md).
    """
    parts = jnp.split(qkv, 3, axis=-1)
    return [part.reshape(*part.shape[:-1], num_heads, -1) for part in parts]


def attention(query, key, value, *, name: str, platform: str) -> jax.Array:
    """Attention of queries to keys and values, all [B, T, heads, head_size]."""
    chosen = implementation(name, platform, query.dtype, query.shape[-1])
    return jax.nn.dot_product_attention(query, key, value, implementation=chosen)
