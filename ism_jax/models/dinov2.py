"""DINOv2, whose class token is the feature of FD-DINOv2.

Oquab et al. 2023 (arXiv 2304.07193): a vision transformer with layer scale. Stein et
al. 2023 (arXiv 2306.04675) use the class token of ViT-L/14 after the last norm, for
images resized to 224 x 224 by Pillow's bicubic filter (their program dgm-eval with
default options).
"""

import dataclasses

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.models import resize

SIDE = 224  # Images are resized to this side.
MEAN = (0.485, 0.456, 0.406)  # Of ImageNet, like DEVIATION.
DEVIATION = (0.229, 0.224, 0.225)
ATTENTION = ('query', 'key', 'value')


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes, named as in the `config.json` of transformers.

    Attributes:
      hidden_size: F, width of the features.
      num_hidden_layers, num_attention_heads, mlp_ratio: sizes of the transformer.
      patch_size: side of a patch, in pixels.
      image_size: side of the images on which the positions were learned.
      layer_norm_eps: epsilon of the layer norms.
      use_swiglu_ffn: gated MLPs, as in the largest network.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    mlp_ratio: float = 4
    patch_size: int = 14
    image_size: int = 518
    layer_norm_eps: float = 1e-6
    use_swiglu_ffn: bool = False

    @property
    def mlp_width(self) -> int:
        width = int(self.hidden_size * self.mlp_ratio)
        if self.use_swiglu_ffn:
            return (int(width * 2 / 3) + 7) // 8 * 8
        return width


class Dinov2(nn.Module):
    """The network up to the class token after the last norm."""

    config: Config

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Features of images.

        Args:
          images: [B, H, W, 3], 0 .. 255, uint8 or floating; any H and W.

        Returns:
          `features`, [B, F] float32.
        """
        chex.assert_shape(images, (None, None, None, 3))
        config, batch = self.config, len(images)
        width, patch = config.hidden_size, config.patch_size
        grid = SIDE // patch
        x = resize.resize_as_pillow(images, SIDE) / 255.0
        mean, deviation = (np.array(m, np.float32) for m in (MEAN, DEVIATION))
        x = (x - mean[None, None, None]) / deviation[None, None, None]
        # A convolution with stride = kernel = patch, as a matrix product.
        x = x.reshape(batch, grid, patch, grid, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        x = _dense(width, 'patches')(x.reshape(batch, grid**2, 3 * patch**2))
        token = self.param('class_token', nn.initializers.zeros, (1, width))
        x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, width)), x], axis=1)
        shape = (grid**2 + 1, width)
        x = x + self.param('positions', nn.initializers.normal(0.02), shape)[None]
        x, _ = nn.scan(
            Block,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            length=config.num_hidden_layers,
        )(config, name='blocks')(x, None)
        norm = nn.LayerNorm(epsilon=config.layer_norm_eps, name='norm')
        return {'features': norm(x[:, 0])}


class Block(nn.Module):
    """A layer of the transformer, for nn.scan."""

    config: Config

    @nn.compact
    def __call__(self, x, _):
        config = self.config
        batch, tokens, width = x.shape

        def scaled(name, y):
            return y * self.param(name, nn.initializers.ones, (width,))[None, None]

        h = nn.LayerNorm(epsilon=config.layer_norm_eps, name='norm1')(x)
        shape = (batch, tokens, config.num_attention_heads, -1)
        query, key, value = (
            _dense(width, name)(h).reshape(shape) for name in ATTENTION
        )
        scores = jnp.einsum('bqhd,bkhd->bhqk', query, key, precision='highest')
        weights = jax.nn.softmax(scores / query.shape[-1] ** 0.5, axis=-1)
        h = jnp.einsum('bhqk,bkhd->bqhd', weights, value, precision='highest')
        h = _dense(width, 'projection')(h.reshape(batch, tokens, width))
        x = x + scaled('scale1', h)

        h = nn.LayerNorm(epsilon=config.layer_norm_eps, name='norm2')(x)
        if config.use_swiglu_ffn:
            h = _dense(2 * config.mlp_width, 'mlp_in')(h)
            gate, h = jnp.split(h, 2, axis=-1)
            h = nn.silu(gate) * h
        else:
            h = nn.gelu(_dense(config.mlp_width, 'mlp_in')(h), approximate=False)
        h = _dense(width, 'mlp_out')(h)
        # nn.scan expects a second result.
        return x + scaled('scale2', h), None


def _dense(features, name):
    # The default precision of accelerators is too low for a metric.
    return nn.Dense(features, precision='highest', name=name)
