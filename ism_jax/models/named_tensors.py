"""The tensors of a PyTorch network by name, turned into parameters of a Linen one.

Convolutions and dense layers are transposed, and a batch norm that follows a
convolution is folded into it: at inference both together are one affine map,

    gamma (conv(x) - mean) / sqrt(variance + epsilon) + beta
"""

from collections.abc import Mapping

import flax
import jax
import numpy as np


class NamedTensors:
    """Tensors of which each is taken exactly once.

    Args:
      tensors: name to array, as `tensor_file.read` gives them.
      network: what they should be of, in words, for messages.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], network: str):
        self._tensors = dict(tensors)
        self._network = network

    def take(self, name: str) -> np.ndarray:
        """The tensor, float32.

        Raises:
          ValueError: there is none of that name.
        """
        if name not in self._tensors:
            raise ValueError(
                f'the weights have no tensor {name}, which {self._network} needs; '
                f'left are {_some(self._tensors)}: give the weights of that network'
            )
        return np.asarray(self._tensors.pop(name), np.float32)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def dense(self, name: str) -> dict[str, np.ndarray]:
        """Kernel [in, out] and bias [out] of a dense layer."""
        kernel = self.take(f'{name}.weight').T
        return {'kernel': kernel, 'bias': self.take(f'{name}.bias')}

    def layer_norm(self, name: str) -> dict[str, np.ndarray]:
        """Scale and bias, [F], of a layer norm."""
        return {'scale': self.take(f'{name}.weight'), 'bias': self.take(f'{name}.bias')}

    def convolution(self, name: str) -> dict[str, np.ndarray]:
        """Kernel [H, W, in, out] and bias [out] of a convolution."""
        kernel = self.take(f'{name}.weight').transpose(2, 3, 1, 0)
        return {'kernel': kernel, 'bias': self.take(f'{name}.bias')}

    def folded_convolution(
        self, name: str, norm: str, epsilon: float
    ) -> dict[str, np.ndarray]:
        """Kernel [H, W, in, out] and bias [out] of a convolution with its batch norm.

        Args:
          name: of the convolution, which has no bias.
          norm: of the batch norm.
          epsilon: that the batch norm adds to its variance.

        Raises:
          ValueError: a tensor is missing, or a variance is negative.
        """
        kernel = self.take(f'{name}.weight').transpose(2, 3, 1, 0).astype(np.float64)
        gamma, beta, mean, variance = (
            self.take(f'{norm}.{part}').astype(np.float64)
            for part in ('weight', 'bias', 'running_mean', 'running_var')
        )
        if (variance < 0).any():
            raise ValueError(
                f'{norm}.running_var has the value {variance.min():g}: a variance is '
                'at least 0; the weights are damaged, fetch them again'
            )
        scale = gamma / np.sqrt(variance + epsilon)
        # Products of these with images must not be of float64.
        return {
            'kernel': (kernel * scale[None, None, None]).astype(np.float32),
            'bias': (beta - mean * scale).astype(np.float32),
        }

    def check_all_taken(self) -> None:
        """Raises ValueError where a tensor is left over."""
        if self._tensors:
            raise ValueError(
                f'the weights have {len(self._tensors)} tensors that {self._network} '
                f'has not: {_some(self._tensors)}; give the weights of that network'
            )


def check_shapes(params, expected, network: str) -> None:
    """Compares parameters with what a network takes.

    Args:
      params: nested dict of arrays.
      expected: the same of `jax.ShapeDtypeStruct`, as `jax.eval_shape` gives it.
      network: in words.

    Raises:
      ValueError: a shape differs, or is missing; the first is named.
    """
    given = flax.traverse_util.flatten_dict(params, sep='/')
    wanted = flax.traverse_util.flatten_dict(expected, sep='/')
    for name in sorted(given.keys() | wanted.keys()):
        shapes = [getattr(tree.get(name), 'shape', None) for tree in (given, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f'the weights make {name} of shape {shapes[0]}, but {network} has '
                f'{shapes[1]}; give the weights of that network'
            )


def abstract_params(module, *example) -> dict:
    """Shapes of the parameters of a Linen module, without computing anything.

    Args:
      module: the network.
      example: arrays (or shapes) that it is called with.
    """
    return jax.eval_shape(module.init, jax.random.key(0), *example)['params']


def _some(names) -> str:
    names = sorted(names)
    more = f' and {len(names) - 3} more' if len(names) > 3 else ''
    return ', '.join(names[:3]) + more if names else 'none'
