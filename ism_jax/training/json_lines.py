"""The records of a run as lines of JSON, for other programs."""

from collections.abc import Mapping
import json
import math
import time
from typing import Any

import numpy as np

from ism_jax.runtime import bucket_file, paths

NAME = 'records.jsonl'


class JsonLines:
    """Appends to `records.jsonl`; every line reaches the file before a call returns.

    A line has `time` (seconds since 1970) and either `config` and `commit`, or `step`
    and scalars, or `step` and `picture`, a name in `grids/`. Values that are not finite
    are null. A resumed run repeats the steps since its checkpoint. In a bucket, there
    are several files, `records.TIME.NUMBER.jsonl`, one after the other.

    Args:
      workdir: folder of the run.
    """

    def __init__(self, workdir: paths.Path):
        self._workdir, self._start, self._files = workdir, int(time.time()), 0
        self._open()

    def _open(self):
        path = self._workdir / NAME
        if paths.is_bucket(path):
            path = self._workdir / f'records.{self._start}.{self._files:05d}.jsonl'
        self._file = bucket_file.open_to_append(path)
        self._files += 1
        if not paths.is_bucket(path):
            # A killed run may have left a part of a line.
            self._file.truncate(path.read_bytes().rfind(b'\n') + 1)

    def settings(self, config: Mapping[str, Any], commit: str) -> None:
        """Writes the resolved config and the commit."""
        self._write(config=dict(config), commit=commit)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars by name."""
        finite = {n: v if math.isfinite(v) else None for n, v in values.items()}
        self._write(step=step, **finite)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes the name of a picture."""
        del image
        self._write(step=step, picture=f'{name}_{step:08d}.png')

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, **record) -> None:
        line = json.dumps({'time': time.time()} | record) + '\n'
        self._file.write(line.encode())
        self._file.flush()
        if bucket_file.is_full(self._file):
            self._open()
