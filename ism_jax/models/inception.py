"""The Inception network that defines FID, sFID and the Inception score.

Szegedy et al. 2015 (arXiv 1512.00567), as in the TensorFlow graph of 2015-12-05 that
Heusel et al. (arXiv 1706.08500) use. Differences from other Inception networks: images
are resized without half-pixel centres as in TensorFlow 1, x becomes (x - 128) / 128,
average pools do not count padding, the last block has a max pool, and there are 1008
logits.

Layers have the names of the published file, see `interchange.inception_weights`.
"""

from collections.abc import Callable

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIDE = 299  # Images are resized to this side.
NUM_SPATIAL = 17 * 17 * 7
NUM_LOGITS = 1008
EPSILON = 1e-3  # Of the batch norms, which are folded into the weights.


class Inception(nn.Module):
    """The network up to the logits."""

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Features of images.

        Args:
          images: [B, H, W, 3], 0 .. 255, uint8 or floating; any H and W.

        Returns:
          float32 arrays: `features`, [B, 2048], the last average pool ("pool_3:0"),
          for FID; `spatial`, [B, 2023], the first 7 channels of the first branch of
          Mixed_6d ("mixed_6/conv:0"), flattened from [17, 17, 7], for sFID;
          `unbiased_logits`, [B, 1008], the logits without bias, for the Inception
          score.
        """
        chex.assert_shape(images, (None, None, None, 3))
        x = resize_as_tensorflow1(images.astype(jnp.float32), SIDE)
        x = (x - 128.0) / 128.0
        x = Convolution(32, (3, 3), 2, 'VALID', name='Conv2d_1a_3x3')(x)
        x = Convolution(32, (3, 3), 1, 'VALID', name='Conv2d_2a_3x3')(x)
        x = Convolution(64, (3, 3), name='Conv2d_2b_3x3')(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = Convolution(80, (1, 1), name='Conv2d_3b_1x1')(x)
        x = Convolution(192, (3, 3), 1, 'VALID', name='Conv2d_4a_3x3')(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        for name, pool_channels in (('5b', 32), ('5c', 64), ('5d', 64)):
            x = BlockA(pool_channels, name=f'Mixed_{name}')(x)
        x = BlockB(name='Mixed_6a')(x)
        for name, channels in (('6b', 128), ('6c', 160), ('6d', 160), ('6e', 192)):
            x, first_branch = BlockC(channels, name=f'Mixed_{name}')(x)
            if name == '6d':
                spatial = first_branch[..., :7]
        x = BlockD(name='Mixed_7a')(x)
        x = BlockE(_average_pool, name='Mixed_7b')(x)
        x = BlockE(_max_pool, name='Mixed_7c')(x)
        features = x.mean((1, 2))
        # The Inception score is defined without the bias.
        logits = nn.Dense(NUM_LOGITS, use_bias=False, precision='highest', name='fc')
        return {
            'features': features,
            'spatial': spatial.reshape(len(images), NUM_SPATIAL),
            'unbiased_logits': logits(features),
        }


class Convolution(nn.Module):
    """A convolution with its folded batch norm, and a ReLU.

    Attributes:
      channels: channels of the output.
      kernel: height and width of the kernel.
      stride: stride in both directions.
      padding: 'SAME' or 'VALID'.
    """

    channels: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = 'SAME'

    @nn.compact
    def __call__(self, x):
        strides = (self.stride, self.stride)
        # The default precision of accelerators is too low for a metric.
        layer = nn.Conv(
            self.channels,
            self.kernel,
            strides,
            self.padding,
            precision='highest',
            name='conv',
        )
        return nn.relu(layer(x))


class BlockA(nn.Module):
    """Block at 35 x 35: figure 5 of the paper, with a 5 x 5 kernel."""

    pool_channels: int

    @nn.compact
    def __call__(self, x):
        a = Convolution(64, (1, 1), name='branch1x1')(x)
        b = Convolution(48, (1, 1), name='branch5x5_1')(x)
        b = Convolution(64, (5, 5), name='branch5x5_2')(b)
        c = Convolution(64, (1, 1), name='branch3x3dbl_1')(x)
        c = Convolution(96, (3, 3), name='branch3x3dbl_2')(c)
        c = Convolution(96, (3, 3), name='branch3x3dbl_3')(c)
        d = _average_pool(x)
        d = Convolution(self.pool_channels, (1, 1), name='branch_pool')(d)
        return jnp.concatenate([a, b, c, d], axis=-1)


class BlockB(nn.Module):
    """Block from 35 x 35 to 17 x 17: figure 10 of the paper."""

    @nn.compact
    def __call__(self, x):
        a = Convolution(384, (3, 3), 2, 'VALID', name='branch3x3')(x)
        b = Convolution(64, (1, 1), name='branch3x3dbl_1')(x)
        b = Convolution(96, (3, 3), name='branch3x3dbl_2')(b)
        b = Convolution(96, (3, 3), 2, 'VALID', name='branch3x3dbl_3')(b)
        return jnp.concatenate([a, b, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)


class BlockC(nn.Module):
    """Block at 17 x 17: figure 6 of the paper; also returns its first branch."""

    channels: int

    @nn.compact
    def __call__(self, x):
        width = self.channels
        a = Convolution(192, (1, 1), name='branch1x1')(x)
        b = Convolution(width, (1, 1), name='branch7x7_1')(x)
        b = Convolution(width, (1, 7), name='branch7x7_2')(b)
        b = Convolution(192, (7, 1), name='branch7x7_3')(b)
        c = Convolution(width, (1, 1), name='branch7x7dbl_1')(x)
        c = Convolution(width, (7, 1), name='branch7x7dbl_2')(c)
        c = Convolution(width, (1, 7), name='branch7x7dbl_3')(c)
        c = Convolution(width, (7, 1), name='branch7x7dbl_4')(c)
        c = Convolution(192, (1, 7), name='branch7x7dbl_5')(c)
        d = Convolution(192, (1, 1), name='branch_pool')(_average_pool(x))
        return jnp.concatenate([a, b, c, d], axis=-1), a


class BlockD(nn.Module):
    """Block from 17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x):
        a = Convolution(192, (1, 1), name='branch3x3_1')(x)
        a = Convolution(320, (3, 3), 2, 'VALID', name='branch3x3_2')(a)
        b = Convolution(192, (1, 1), name='branch7x7x3_1')(x)
        b = Convolution(192, (1, 7), name='branch7x7x3_2')(b)
        b = Convolution(192, (7, 1), name='branch7x7x3_3')(b)
        b = Convolution(192, (3, 3), 2, 'VALID', name='branch7x7x3_4')(b)
        return jnp.concatenate([a, b, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)


class BlockE(nn.Module):
    """Block at 8 x 8: figure 7 of the paper.

    Attributes:
      pool: pooling of the last branch; it differs between the two blocks of this graph.
    """

    pool: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
        a = Convolution(320, (1, 1), name='branch1x1')(x)
        b = Convolution(384, (1, 1), name='branch3x3_1')(x)
        b1 = Convolution(384, (1, 3), name='branch3x3_2a')(b)
        b2 = Convolution(384, (3, 1), name='branch3x3_2b')(b)
        c = Convolution(448, (1, 1), name='branch3x3dbl_1')(x)
        c = Convolution(384, (3, 3), name='branch3x3dbl_2')(c)
        c1 = Convolution(384, (1, 3), name='branch3x3dbl_3a')(c)
        c2 = Convolution(384, (3, 1), name='branch3x3dbl_3b')(c)
        d = Convolution(192, (1, 1), name='branch_pool')(self.pool(x))
        return jnp.concatenate([a, b1, b2, c1, c2, d], axis=-1)


def resize_as_tensorflow1(images: jax.Array, side: int) -> jax.Array:
    """Bilinear resize where output pixel i samples the image at i H / side.

    TensorFlow's `align_corners` and `half_pixel_centers` are both false: the top left
    corners coincide, not the centres. There is no antialiasing.

    From [B, H, W, C] to [B, side, side, C], float32.
    """

    def samples(size):
        # In float32, as in TensorFlow.
        position = np.arange(side, dtype=np.float32) * np.float32(size / side)
        low = position.astype(np.int32)
        return low, np.minimum(low + 1, size - 1), position - low

    top, bottom, down = samples(images.shape[1])
    left, right, across = samples(images.shape[2])
    columns_left, columns_right = images[:, :, left], images[:, :, right]
    rows = columns_left + (columns_right - columns_left) * across[None, None, :, None]
    upper, lower = rows[:, top], rows[:, bottom]
    return upper + (lower - upper) * down[None, :, None, None]


def _average_pool(x):
    return nn.avg_pool(x, (3, 3), (1, 1), 'SAME', count_include_pad=False)


def _max_pool(x):
    return nn.max_pool(x, (3, 3), (1, 1), 'SAME')
