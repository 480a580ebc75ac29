"""The Inception network that FID, sFID and the Inception score are defined by.

Szegedy et al. 2015 (arXiv 1512.00567), in the TensorFlow graph of 2015-12-05 that
Heusel et al. (arXiv 1706.08500) measure with, by the weights that pytorch-fid and
torch-fidelity publish of it. What differs from other Inception networks: images are
resized without half pixels as TensorFlow 1 did, x becomes (x - 128) / 128, padding does
not count in average pools, the last block pools by maximum, there are 1008 logits.

The names of the layers are those of the published file.
"""

from collections.abc import Callable, Mapping

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.models import named_tensors

SIDE = 299  # Pixels that the network takes.
NUM_FEATURES = 2048
NUM_SPATIAL = 17 * 17 * 7
NUM_LOGITS = 1008
EPSILON = 1e-3  # Of the batch norms.
# Of pt_inception-2015-12-05-6726825d.pth (pytorch-fid) and, the same file,
# weights-inception-2015-12-05-6726825d.pth (torch-fidelity).
PUBLISHED_URL = (
    'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
    'pt_inception-2015-12-05-6726825d.pth'
)
PUBLISHED_SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'


class Inception(nn.Module):
    """The network, up to the logits."""

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Features of images.

        Args:
          images: [B, H, W, 3], 0 .. 255, uint8 or floating; any H and W.

        Returns:
          float32: `features`, [B, 2048], the last average pool ("pool_3:0"), for FID;
          `spatial`, [B, 2023], the first 7 channels of 17 x 17 places in the first
          branch of Mixed_6d ("mixed_6/conv:0"), with places as the slower axes, for
          sFID; `unbiased_logits`, [B, 1008], the logits without their bias, for the
          Inception score.

        Raises:
          ValueError: images of another shape.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f'images have shape {images.shape}; Inception takes [B, H, W, 3]: '
                'repeat a grey channel three times'
            )
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
        # The bias of `fc` is never used: the Inception score is defined without it.
        logits = nn.Dense(NUM_LOGITS, use_bias=False, precision='highest', name='fc')
        return {
            'features': features,
            'spatial': spatial.reshape(len(images), NUM_SPATIAL),
            'unbiased_logits': logits(features),
        }


class Convolution(nn.Module):
    """A convolution, its batch norm folded into it, and a rectifier.

    Attributes:
      channels: that it makes.
      kernel: its height and width.
      stride: of both directions.
      padding: 'SAME' or 'VALID'.
    """

    channels: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = 'SAME'

    @nn.compact
    def __call__(self, x):
        strides = (self.stride, self.stride)
        # An accelerator would round to bfloat16, and a metric must not.
        layer = nn.Conv(
            self.channels, self.kernel, strides, self.padding, precision='highest',
            name='conv',
        )  # fmt: skip
        return nn.relu(layer(x))


class BlockA(nn.Module):
    """35 x 35 places, figure 5 of the paper with 5 x 5 kernels kept."""

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
    """35 x 35 to 17 x 17 places, figure 10 of the paper."""

    @nn.compact
    def __call__(self, x):
        a = Convolution(384, (3, 3), 2, 'VALID', name='branch3x3')(x)
        b = Convolution(64, (1, 1), name='branch3x3dbl_1')(x)
        b = Convolution(96, (3, 3), name='branch3x3dbl_2')(b)
        b = Convolution(96, (3, 3), 2, 'VALID', name='branch3x3dbl_3')(b)
        return jnp.concatenate([a, b, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)


class BlockC(nn.Module):
    """17 x 17 places, figure 6 of the paper; also returns its first branch."""

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
    """17 x 17 to 8 x 8 places."""

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
    """8 x 8 places, figure 7 of the paper.

    Attributes:
      pool: of the last branch; in this graph the two blocks have different ones.
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
    """Bilinear resize whose pixel i of the result lies at i H / side of the image.

    So the top left corners of both coincide and not their centres: `align_corners` and
    `half_pixel_centers` of TensorFlow are both false. Nothing is smoothed before
    shrinking.

    Args:
      images: [B, H, W, C] float32.
      side: of the result.

    Returns:
      [B, side, side, C] float32.
    """

    def places(size):
        # Rounded as there, in float32.
        position = np.arange(side, dtype=np.float32) * np.float32(size / side)
        low = position.astype(np.int32)
        return low, np.minimum(low + 1, size - 1), position - low

    top, bottom, down = places(images.shape[1])
    left, right, across = places(images.shape[2])
    columns_left, columns_right = images[:, :, left], images[:, :, right]
    rows = columns_left + (columns_right - columns_left) * across[None, None, :, None]
    upper, lower = rows[:, top], rows[:, bottom]
    return upper + (lower - upper) * down[None, :, None, None]


def params_from_tensors(tensors: Mapping[str, np.ndarray]) -> dict:
    """Parameters from the tensors of the published file.

    Args:
      tensors: name to array, as `tensor_file.read` gives them.

    Raises:
      ValueError: tensors of another network; one of them is named.
    """
    network = 'Inception of 2015-12-05'
    expected = named_tensors.abstract_params(
        Inception(), jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    )
    tensors = named_tensors.NamedTensors(tensors, network)

    def fill(tree, name):
        if 'conv' in tree:
            folded = tensors.folded_convolution(f'{name}.conv', f'{name}.bn', EPSILON)
            return {'conv': folded}
        return {child: fill(tree[child], f'{name}.{child}') for child in tree}

    layers = [layer for layer in expected if layer != 'fc']
    params = {layer: fill(expected[layer], layer) for layer in layers}
    params['fc'] = {'kernel': tensors.dense('fc')['kernel']}
    tensors.check_all_taken()
    named_tensors.check_shapes(params, expected, network)
    return params


def _average_pool(x):
    return nn.avg_pool(x, (3, 3), (1, 1), 'SAME', count_include_pad=False)


def _max_pool(x):
    return nn.max_pool(x, (3, 3), (1, 1), 'SAME')
