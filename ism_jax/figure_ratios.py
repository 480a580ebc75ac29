"""Ratios of the figures of two JSON records, such as those of `ism_jax.benchmark`.

They show what a change of a program or kernel does to time, memory, FLOPs and bytes.
"""

from collections.abc import Iterator
import json
from pathlib import Path
from typing import Any

# What tells the records of a list apart.
KEYS = ('name', 'kind', 'content', 'dtype')


def read(path: Path) -> dict[str, Any]:
    """The record in a file.

    Raises:
      ValueError: the file is not a JSON object.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f'{path} is not a JSON file: {error}') from error
    if not isinstance(found, dict):
        raise ValueError(
            f'{path} is no record: give a file that --out or --plan_out wrote'
        )
    return found


def figures(record: Any, name: str = '') -> Iterator[tuple[str, float]]:
    """The names and values of all numbers in a record, in its order."""
    if isinstance(record, dict):
        for key, value in record.items():
            yield from figures(value, f'{name}, {key}' if name else key)
    elif isinstance(record, list):
        for number, value in enumerate(record):
            key = str(number)
            if isinstance(value, dict):
                key = ' '.join(value[k] for k in KEYS if k in value) or key
            yield from figures(value, f'{name}, {key}')
    elif isinstance(record, (int, float)) and not isinstance(record, bool):
        yield name, record


def table(record: dict, against: dict) -> str:
    """The figures that differ between two records, with their ratio.

    Args:
      record: the newer one.
      against: the older one, which the ratios are relative to.
    """
    new, old = dict(figures(record)), dict(figures(against))
    rows = [
        (name, f'{old[name]:.6g}', f'{new[name]:.6g}', f'{new[name] / old[name]:.3f}')
        for name in new
        if name in old and new[name] != old[name] and old[name]
    ]
    rows += [(name, f'{old[name]:.6g}', '', '') for name in old if name not in new]
    rows += [(n, '', f'{new[n]:.6g}', '') for n in new if not old.get(n) and new[n]]
    if not rows:
        return 'no figure differs'
    width = max(len(row[0]) for row in rows)
    head = ('', 'against', 'now', 'ratio')
    return '\n'.join(
        f'{name:{width}}{a:>14}{b:>14}{ratio:>8}' for name, a, b, ratio in (head, *rows)
    )
