"""FLOPs of the matrix products and convolutions of a function, from its trace."""

from collections.abc import Callable
import math

import jax
from jax.extend import core


def count_flops(function: Callable, *args) -> int:
    """FLOPs of one call; `args` are arrays or their `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: a loop of unknown length contains matrix products.
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
                'a while loop of unknown length contains matrix products; count a '
                'function without it'
            )
        else:
            total += sum(inner)
    return total


def _jaxprs(params):
    """The jaxprs that a primitive calls."""
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part
