"""Tensors of a PyTorch network by name, converted to parameters of a Linen network.

Convolutions and dense layers are transposed, and a batch norm that follows a
convolution is folded into it. At inference both together are one affine map,

    gamma (conv(x) - mean) / sqrt(variance + epsilon) + beta
"""

from collections.abc import Mapping

import flax
import jax
import numpy as np

from ism_jax.interchange import tensor_shapes


class NamedTensors:
    """Named tensors, each of which must be taken exactly once.

    Args:
      tensors: name to array, as from `tensor_file.read`.
      network: name of their network, for messages.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], network: str):
        self._tensors = dict(tensors)
        self._network = network

    def take(self, name: str, rank: int = 1) -> np.ndarray:
        """The tensor as float32.

        Raises:
          ValueError: it is missing or has the wrong number of axes.
        """
        tensor = tensor_shapes.require(self._tensors, name, rank, self._network)
        del self._tensors[name]
        return np.asarray(tensor, np.float32)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def dense(self, name: str) -> dict[str, np.ndarray]:
        """Kernel [in, out] and bias [out] of a dense layer."""
        kernel = self.take(f'{name}.weight', 2).T
        return {'kernel': kernel, 'bias': self.take(f'{name}.bias')}

    def layer_norm(self, name: str) -> dict[str, np.ndarray]:
        """Scale and bias, [F], of a layer norm."""
        return {'scale': self.take(f'{name}.weight'), 'bias': self.take(f'{name}.bias')}

    def folded_convolution(
        self, name: str, norm: str, epsilon: float
    ) -> dict[str, np.ndarray]:
        """Kernel [H, W, in, out] and bias [out] of a convolution with its batch norm.

        Args:
          name: name of the convolution, which has no bias.
          norm: name of the batch norm.
          epsilon: added to the variance by the batch norm.

        Raises:
          ValueError: a tensor is missing, or a variance is negative.
        """
        kernel = self.take(f'{name}.weight', 4).transpose(2, 3, 1, 0)
        gamma, beta, mean, variance = (
            self.take(f'{norm}.{part}').astype(np.float64)
            for part in ('weight', 'bias', 'running_mean', 'running_var')
        )
        if (variance < 0).any():
            raise ValueError(
                f'{norm}.running_var has the negative variance {variance.min():g}; the '
                'file is damaged, download it again'
            )
        scale = gamma / np.sqrt(variance + epsilon)
        # Folded in float64; the network computes in float32.
        kernel = kernel.astype(np.float64) * scale[None, None, None]
        return {
            'kernel': kernel.astype(np.float32),
            'bias': (beta - mean * scale).astype(np.float32),
        }

    def check(self, params, expected) -> None:
        """Checks that all tensors were taken and that the parameters are complete.

        Args:
          params: nested dict of arrays.
          expected: tree of `jax.ShapeDtypeStruct`, see `abstract_params`.

        Raises:
          ValueError: a tensor is left over, or a parameter is missing or of the wrong
            shape.
        """

        def shapes(tree):
            leaves = flax.traverse_util.flatten_dict(tree, sep='/')
            return {name: tuple(leaf.shape) for name, leaf in leaves.items()}

        tensor_shapes.check(
            shapes(params) | shapes(self._tensors),
            shapes(expected),
            network=self._network,
        )


def abstract_params(module) -> dict:
    """Shapes of the parameters of a network of images, without allocating any."""
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), np.uint8)
    return jax.eval_shape(module.init, jax.random.key(0), image)['params']
