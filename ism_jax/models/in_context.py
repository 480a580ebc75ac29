"""A transformer that is conditioned by tokens in its context, without adaLN.

The network of improved MeanFlow (arXiv 2512.02012): RMS norm, SwiGLU, normalised
queries and keys, rotary positions, and residual branches gated by a vector that is
initialised to 0. Conditions are tokens before those of the image: learned tokens plus
the embedding of the condition. Without modulation by the condition, a block of width C
has 4 C^2 + 3 r C^2 parameters with the MLP ratio r (8/3 in the paper: 12 C^2), and a
block of SiT has 18 C^2.

Difference from the official code: the time tokens embed t as well as d. As in `SiT`,
the embeddings of d, w and the interval vanish at d = 0 and w = 0.
"""

import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.models import attention, sit
from ism_jax.models.linear import Linear
from ism_jax.runtime.sharding import BatchSharding

# Tokens of each condition, as in the paper.
CLASS_TOKENS, GUIDANCE_TOKENS, TIME_TOKENS, INTERVAL_TOKENS = 8, 4, 4, 2
ROTARY_BASE = 10_000.0
# Standard deviation of the initial kernels: 0.32 / sqrt(inputs).
KERNEL_INIT = nn.initializers.variance_scaling(0.32**2, 'fan_in', 'normal')


def rotations(num_tokens: int, head_width: int) -> np.ndarray:
    """Angles of the rotary positions [T, head_width / 2] (arXiv 2104.09864)."""
    frequencies = ROTARY_BASE ** (-np.arange(0, head_width, 2) / head_width)
    return np.outer(np.arange(num_tokens), frequencies).astype(np.float32)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates each pair of neighbouring channels of x [B, T, heads, head_width]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = (f(angles)[None, :, None] for f in (jnp.cos, jnp.sin))
    pairs = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return pairs.reshape(x.shape)


def _norm(name):
    return nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, name=name)


class Block(nn.Module):
    """Self-attention and SwiGLU, each with a learned gate."""

    num_heads: int
    mlp_ratio: float
    dtype: Any
    attention: str
    batch_sharding: BatchSharding

    @nn.compact
    def __call__(self, x, angles):
        x = self.batch_sharding.constrain(x)
        batch, tokens, width = x.shape
        layer = functools.partial(
            Linear,
            dtype=self.dtype,
            kernel_init=KERNEL_INIT,
            use_bias=False,
            batch_sharding=self.batch_sharding,
        )

        def gated(name, branch):
            gate = self.param(name, nn.initializers.zeros, (width,))
            return branch * gate[None, None]  # float32, as the residual stream.

        h = _norm('attention_norm')(x)
        qkv = layer(3 * width, name='qkv')(h)
        query, key, value = attention.split_heads(qkv, self.num_heads)
        query, key = (
            rotate(_norm(name)(part), angles).astype(self.dtype)
            for name, part in (('query_norm', query), ('key_norm', key))
        )
        h = attention.attention(
            query,
            key,
            value,
            name=self.attention,
            platform=self.batch_sharding.platform,
        )
        h = layer(width, name='projection')(h.reshape(batch, tokens, width))
        x = x + gated('attention_gate', h)
        h = _norm('mlp_norm')(x)
        hidden = int(self.mlp_ratio * width)
        gate, value = jnp.split(layer(2 * hidden, name='mlp_in')(h), 2, axis=-1)
        h = layer(width, name='mlp_out')(nn.silu(gate) * value)
        # nn.scan expects (carry, outputs to stack).
        return x + gated('mlp_gate', h), None


class InContext(sit.SiT):
    """Velocity network s(x_t, t, c, d, w); attributes and call are those of `SiT`."""

    block = Block

    def _embed(self, x, t, d, w, label, interval):
        """Tokens of the conditions and patches [B, P + T, hidden_size], and angles."""
        conditions = {
            'class': (CLASS_TOKENS, self._class(label)),
            'guidance': (GUIDANCE_TOKENS, self._guidance(w)),
            'time': (TIME_TOKENS, self._time(t) + self._step(d)),
        }
        if self.interval_input:
            start, end = self._interval(w, interval)
            conditions['interval_start'] = INTERVAL_TOKENS, start
            conditions['interval_end'] = INTERVAL_TOKENS, end
        init = nn.initializers.normal(1 / math.sqrt(self.hidden_size))
        prefix = [
            self.param(f'{name}_tokens', init, (number, self.hidden_size))[None]
            + embedding[:, None]
            for name, (number, embedding) in conditions.items()
        ]
        x = jnp.concatenate([*prefix, x], axis=1)
        angles = rotations(x.shape[1], self.hidden_size // self.num_heads)
        return x, jnp.asarray(angles)

    def _image(self, x, condition, name, shape):
        patches = (shape[1] // self.patch_size) ** 2
        x = _norm(f'{name}_norm')(x[:, -patches:])
        return self._unpatch(x, name, shape)
