"""Files that together hold one data set, found by a pattern."""

import glob
from pathlib import Path
import re

import braceexpand

from ism_jax.runtime.paths import local_path


def find_shards(pattern: str, name: str) -> list[Path]:
    """The files of a pattern, sorted.

    Args:
      pattern: path with wildcards (`*`, `?`, `**`) or braces (`{000..010}`, `{a,b}`).
      name: name of the pattern, for messages.

    Raises:
      ValueError: no file matches, a file of a brace is missing, or one of those that
        are numbered as in `train-00000-of-00004.parquet`.
    """
    paths, missing = set(), []
    for text in braceexpand.braceexpand(str(local_path(pattern, name))):
        found = glob.glob(text, recursive=True)
        paths.update(path for path in map(Path, found) if path.is_file())
        missing += [] if found else [text]
    missing += sorted(_numbered_like(paths) - set(map(str, paths)))
    if missing:
        raise ValueError(
            f'{missing[0]} does not exist ({len(missing)} missing of '
            f'{name}:{pattern}); copy or download it again, or correct the pattern'
        )
    return sorted(paths)


def _numbered_like(paths: set[Path]) -> set[str]:
    """All shards of the sets of which `paths` has members, by their numbers."""
    expected = set()
    for path in paths:
        if numbered := re.fullmatch(r'(.*-)(\d+)(-of-)(\d+)(.*)', str(path)):
            start, number, middle, count, end = numbered.groups()
            expected |= {
                f'{start}{i:0{len(number)}d}{middle}{count}{end}'
                for i in range(int(count))
            }
    return expected
