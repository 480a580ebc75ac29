"""The potentials of semidiscrete transport, kept in the folder of the run."""

from collections.abc import Callable
import json
import time
from typing import Any
import zipfile

import jax
import numpy as np

from ism_jax.runtime import files, paths

NAME = 'potentials.npz'
_POLL_SECONDS = 0.5


def load_or_learn(
    workdir,
    settings: dict[str, Any],
    learn: Callable[[], tuple[np.ndarray, dict[str, float]]],
    log: Callable[[str], Any],
) -> np.ndarray:
    """The potentials [N] of a run with these settings, learned if it has none yet.

    The first process learns and writes them; the others wait for its file. So all
    processes, and a resumed run, use the same bits.

    Args:
      workdir: folder of the run, which all processes share.
      settings: what the potentials depend on, JSON-able; potentials that were learned
        with others are replaced.
      learn: returns potentials and a report, see `semidiscrete.fit_potentials`.
      log: called with a line of text.
    """
    path = paths.to_path(workdir) / NAME
    while (potentials := _read(path, settings, log)) is None:
        if jax.process_index():
            time.sleep(_POLL_SECONDS)
            continue
        started = time.monotonic()
        potentials, report = learn()
        files.write_npz(
            path, potentials=potentials, settings=json.dumps(settings), **report
        )
        log(
            f'transport: learned {len(potentials):,} potentials in '
            f'{time.monotonic() - started:.0f} s; hit rates vary by '
            f'{100 * report["hit_error"]:.1f} % within classes, and the cost is '
            f'{report["cost_ratio"]:.3f} of that of independent pairs'
        )
    return potentials


def _read(path: paths.Path, settings: dict[str, Any], log) -> np.ndarray | None:
    """The potentials in a file; None if missing, damaged or for other settings."""
    try:
        with files.open_npz(path) as content:
            if json.loads(str(content['settings'])) == settings:
                return content['potentials']
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log(f'{path} is damaged ({error}); learning the potentials again')
    return None
