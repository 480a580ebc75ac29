"""Event files of TensorBoard, written without TensorFlow."""

from collections.abc import Mapping
import os
import socket
import time
from typing import Any

import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.summary.writer import record_writer

from ism_jax.runtime import bucket_file, paths
from ism_jax.sampling import image_grid


class EventFile:
    """An event file; every write reaches the file before it returns.

    In a bucket it is several files, one after the other.

    Args:
      workdir: folder of the run; new files are created in its `tensorboard`.
    """

    def __init__(self, workdir: paths.Path):
        self._folder = workdir / 'tensorboard'
        paths.make_folder(self._folder)
        # Names begin as TensorBoard expects and sort by time.
        name = f'events.out.tfevents.{int(time.time())}.{socket.gethostname()}'
        self._name, self._files = f'{name}.{os.getpid()}', 0
        self._open()

    def _open(self):
        path = self._folder / self._name
        if paths.is_bucket(path):
            path = self._folder / f'{self._name}.{self._files:05d}'
        self._file = bucket_file.open_to_append(path)
        self._files += 1
        self._records = record_writer.RecordWriter(self._file)
        version = event_pb2.Event(file_version='brain.Event:2', wall_time=time.time())
        self._records.write(version.SerializeToString())

    def settings(self, config: Mapping[str, Any], commit: str) -> None:
        """Writes the resolved config and the commit as hyperparameters."""
        values = {
            name: v if isinstance(v, (bool, int, float, str)) else str(v)
            for name, v in {**config, 'commit': commit}.items()
        }
        self._write(event_pb2.Event(summary=hparams_pb(values)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars by name."""
        summary = summary_pb2.Summary()
        for name, value in values.items():
            summary.MergeFrom(scalar_pb(name, value))
        self._write(event_pb2.Event(step=step, summary=summary))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a picture, uint8 [H, W, 1 or 3]."""
        height, width, channels = image.shape
        content = summary_pb2.Summary.Image(
            height=height,
            width=width,
            colorspace=channels,
            encoded_image_string=image_grid.png_bytes(image),
        )
        summary = summary_pb2.Summary()
        summary.value.add(tag=name, image=content)
        self._write(event_pb2.Event(step=step, summary=summary))

    def close(self) -> None:
        """Closes the file."""
        self._records.close()

    def _write(self, event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()
        if bucket_file.is_full(self._file):
            self._open()
