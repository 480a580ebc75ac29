"""Names and shapes of the tensors in a file, compared with those of a network."""

from collections.abc import Iterable, Mapping
from typing import Any

MAX_LISTED = 3  # Names in a message.


def require(tensors: Mapping[str, Any], name: str, rank: int, network: str):
    """The tensor of that name, with `rank` axes.

    Raises:
      ValueError: the tensor is missing or has the wrong number of axes.
    """
    if name in tensors and len(tensors[name].shape) == rank:
        return tensors[name]
    if name in tensors:
        problem = f'{name} has the shape {tuple(tensors[name].shape)}, not {rank} axes'
    else:
        problem = f'there is no tensor {name} among {_listed(tensors)}'
    raise ValueError(f'{problem}; give the weights of {network}')


def check(
    given: Mapping[str, Any],
    expected: Mapping[str, Any],
    *,
    network: str,
    source: str = 'the file',
    advice: str = 'give the weights of that network',
) -> None:
    """Compares the tensors of a file with those that a network takes.

    Args:
      given: name to shape, or to any description that can be compared and printed.
      expected: the same for the network.
      network: description of the network, for the message.
      source: description of the file, for the message.
      advice: last part of the message.

    Raises:
      ValueError: a tensor is missing, unknown or of the wrong shape.
    """
    different = [
        f'{name} is {given[name]}, expected {expected[name]}'
        for name in expected
        if name in given and given[name] != expected[name]
    ]
    problems = {
        'missing': expected.keys() - given.keys(),
        'unknown': given.keys() - expected.keys(),
        'of the wrong shape': different,
    }
    found = [
        f'{len(names)} {kind}: {_listed(names)}'
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise ValueError(
            f'{source} does not fit {network} ({"; ".join(found)}); {advice}'
        )


def count(names: Iterable[str], prefix: str, suffix: str) -> int:
    """Number of names with this prefix and suffix, such as layers of a network."""
    return sum(name.startswith(prefix) and name.endswith(suffix) for name in names)


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f' and {len(names) - MAX_LISTED} more' if len(names) > MAX_LISTED else ''
    return ', '.join(names[:MAX_LISTED]) + more if names else 'none'
