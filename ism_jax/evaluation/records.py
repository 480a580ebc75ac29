"""Evaluation records as JSON files."""

from collections.abc import Mapping, Sequence
import math

from ism_jax.runtime import files


def write_records(path, records: Sequence[Mapping] | Mapping) -> None:
    """Writes a list of records, or a single one, as JSON, atomically.

    NumPy scalars become numbers. NaN and infinities, which JSON lacks, become null.

    Raises:
      TypeError: a value is not a number, string, list or dict.
    """
    files.write_json(path, _plain(records), allow_nan=False)


def _plain(value):
    """Converts a value to the types of JSON."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, 'item'):  # NumPy and JAX scalars.
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
