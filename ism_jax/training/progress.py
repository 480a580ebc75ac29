"""What a person sees of a run: a bar or lines, TensorBoard, and pictures."""

import os
from pathlib import Path
import time

# TensorBoard's writer brings TensorFlow along, which has nothing to say here.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')

from clu import (
    metric_writers,  # noqa: E402
    parameter_overview,  # noqa: E402
)
import jax  # noqa: E402
import numpy as np  # noqa: E402
import tqdm  # noqa: E402

from ism_jax import config as config_lib  # noqa: E402
from ism_jax import cost  # noqa: E402
from ism_jax.models import sit  # noqa: E402
from ism_jax.sampling import image_grid  # noqa: E402


class Progress:
    """Shows and records a run; silent on all processes but the first.

    Args:
      workdir: event files go to `workdir/tensorboard`, pictures to `workdir/grids`.
      config: recorded as hyper-parameters.
      first_step: where the run starts or goes on.
    """

    def __init__(self, workdir, config, *, first_step: int):
        self._workdir = Path(workdir)
        self._batch_size = config.train.batch_size
        self._num_steps = config.train.steps
        self._writes = jax.process_index() == 0
        self._pending = []
        self._timer = (time.time(), first_step)
        self._lost = False
        self.loss = float('nan')
        if not self._writes:
            return
        self._writer = metric_writers.SummaryWriter(str(self._workdir / 'tensorboard'))
        self._writer.write_hparams(
            {name: _hparam(v) for name, v in config_lib.flatten(config).items()}
        )
        # On a terminal a bar; in a file a line at each log.
        self._bar = tqdm.tqdm(
            total=self._num_steps, initial=first_step, unit='step', disable=None,
            dynamic_ncols=True, smoothing=0.05,
        )  # fmt: skip

    def show(self, text: str) -> None:
        """Prints beside the bar."""
        if self._writes:
            tqdm.tqdm.write(text)

    def step(self, metrics: dict) -> None:
        """Takes a step's metrics, which may still be computed."""
        self._pending.append(metrics)
        if self._writes:
            self._bar.update()

    def log(self, step: int, extra: dict[str, float]) -> None:
        """Writes the means since the last log; blocks until they are computed."""
        if not self._pending:
            return
        values = jax.device_get(self._pending)
        self._pending = []
        # Counts and what a skipped step left non-finite are not averaged away.
        means = {name: float(np.mean([v[name] for v in values])) for name in values[0]}
        means |= {n: float(values[-1][n]) for n in means if n.startswith('skipped')}
        self.loss = means['loss']
        then, last = self._timer
        speed = (step - last) * self._batch_size / max(time.time() - then, 1e-9)
        self._timer = (time.time(), step)
        if not self._writes:
            return
        scalars = means | extra | {'images_per_second': speed}
        self._record(self._writer.write_scalars, step, scalars)
        shown = f'loss {self.loss:.4f}'
        if means['skipped']:
            shown += f', {means["skipped"]:.0f} skipped'
        self._bar.set_postfix_str(f'{shown}, {speed:.0f} images/s')
        if self._bar.disable:
            left = (self._num_steps - step) * self._batch_size / max(speed, 1e-9)
            print(
                f'step {step}/{self._num_steps}  {shown}  {speed:.0f} images/s  '
                f'{left / 60:.1f} min left',
                flush=True,
            )

    def pause(self) -> None:
        """Leaves out of images/s what happens until `resume`."""
        self._paused = time.time()

    def resume(self) -> None:
        then, step = self._timer
        self._timer = (then + time.time() - self._paused, step)

    def picture(self, step: int, name: str, images: np.ndarray, columns: int) -> None:
        """Writes a grid of images in [-1, 1], [N, H, W, C]; not of latents."""
        if not self._writes or images.shape[-1] not in (1, 3):
            return
        picture = image_grid.grid(
            # A diverged network is worth seeing too.
            np.nan_to_num(images),
            columns,
            scale=image_grid.readable_scale(images.shape[1]),
        )
        path = self._workdir / 'grids' / f'{name}_{step:08d}.png'
        self._record(image_grid.write_png, path, picture, {'step': str(step)})
        self._record(self._writer.write_images, step, {name: picture[None]})

    def close(self) -> None:
        if self._writes:
            self._bar.close()
            self._record(self._writer.flush)
            self._record(self._writer.close)

    def _record(self, write, *arguments) -> None:
        """Writes for people to look at; no training is lost because that fails."""
        try:
            write(*arguments)
        except Exception as error:  # TensorFlow's kinds, and the system's.
            if not self._lost:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.show(f'records and pictures are being lost: {reason}')
            self._lost = True


def summary(config, model, params, mesh, source, workdir) -> str:
    """What is about to be trained, for the start of a run."""
    table = []
    if config.log.parameters:
        stats = 'sharding' if mesh.size > 1 else False
        table = [parameter_overview.get_parameter_overview(params, include_stats=stats)]
    devices = mesh.devices.flat[0]
    count = sit.num_parameters(model, source.image_shape)
    classes = len(source.class_names)
    needs = cost.make_plan(config, mesh.size, classes).bytes_per_device
    memory = sum(needs.values())
    return '\n'.join(
        [
            *table,
            f'network:   SiT, {count:,} parameters, width {model.hidden_size}, '
            f'{model.depth} layers, {model.num_heads} heads, '
            f'patch {model.patch_size}, {model.dtype}',
            f'devices:   {mesh.size} x {devices.device_kind}, '
            f'mesh data {mesh.shape["data"]} x fsdp {mesh.shape["fsdp"]}',
            f'data:      {source!r}',
            f'           {classes} classes, images {source.image_shape}',
            f'memory:    {memory / 2**30:.2f} GiB on each device, and what XLA needs '
            'besides (--plan lists it)',
            f'objective: {config.objective.name}, {config.train.steps} steps of '
            f'{config.train.batch_size}',
            f'workdir:   {workdir}',
        ]
    )


def _hparam(value):
    return value if isinstance(value, (bool, int, float, str)) else str(value)
