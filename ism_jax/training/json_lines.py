"""The records of a run as lines of JSON, for other programs."""

from collections.abc import Mapping
import json
import math
from pathlib import Path
import time
from typing import Any

import numpy as np

NAME = 'log.jsonl'


class JsonLines:
    """Appends to `log.jsonl`; every line reaches the file before a call returns.

    A line has `time` (seconds since 1970) and either `config` and `commit`, or `step`
    and scalars, or `step` and `picture`, a name in `grids/`. Values that are not finite
    are null. A resumed run repeats the steps since its checkpoint.

    Args:
      workdir: folder of the run.
    """

    def __init__(self, workdir: Path):
        path = workdir / NAME
        self._file = path.open('a+b')
        # A killed run may have left a part of a line.
        content = path.read_bytes()
        self._file.truncate(content.rfind(b'\n') + 1)

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
