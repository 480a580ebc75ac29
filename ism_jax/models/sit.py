"""SiT: the adaLN-zero transformer that predicts the velocity of a flow.

Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable
Interpolant Transformers" (arXiv 2401.08740), after DiT (Peebles and Xie, arXiv
2212.09748). Improved shortcut models (arXiv 2510.21250) add two conditions: the step
size d and the guidance scale w.

Both are added to the time and class embeddings, see `models.conditions`. At d = 0,
w = 0 the network *is* a SiT, before and after training, and loading a pretrained SiT
does not change its outputs.

The products and the attention of the blocks are in `dtype` (bfloat16 on accelerators).
Everything that adds up over the layers or leaves the network is float32: parameters and
the sums of their gradients, the residual stream, the condition, layer norms, and the
first and the last layer. docs/performance.md has the errors of the gradient.
"""

import functools
import math
from typing import Any

import chex
from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from ism_jax.models import attention, conditions
from ism_jax.models.linear import Linear
from ism_jax.runtime.sharding import BatchSharding

# Table 1 of SiT (the same as DiT's). The names of `PRESETS` add the patch size: 'XL/2'
# is the network of the iSM paper's main table.
SIZES = {
    'S': dict(hidden_size=384, depth=12, num_heads=6),
    'B': dict(hidden_size=768, depth=12, num_heads=12),
    'L': dict(hidden_size=1024, depth=24, num_heads=16),
    'XL': dict(hidden_size=1152, depth=28, num_heads=16),
}
PATCHES = (2, 4, 8)
PRESETS = {
    f'{size}/{patch}': dict(numbers, patch_size=patch)
    for size, numbers in SIZES.items()
    for patch in PATCHES
}

MAX_TOKENS = 2**16  # More need over 16 GiB of attention scores per head.


def preset(name: str) -> dict[str, int]:
    """Width, depth, heads and patch size of a preset such as 'XL/2'."""
    return dict(PRESETS[name])


def position_embedding(hidden_size: int, side: int) -> np.ndarray:
    """Fixed 2-D sin-cos position embedding (MAE, DiT), [side * side, hidden_size].

    The first half of the channels encodes the column, the second half the row.
    """
    quarter = hidden_size // 4
    frequencies = 1.0 / conditions.MAX_PERIOD ** (
        np.arange(quarter, dtype=np.float64) / quarter
    )

    def encode(position):
        angles = position.reshape(-1)[:, None] * frequencies[None]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.meshgrid(np.arange(side), np.arange(side), indexing='ij')
    return np.concatenate([encode(column), encode(row)], axis=1).astype(np.float32)


def _modulated_norm(x, shift, scale):
    """Layer norm of x [B, T, C], scaled and shifted by [B, C]; float32."""
    norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False)
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Self-attention and MLP, each modulated and gated by the condition."""

    num_heads: int
    mlp_ratio: float
    dtype: Any
    attention: str
    batch_sharding: BatchSharding

    @nn.compact
    def __call__(self, x, condition):
        x = self.batch_sharding.constrain(x)
        batch, tokens, width = x.shape
        layer = functools.partial(
            Linear, dtype=self.dtype, batch_sharding=self.batch_sharding
        )
        zeros = nn.initializers.zeros
        modulation = layer(6 * width, kernel_init=zeros, name='modulation')(condition)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(
            modulation.astype(jnp.float32), 6, axis=-1
        )
        h = _modulated_norm(x, shift_a, scale_a)
        qkv = layer(3 * width, name='qkv')(h)
        h = attention.attention(
            *attention.split_heads(qkv, self.num_heads),
            name=self.attention,
            platform=self.batch_sharding.platform,
        )
        h = layer(width, name='projection')(h.reshape(batch, tokens, width))
        x = x + gate_a[:, None] * h
        h = _modulated_norm(x, shift_m, scale_m)
        h = layer(int(self.mlp_ratio * width), name='mlp_in')(h)
        h = nn.gelu(h, approximate=True)
        h = layer(width, name='mlp_out')(h)
        # nn.scan expects (carry, outputs to stack).
        return x + gate_m[:, None] * h, None


class SiT(conditions.ConditionedNetwork, kw_only=True):
    """Velocity network s(x_t, t, c, d, w).

    `dtype` is that of the products and the attention of the blocks, see the module.

    Attributes, besides those of `ConditionedNetwork`:
      patch_size, depth, num_heads, mlp_ratio: see `PRESETS`.
      unroll: blocks per iteration of the scan; larger values compile more slowly
        and run faster on a CPU.
      velocity_head: number of last blocks that a second output, the velocity at t, does
        not share; 0 for no second output (improved MeanFlow, arXiv 2512.02012).
    """

    patch_size: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    unroll: int = 1
    velocity_head: int = 0
    block = Block

    def sizes(self) -> str:
        """The sizes of the network, in words."""
        return f'width {self.hidden_size}, {self.depth} layers, {self.num_heads} heads'

    def workspace(self, side: int) -> tuple[float, float]:
        """Attention scores, and values of the widest activation, of one sample."""
        tokens = (side // self.patch_size) ** 2
        return self.num_heads * tokens**2, self.mlp_ratio * self.hidden_size * tokens

    @nn.compact
    def __call__(self, x, t, d, w, label, interval=None, with_velocity=False):
        """Predicts the mean velocity over a step, or the velocity at t for d = 0.

        Args:
          x: [B, H, H, C] noisy images or latents; H a multiple of the patch size.
          t: [B] time in [0, 1]; 0 is noise, 1 is data.
          d: [B] step size in [0, 1].
          w: [B] guidance scale, 0 without guidance.
          label: [B] int32 in [0, num_classes].
          interval: [B, 2] start and end time of guidance, for `interval_input`; None
            for (0, 1). It has no effect at w = 0.
          with_velocity: whether to return the output of the velocity head too.

        Returns:
          [B, H, H, C] float32, or two of them.
        """
        shape = batch, side, _, channels = x.shape
        chex.assert_shape(x, (batch, side, side, channels))
        grid, patch = side // self.patch_size, self.patch_size

        # A convolution with stride = kernel = patch, written as a matrix product.
        x = x.reshape(batch, grid, patch, grid, patch, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid**2, patch**2 * channels)
        x = self._linear(self.hidden_size, 'patch_embedding')(x)
        x, condition = self._embed(x, t, d, w, label, interval)

        shared = self.depth - self.velocity_head
        x = mean = self._stack('blocks', shared)(x, condition)
        if self.velocity_head:
            mean = self._stack('mean_blocks', self.velocity_head)(x, condition)
        mean = self._image(mean, condition, 'final', shape)
        if not with_velocity:
            return mean
        x = self._stack('velocity_blocks', self.velocity_head)(x, condition)
        return mean, self._image(x, condition, 'velocity_final', shape)

    def _embed(self, x, t, d, w, label, interval):
        """Tokens of the patches [B, T, hidden_size], and what conditions the blocks."""
        side = math.isqrt(x.shape[1])
        x = x + position_embedding(self.hidden_size, side)[None]
        condition = self._condition(t, d, w, label, interval)
        condition = self.batch_sharding.constrain(condition)
        return x, nn.silu(condition)

    def _stack(self, name, length):
        """`length` blocks as a function of tokens and condition."""
        block = self.block
        if self.remat != 'none':
            policy = conditions.REMAT_POLICIES[self.remat]
            block = nn.remat(block, prevent_cse=False, policy=policy)
        blocks = nn.scan(
            block,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=nn.broadcast,
            length=length,
            unroll=self.unroll,
        )(
            self.num_heads,
            self.mlp_ratio,
            jnp.dtype(self.dtype),
            self.attention,
            self.batch_sharding,
            name=name,
        )
        return lambda x, condition: blocks(x, condition)[0]

    def _image(self, x, condition, name, shape):
        """The last layer: tokens to an image [B, H, H, C] float32."""
        modulation = self._linear(
            2 * self.hidden_size,
            f'{name}_modulation',
            kernel_init=nn.initializers.zeros,
        )
        shift, scale = jnp.split(modulation(condition), 2, axis=-1)
        x = _modulated_norm(x, shift, scale)
        return self._unpatch(x, name, shape)

    def _unpatch(self, x, name, shape):
        """A zero-initialised linear layer to patches, joined to an image."""
        batch, side, _, channels = shape
        grid, patch = side // self.patch_size, self.patch_size
        x = self._linear(patch**2 * channels, name, kernel_init=nn.initializers.zeros)(
            x
        )
        x = x.reshape(batch, grid, grid, patch, patch, channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(shape)


class StepAndGuidance(SiT, kw_only=True):
    """The part of a SiT's condition that depends on d, w and the interval alone.

    Attributes and parameters are those of `SiT`.
    """

    @nn.compact
    def __call__(self, d, w, interval=None):
        """Sum of these embeddings, [B, hidden_size]; arguments as in `SiT`."""
        condition = self._step(d) + self._guidance(w)
        if self.interval_input:
            condition += sum(self._interval(w, interval))
        return condition
