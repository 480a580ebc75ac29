"""Runs of MLflow."""

from collections.abc import Mapping
import os
import time
from typing import Any

import numpy as np

from ism_jax.runtime import files, paths

ID_FILE = 'mlflow_run.txt'


class MlflowRun:
    """A run of MLflow, which a resumed run continues.

    MLFLOW_TRACKING_URI names the server, MLFLOW_EXPERIMENT_NAME the experiment. The
    config's fields are parameters. MLflow keeps the first value of a parameter, so a
    field that a resumed run changes becomes a tag.

    Args:
      workdir: folder of the run; the run's id is in its `mlflow_run.txt`.

    Raises:
      ValueError: the server cannot be used, or has lost the run.
    """

    def __init__(self, workdir: paths.Path):
        import mlflow

        path = workdir / ID_FILE
        self._client = mlflow.MlflowClient()
        try:
            if path.exists():
                self._id = path.read_text()
                self._client.update_run(self._id, status='RUNNING')
            else:
                run = self._client.create_run(self._experiment(), run_name=workdir.name)
                self._id = run.info.run_id
        except mlflow.exceptions.MlflowException as error:
            raise ValueError(
                f'MLflow cannot start or continue a run at {mlflow.get_tracking_uri()} '
                f'({error}); set MLFLOW_TRACKING_URI, and remove {path} to start a new '
                'run'
            ) from error
        files.write_bytes(path, self._id.encode())

    def _experiment(self) -> str:
        name = os.environ.get('MLFLOW_EXPERIMENT_NAME', 'ism_jax')
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)

    def settings(self, config: Mapping[str, Any], commit: str) -> None:
        """Records the resolved config and the commit."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self._id).data.params
        new, tags = [], {'mlflow.source.git.commit': commit}
        for name, value in config.items():
            if name not in known:
                new.append(Param(name, str(value)))
            elif known[name] != str(value):
                tags[name] = str(value)
        tags = [RunTag(name, value) for name, value in tags.items()]
        self._client.log_batch(self._id, params=new, tags=tags)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records scalars by name."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Records a picture, uint8 [H, W, 1 or 3]."""
        self._client.log_image(self._id, image, key=name, step=step, synchronous=True)

    def close(self) -> None:
        """Ends the run."""
        self._client.set_terminated(self._id)
