"""A small convolutional classifier, whose features compare small images.

It replaces Inception for digits or icons, which are unlike photographs. A Frechet
distance of its features must not be called FID.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


class ConvClassifier(nn.Module):
    """Three convolutions, of strides 2, 2 and 1, then two dense layers.

    Attributes:
      num_classes: width of the logits.
      widths: channels of the three convolutions.
      num_features: width F of the features; small, so that a thousand samples
        determine a covariance [F, F] well.
    """

    num_classes: int
    widths: Sequence[int] = (16, 32, 64)
    num_features: int = 64

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Features and logits of images.

        Args:
          images: [B, H, W, C] in [-1, 1].

        Returns:
          `features`, [B, F] float32, before their nonlinearity (a rectified feature
          that is always 0 would make the covariance singular), and `logits`,
          [B, num_classes] float32.
        """
        x = images.astype(jnp.float32)
        for channels, stride in zip(self.widths, (2, 2, 1), strict=True):
            # By default an accelerator rounds to bfloat16, too coarse for a metric.
            x = nn.Conv(channels, (3, 3), strides=stride, precision='highest')(x)
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        features = nn.Dense(self.num_features, precision='highest')(x)
        logits = nn.Dense(self.num_classes, precision='highest')(nn.relu(features))
        return {'features': features, 'logits': logits}
