"""The published weights of FID's Inception network."""

from collections.abc import Mapping

import numpy as np

from ism_jax.interchange import named_tensors
from ism_jax.models import inception

# pt_inception-2015-12-05-6726825d.pth of pytorch-fid, which torch-fidelity publishes as
# weights-inception-2015-12-05-6726825d.pth.
PUBLISHED_URL = (
    'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
    'pt_inception-2015-12-05-6726825d.pth'
)
PUBLISHED_SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'


def params_from_tensors(tensors: Mapping[str, np.ndarray]) -> dict:
    """Parameters of `inception.Inception` from the tensors of the published file.

    Args:
      tensors: name to array, as from `tensor_file.read`.

    Raises:
      ValueError: a tensor is missing, unknown or of the wrong shape.
    """
    expected = named_tensors.abstract_params(inception.Inception())
    tensors = named_tensors.NamedTensors(tensors, 'Inception of 2015-12-05')

    def convert(tree, name):
        if 'conv' in tree:
            layer = tensors.folded_convolution(
                f'{name}.conv', f'{name}.bn', inception.EPSILON
            )
            return {'conv': layer}
        return {child: convert(tree[child], f'{name}.{child}') for child in tree}

    layers = [layer for layer in expected if layer != 'fc']
    params = {layer: convert(expected[layer], layer) for layer in layers}
    params['fc'] = {'kernel': tensors.dense('fc')['kernel']}
    tensors.check(params, expected)
    return params
