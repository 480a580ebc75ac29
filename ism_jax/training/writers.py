"""The writers that record a run: TensorBoard, a file of JSON lines, W&B and MLflow.

All have the same methods; each is imported only when a run names it:

    writer.settings(config, commit)     values by dotted name, once for each start
    writer.scalars(step, values)        scalars by name
    writer.picture(step, name, image)   a grid of samples, uint8 [H, W, 1 or 3]
    writer.close()
"""

import importlib
import importlib.util
from typing import Any, NamedTuple

import jax

from ism_jax.runtime import paths, provenance


class _Kind(NamedTuple):
    """Where a writer is defined, the package that it needs, and its pip name."""

    module: str
    writer: str
    package: str | None = None
    distribution: str | None = None


KINDS = {
    'tensorboard': _Kind('event_file', 'EventFile'),
    'jsonl': _Kind('json_lines', 'JsonLines'),
    'wandb': _Kind('wandb_run', 'WandbRun', 'wandb', 'wandb'),
    'mlflow': _Kind('mlflow_run', 'MlflowRun', 'mlflow', 'mlflow'),
}


def names_in(text: str) -> tuple[str, ...]:
    """The names in 'tensorboard,wandb'."""
    return tuple(name.strip() for name in text.split(',') if name.strip())


def missing_distribution(name: str) -> str | None:
    """The package that `pip` must install for a writer; None if nothing is missing."""
    kind = KINDS[name]
    if kind.package is None:
        return None
    spec = importlib.util.find_spec(kind.package)
    # A folder `wandb` of another run would be found too, but has no origin.
    return None if spec is not None and spec.origin else kind.distribution


def open_writers(text: str, workdir, config: dict[str, Any]) -> list[Any]:
    """Opens writers on the first process; the others have none.

    Args:
      text: names in `KINDS`, joined by commas.
      workdir: folder of the run; the name of its last part names the run in trackers.
      config: the resolved config, values by dotted name.

    Raises:
      ValueError: a tracker cannot be reached.
    """
    if jax.process_index():
        return []
    opened = []
    for name in names_in(text):
        module = importlib.import_module(f'ism_jax.training.{KINDS[name].module}')
        opened.append(getattr(module, KINDS[name].writer)(paths.to_path(workdir)))
        opened[-1].settings(config, provenance.commit())
    return opened
