"""Files that together hold one data set, found by a pattern."""

from collections.abc import Sequence
import re

import braceexpand

from ism_jax.runtime import paths


def find_shards(
    pattern: str, name: str, schemes: Sequence[str] = ()
) -> list[paths.Path]:
    """The files of a pattern, sorted.

    Args:
      pattern: path with wildcards (`*`, `?`, `**`) or braces (`{000..010}`, `{a,b}`).
      name: name of the pattern, for messages.
      schemes: the buckets that may hold the files, of `paths.CLIENTS`.

    Raises:
      ValueError: no file matches, a file of a brace is missing, or one of those that
        are numbered as in `train-00000-of-00004.parquet`.
    """
    files, missing = set(), []
    for text in braceexpand.braceexpand(str(paths.from_user(pattern, name, schemes))):
        found = paths.find(text)
        files.update(found)
        missing += [] if found else [text]
    missing += sorted(_numbered_like(files) - set(map(str, files)))
    if missing:
        raise ValueError(
            f'{missing[0]} does not exist ({len(missing)} missing of '
            f'{name}:{pattern}); copy or download it again, or correct the pattern'
        )
    return sorted(files)


def _numbered_like(files: set[paths.Path]) -> set[str]:
    """All shards of the sets of which `files` has members, by their numbers."""
    expected = set()
    for path in files:
        if numbered := re.fullmatch(r'(.*-)(\d+)(-of-)(\d+)(.*)', str(path)):
            start, number, middle, count, end = numbered.groups()
            expected |= {
                f'{start}{i:0{len(number)}d}{middle}{count}{end}'
                for i in range(int(count))
            }
    return expected
