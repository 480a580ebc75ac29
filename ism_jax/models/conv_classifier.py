"""A small convolutional classifier, whose features measure samples of small images.

It stands in for Inception where images are digits or icons rather than photographs:
a Frechet distance of its features is never to be called FID.
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
      num_features: width F of the features. Kept small, so that a covariance of
        [F, F] is well determined by a thousand samples.
    """

    num_classes: int
    widths: Sequence[int] = (16, 32, 64)
    num_features: int = 64

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Features and logits of images.

        Args:
          images: [B, S, S, C] in [-1, 1], S divisible by 4.

        Returns:
          `features`, [B, F] float32, before their nonlinearity (a rectified feature
          that never fires would make the covariance singular), and `logits`,
          [B, num_classes] float32.

        Raises:
          ValueError: images are not square, or their side is not divisible by 4.
        """
        _, height, width, _ = images.shape
        if height != width or height % 4:
            raise ValueError(
                f'images have shape {images.shape}; the classifier takes '
                '[B, S, S, C] with S divisible by 4: crop or pad them to that'
            )
        x = images.astype(jnp.float32)
        for channels, stride in zip(self.widths, (2, 2, 1)):
            # An accelerator would round to bfloat16, and a metric must not.
            x = nn.Conv(channels, (3, 3), strides=stride, precision='highest')(x)
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        features = nn.Dense(self.num_features, precision='highest')(x)
        logits = nn.Dense(self.num_classes, precision='highest')(nn.relu(features))
        return {'features': features, 'logits': logits}
