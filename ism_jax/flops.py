"""Counts the multiplications of a traced function, without running it.

Only matrix products and convolutions are counted, two operations for each
multiplication and addition, as is the custom when the use of a machine is stated
(Chowdhery et al. 2022, arXiv 2204.02311, appendix B). A scan counts as often as it
runs, which XLA's own analysis of costs does not do.
"""

from collections.abc import Callable
import math

import jax
from jax.extend import core


def count(function: Callable, *args) -> int:
    """Operations of one call.

    Args:
      function: of arrays.
      *args: arrays, or their shapes (`jax.ShapeDtypeStruct`).

    Raises:
      ValueError: products in a loop whose length is not known.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inner = [_count(part) for part in _jaxprs(params)]
        if name == 'dot_general':
            contracted, _ = params['dimension_numbers'][0]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += 2 * equation.outvars[0].aval.size * depth
        elif name == 'conv_general_dilated':
            kernel = equation.invars[1].aval
            features = kernel.shape[params['dimension_numbers'].rhs_spec[0]]
            total += 2 * equation.outvars[0].aval.size * kernel.size // features
        elif name == 'scan':
            total += params['length'] * sum(inner)
        elif name == 'cond':
            total += max(inner)
        elif name == 'while' and sum(inner):
            raise ValueError(
                'there are products in a while loop, which runs nobody knows how '
                'often; count a function without it'
            )
        else:
            total += sum(inner)
    return total


def _jaxprs(params):
    """All that a primitive calls."""
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part
