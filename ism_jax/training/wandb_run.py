"""Runs of Weights & Biases."""

from collections.abc import Mapping
import os
from typing import Any

import numpy as np

from ism_jax.runtime import files, paths

ID_FILE = 'wandb_run.txt'


class WandbRun:
    """A run of Weights & Biases, which a resumed run continues.

    Variables of the environment, such as WANDB_PROJECT and WANDB_MODE, set everything
    else. Charts have the training step as their axis.

    Args:
      workdir: folder of the run; W&B's files are in its `wandb`, or in that of the
        current folder if it is in a bucket, and the run's id in its `wandb_run.txt`.

    Raises:
      ValueError: W&B cannot start a run.
    """

    def __init__(self, workdir: paths.Path):
        import wandb

        path = workdir / ID_FILE
        try:
            self._run = wandb.init(
                project=os.environ.get('WANDB_PROJECT', 'ism_jax'),
                name=workdir.name,
                dir=None if paths.is_bucket(workdir) else workdir,
                id=path.read_text() if path.exists() else None,
                resume='allow',
            )
        except wandb.Error as error:
            raise ValueError(
                f'W&B cannot start a run ({error}); run `wandb login`, or set '
                'WANDB_MODE=offline'
            ) from error
        files.write_bytes(path, self._run.id.encode())
        # W&B's own step cannot decrease, which it does when a run resumes.
        self._run.define_metric('*', step_metric='step')

    def settings(self, config: Mapping[str, Any], commit: str) -> None:
        """Records the resolved config, which a resumed run may change, and commit."""
        self._run.config.update({**config, 'commit': commit}, allow_val_change=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records scalars by name."""
        self._run.log({'step': step, **values})

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Records a picture, uint8 [H, W, 1 or 3]."""
        import wandb

        self._run.log({'step': step, name: wandb.Image(image)})

    def close(self) -> None:
        """Uploads what is left and ends the run."""
        self._run.finish()
