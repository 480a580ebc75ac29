"""A U-Net: residual convolutions on a pyramid of resolutions, with skip connections.

The network of DDPM (Ho et al., arXiv 2006.11239) with the residual blocks of ADM
(Dhariwal and Nichol, arXiv 2105.05233): group norm, SiLU, scale and shift by the
condition, a last convolution initialised to 0, and self-attention at low resolution.
It needs fewer images and fewer steps than a transformer, so it suits small images.

Differences from ADM: between levels, 2x2 pixels become channels and back by a linear
layer; the finest level may have patches in place of pixels; a block on the way up joins
the output of one block on the way down. A convolution on few channels of many pixels is
slow, above all on a CPU, and these avoid it. Conditions are those of `SiT`.
"""

import functools
import math
from typing import Any

import chex
from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from ism_jax.models import attention, conditions
from ism_jax.models.linear import PRODUCT, Linear
from ism_jax.runtime.sharding import BatchSharding

# Of every group norm, as in EDM (Karras et al., arXiv 2206.00364).
MAX_GROUPS, MIN_GROUP_CHANNELS = 32, 4


def fold(x: jax.Array, factor: int) -> jax.Array:
    """Makes each square of pixels one: [B, H, W, C] -> [B, H/f, W/f, f^2 C]."""
    batch, height, width, channels = x.shape
    height, width = height // factor, width // factor
    x = x.reshape(batch, height, factor, width, factor, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height, width, factor**2 * channels)


def unfold(x: jax.Array, factor: int) -> jax.Array:
    """Inverse of `fold`: [B, h, w, f^2 C] -> [B, f h, f w, C]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, factor, factor, channels // factor**2)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, factor * height, factor * width, channels // factor**2)


def _norm(x, name):
    """Group norm, computed in float32, in the dtype of x."""
    groups = math.gcd(MAX_GROUPS, max(1, x.shape[-1] // MIN_GROUP_CHANNELS))
    norm = nn.GroupNorm(groups, epsilon=1e-6, dtype=jnp.float32, name=name)
    return norm(x).astype(x.dtype)


def _conv(x, features, name, zero_init=False):
    """A 3x3 convolution in the dtype of x."""
    zeros = {'kernel_init': nn.initializers.zeros} if zero_init else {}
    conv = nn.Conv(features, (3, 3), dtype=x.dtype, name=name, **zeros)
    return checkpoint_name(conv(x), PRODUCT)


class Block(nn.Module):
    """Two convolutions, the second after modulation by the condition."""

    features: int
    dtype: Any
    batch_sharding: BatchSharding

    @nn.compact
    def __call__(self, x, condition):
        x = self.batch_sharding.constrain(x)
        h = nn.silu(_norm(x, 'norm_1'))
        h = _conv(h, self.features, 'conv_1')
        layer = functools.partial(
            Linear, dtype=self.dtype, batch_sharding=self.batch_sharding
        )
        modulation = layer(2 * self.features, name='modulation')
        scale, shift = jnp.split(modulation(condition)[:, None, None], 2, axis=-1)
        h = nn.silu(_norm(h, 'norm_2') * (1 + scale) + shift)
        h = _conv(h, self.features, 'conv_2', zero_init=True)
        if x.shape[-1] != self.features:
            x = layer(self.features, name='shortcut')(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over all positions, as a residual that is initialised to 0."""

    num_heads: int
    dtype: Any
    attention: str
    batch_sharding: BatchSharding

    @nn.compact
    def __call__(self, x):
        layer = functools.partial(
            Linear, dtype=self.dtype, batch_sharding=self.batch_sharding
        )
        batch, height, width, features = x.shape
        h = _norm(x, 'norm').reshape(batch, height * width, features)
        qkv = layer(3 * features, name='qkv')(h)
        h = attention.attention(
            *attention.split_heads(qkv, self.num_heads),
            name=self.attention,
            platform=self.batch_sharding.platform,
        )
        zeros = nn.initializers.zeros
        h = layer(features, kernel_init=zeros, name='projection')(
            h.reshape(batch, height * width, features)
        )
        return x + h.reshape(x.shape)


class UNet(conditions.ConditionedNetwork, kw_only=True):
    """Velocity network s(x_t, t, c, d, w); the call is that of `SiT`.

    Attributes, besides those of `ConditionedNetwork`:
      hidden_size: channels of the finest level.
      patch_size: side of the squares of pixels that the finest level sees as one.
      channel_multipliers: channels of each level divided by `hidden_size`, finest
        first; each level has half the resolution of the one before.
      blocks_per_level: residual blocks of a level on the way down, and as many on the
        way up.
      attention_levels: number of coarsest levels that have self-attention.
      num_heads: heads of self-attention.
    """

    channel_multipliers: tuple[int, ...]
    blocks_per_level: int
    attention_levels: int
    num_heads: int
    patch_size: int
    # As in ADM. After 1,000 steps on 36 classes, the class lowers the error of the
    # velocity by 1.6 times as much as with DiT's 0.02.
    class_std = 1.0

    def sizes(self) -> str:
        """The sizes of the network, in words."""
        widths = [self._features(i) for i in range(len(self.channel_multipliers))]
        return f'levels of width {", ".join(map(str, widths))}'

    def workspace(self, side: int) -> tuple[float, float]:
        """Attention scores, and values of the widest activation, of one sample."""
        pixels = (side // self.patch_size) ** 2
        first = len(self.channel_multipliers) - self.attention_levels
        attended = pixels // 4**first if self.attention_levels else 0
        # A block on the way up reads the output of two.
        return self.num_heads * attended**2, 2 * self._features(0) * pixels

    @property
    def condition_size(self) -> int:
        return 4 * self.hidden_size  # As in ADM.

    @nn.compact
    def __call__(self, x, t, d, w, label, interval=None):
        """Predicts the mean velocity over a step, or the velocity at t for d = 0.

        Args:
          x: [B, H, W, C] noisy images or latents; H and W are multiples of
            patch_size * 2^(levels - 1).
          t, d, w, label, interval: see `SiT`.

        Returns:
          [B, H, W, C] float32.
        """
        _, height, width, channels = x.shape
        last = len(self.channel_multipliers) - 1
        for side in (height, width):
            chex.assert_is_divisible(side, self.patch_size * 2**last)
        dtype = jnp.dtype(self.dtype)
        layer = functools.partial(
            Linear, dtype=dtype, batch_sharding=self.batch_sharding
        )
        condition = self._condition(t, d, w, label, interval)
        condition = self.batch_sharding.constrain(condition)
        condition = nn.silu(condition).astype(dtype)

        x = fold(x.astype(dtype), self.patch_size)
        x = _conv(x, self.hidden_size, 'conv_in')
        skips = []
        for level in range(last + 1):
            if level:
                features = self._features(level)
                x = layer(features, name=f'down_{level}')(fold(x, 2))
            for number in range(self.blocks_per_level):
                x = self._block(f'down_{level}_{number}', level)(x, condition)
                skips.append(x)
        x = self._block('middle', last)(x, condition)
        for level in reversed(range(last + 1)):
            for number in range(self.blocks_per_level):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = self._block(f'up_{level}_{number}', level)(x, condition)
            if level:
                features = 4 * self._features(level - 1)
                x = unfold(layer(features, name=f'up_{level}')(x), 2)
        x = nn.silu(_norm(x, 'norm_out'))
        x = _conv(x, channels * self.patch_size**2, 'conv_out', zero_init=True)
        return unfold(x, self.patch_size).astype(jnp.float32)

    def _features(self, level):
        return self.hidden_size * self.channel_multipliers[level]

    def _block(self, name, level):
        """A block, and self-attention if the level has it, as a function."""
        block, dtype = Block, jnp.dtype(self.dtype)
        if self.remat != 'none':
            policy = conditions.REMAT_POLICIES[self.remat]
            block = nn.remat(block, prevent_cse=False, policy=policy)
        block = block(self._features(level), dtype, self.batch_sharding, name=name)
        if level < len(self.channel_multipliers) - self.attention_levels:
            return block
        attend = Attention(
            self.num_heads,
            dtype,
            self.attention,
            self.batch_sharding,
            name=f'{name}_attention',
        )
        return lambda x, condition: attend(block(x, condition))
