"""The autoencoder of Stable Diffusion 1 and 2 (AutoencoderKL, sd-vae-ft-mse and -ema).

    encode: images [B, H, W, 3] in [-1, 1] -> mean, log-variance [B, H/8, W/8, 4]
    decode: latents [B, h, w, 4]           -> images [B, 8h, 8w, 3], about in [-1, 1]

Rombach et al., arXiv 2112.10752; the factor 8 is 2 to the power of the number of levels
minus 1. `encode` and `decode` work on the autoencoder's own latents. Diffusion models
are trained on `scaling_factor` times a sample of the posterior (0.18215, for a standard
deviation of about 1).

Modules have the names of the published weights, see `interchange.autoencoder_weights`.
Normalisation is in float32 for every `dtype`, and float32 matrix products use full
precision (TPUs would round their inputs to bfloat16).
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp

EPSILON = 1e-6  # Of every group normalisation.
LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes, named as in the published `config.json`; defaults of Stable Diffusion.

    Attributes:
      in_channels, out_channels: channels of the images.
      latent_channels: channels of the latents.
      block_out_channels: width of each level, finest first.
      layers_per_block: residual blocks per level (the decoder has one more).
      norm_num_groups: groups of each group normalisation.
      scaling_factor: see the module's docstring.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


def _precision(dtype):
    """Full precision for float32; products of bfloat16 are exact without it."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _conv(features, name, dtype, kernel=3, **options):
    return nn.Conv(
        features,
        (kernel, kernel),
        dtype=dtype,
        precision=_precision(dtype),
        name=name,
        **options,
    )


def _norm(x, groups, name):
    """Group normalisation, computed in float32, in the dtype of x."""
    out = nn.GroupNorm(groups, epsilon=EPSILON, dtype=jnp.float32, name=name)(x)
    return out.astype(x.dtype)


class Residual(nn.Module):
    """Residual block of two convolutions, each after a normalisation and a SiLU."""

    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        h = x
        for number in '12':
            h = nn.silu(_norm(h, self.groups, f'norm{number}'))
            h = _conv(self.features, f'conv{number}', self.dtype)(h)
        if x.shape[-1] != self.features:
            x = _conv(self.features, 'conv_shortcut', self.dtype, kernel=1)(x)
        return x + h


class Attention(nn.Module):
    """Residual block of single-head self-attention over all positions."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        batch, height, width, features = x.shape
        dense = functools.partial(
            nn.Dense, features, dtype=self.dtype, precision=_precision(self.dtype)
        )
        h = _norm(x, self.groups, 'group_norm').reshape(batch, -1, features)
        q, k, v = (dense(name=f'to_{name}')(h) for name in 'qkv')
        products = functools.partial(
            jnp.einsum,
            precision=_precision(self.dtype),
            preferred_element_type=jnp.float32,
        )
        weights = products('bqc,bkc->bqk', q, k) / math.sqrt(features)
        weights = jax.nn.softmax(weights).astype(self.dtype)
        h = products('bqk,bkc->bqc', weights, v).astype(self.dtype)
        return x + dense(name='to_out_0')(h).reshape(x.shape)


class Middle(nn.Module):
    """Residual block, attention and residual block at the coarsest level."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        block = functools.partial(Residual, x.shape[-1], self.groups, self.dtype)
        x = block(name='resnets_0')(x)
        x = Attention(self.groups, self.dtype, name='attentions_0')(x)
        return block(name='resnets_1')(x)


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution."""

    features: int
    layers: int
    change: str  # Of the resolution: 'halve', 'double' or ''.
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        for number in range(self.layers):
            block = Residual(
                self.features, self.groups, self.dtype, name=f'resnets_{number}'
            )
            x = block(x)
        if self.change == 'halve':
            # Padded on one side only, as in diffusers.
            options = dict(strides=2, padding=((0, 1), (0, 1)))
            x = Resize(self.features, self.dtype, options, name='downsamplers_0')(x)
        elif self.change == 'double':
            x = x.repeat(2, axis=1).repeat(2, axis=2)
            x = Resize(self.features, self.dtype, {}, name='upsamplers_0')(x)
        return x


class Resize(nn.Module):
    """The convolution of a change of resolution."""

    features: int
    dtype: Any
    options: Mapping[str, Any]

    @nn.compact
    def __call__(self, x):
        return _conv(self.features, 'conv', self.dtype, **self.options)(x)


class Encoder(nn.Module):
    """Moments of the posterior before `quant_conv`, from images."""

    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, x):
        c = self.config
        x = _conv(c.block_out_channels[0], 'conv_in', self.dtype)(x)
        last = len(c.block_out_channels) - 1
        for number, features in enumerate(c.block_out_channels):
            level = Level(
                features,
                c.layers_per_block,
                'halve' if number < last else '',
                c.norm_num_groups,
                self.dtype,
                name=f'down_blocks_{number}',
            )
            x = level(x)
        x = Middle(c.norm_num_groups, self.dtype, name='mid_block')(x)
        x = nn.silu(_norm(x, c.norm_num_groups, 'conv_norm_out'))
        return _conv(2 * c.latent_channels, 'conv_out', self.dtype)(x)


class Decoder(nn.Module):
    """Images from latents after `post_quant_conv`."""

    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, x):
        c = self.config
        x = _conv(c.block_out_channels[-1], 'conv_in', self.dtype)(x)
        x = Middle(c.norm_num_groups, self.dtype, name='mid_block')(x)
        last = len(c.block_out_channels) - 1
        for number, features in enumerate(reversed(c.block_out_channels)):
            level = Level(
                features,
                c.layers_per_block + 1,
                'double' if number < last else '',
                c.norm_num_groups,
                self.dtype,
                name=f'up_blocks_{number}',
            )
            x = level(x)
        x = nn.silu(_norm(x, c.norm_num_groups, 'conv_norm_out'))
        return _conv(c.out_channels, 'conv_out', self.dtype)(x)


class Network(nn.Module):
    """Encoder and decoder with their parameters in one tree."""

    config: Config
    dtype: Any

    def setup(self):
        latents = self.config.latent_channels
        self.encoder = Encoder(self.config, self.dtype)
        self.quant_conv = _conv(2 * latents, None, self.dtype, kernel=1)
        self.post_quant_conv = _conv(latents, None, self.dtype, kernel=1)
        self.decoder = Decoder(self.config, self.dtype)

    def encode(self, images):
        return self.quant_conv(self.encoder(images))

    def decode(self, latents):
        return self.decoder(self.post_quant_conv(latents))

    def __call__(self, images):
        moments = self.encode(images)
        return self.decode(moments[..., : self.config.latent_channels])


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Encoder and decoder as functions of parameters, see the module's docstring.

    Attributes:
      config: sizes of the network.
      dtype: dtype of the computation, 'float32' or 'bfloat16'. Results are float32.
    """

    config: Config = Config()
    dtype: str = 'float32'

    @property
    def _network(self) -> Network:
        return Network(self.config, jnp.dtype(self.dtype))

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(h, w, c) of the latents of square images.

        Raises:
          ValueError: the side is not a multiple of `config.factor`.
        """
        factor = self.config.factor
        if image_size < factor or image_size % factor:
            raise ValueError(
                f'images of {image_size} pixels do not fit the autoencoder; crop or '
                f'resize them to a multiple of {factor}'
            )
        side = image_size // factor
        return side, side, self.config.latent_channels

    def encode(self, params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance of the posterior, both [B, H/8, W/8, c] float32.

        Args:
          params: parameters of the network.
          images: [B, H, W, 3] in [-1, 1]; H and W are multiples of `config.factor`.
        """
        _, height, width, _ = images.shape
        chex.assert_is_divisible(height, self.config.factor)
        chex.assert_is_divisible(width, self.config.factor)
        images = images.astype(self.dtype)
        moments = self._network.apply({'params': params}, images, method='encode')
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)

    def decode(self, params, latents: jax.Array) -> jax.Array:
        """Images [B, 8h, 8w, 3] float32 of the autoencoder's latents [B, h, w, c]."""
        latents = latents.astype(self.dtype)
        images = self._network.apply({'params': params}, latents, method='decode')
        return images.astype(jnp.float32)

    def init(self, key: jax.Array):
        """Random parameters."""
        side = self.config.factor
        images = jnp.zeros((1, side, side, self.config.in_channels))
        return self._network.init(key, images)['params']

    def abstract_params(self):
        """Shapes of the parameters, without allocating any."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))
