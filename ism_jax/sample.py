r"""Draws samples from a trained network.

    python -m ism_jax.sample --workdir runs/quickstart --steps 1,2,4,8,128 \
        --guidance 0,0.75,1.5 --labels 0-9 --seed 0 --out samples

Writes `grid.png` (steps by guidance), one PNG for each cell, and `samples.npz` with
`images` [steps, guidance, labels, H, W, C] uint8 and the settings. Every cell starts
from the same noise. Steps are equal, or, for methods trained on the dyadic grid, as in
`ism_jax.method.time_grid.dyadic_schedule`; `--schedule 0.5,0.25,0.25` gives step sizes
explicitly. Samples are drawn with the inference EMA.
"""

from collections.abc import Sequence

from absl import flags
import jax
import numpy as np

from ism_jax import config_check, trained_network
from ism_jax.data import pixels
from ism_jax.runtime import command_line, files, paths
from ism_jax.sampling import image_grid, sample_table


def parse_labels(text: str, num_classes: int) -> list[int]:
    """Label indices of '0-4,7,null', where null is `num_classes`.

    Raises:
      ValueError: a part that is not a label of these classes, or no label at all.
    """
    labels = []
    for part in text.split(','):
        first, _, last = part.partition('-')
        try:
            chosen = range(int(first), int(last or first) + 1)
        except ValueError:
            chosen = [num_classes] if part.strip() == 'null' else [-1]
        if not all(0 <= label <= num_classes for label in chosen):
            raise ValueError(
                f'--labels {text!r}: {part!r} is not in 0 .. {num_classes - 1} or '
                "'null'; write labels such as 0-4,7,null"
            )
        labels += chosen
    if not labels:
        raise ValueError(f'--labels {text!r} is empty; write labels such as 0-4,7,null')
    return labels


def sample_grid(
    run: trained_network.TrainedNetwork,
    *,
    schedules: Sequence[int | Sequence[float]],
    guidance: Sequence[float],
    labels: Sequence[int],
    seed: int,
    interval: tuple[float, float] | None = None,
) -> np.ndarray:
    """Samples for every schedule and guidance scale.

    Args:
      run: from `trained_network.load`.
      schedules: number of steps, or step sizes, of each row.
      guidance: guidance scales w.
      labels: one for each sample of a cell.
      seed: seed of the noise, which is the same in every cell.
      interval: start and end time of guidance; None for the method's default.

    Returns:
      [schedules, guidance, labels, H, W, C] float32, not clipped.

    Raises:
      ValueError: a schedule, guidance scale or interval that the network was not
        trained for.
    """
    experiment = run.experiment()
    objective = experiment.objective
    config_check.check_guidance(objective, guidance)
    config_check.check_interval(objective, interval)
    return sample_table.draw(
        experiment.make_sampler(),
        run.params,
        jax.random.key(seed),
        labels,
        schedules=[objective.schedule(schedule) for schedule in schedules],
        guidance=guidance,
        interval=interval,
    )


def write_samples(
    out: paths.Path,
    images: np.ndarray,
    *,
    schedules: Sequence[Sequence[float]],
    guidance: Sequence[float],
    labels: Sequence[int],
    settings: dict,
) -> None:
    """Writes `samples.npz` and, unless the images are latents, the pictures.

    Args:
      out: folder to write to.
      images: from `sample_grid`.
      schedules, guidance, labels: see `sample_grid`.
      settings: written to the NPZ and into the PNG files.
    """
    images = pixels.to_uint8(images)
    files.write_npz(
        out / 'samples.npz',
        images=images,
        labels=labels,
        guidance=guidance,
        schedules=np.array([','.join(map(str, s)) for s in schedules]),
        **{name: np.array(value) for name, value in settings.items()},
    )
    if images.shape[-1] not in (1, 3):
        return
    columns = min(10, len(labels))
    scale = image_grid.readable_scale(images.shape[3])
    for row, schedule in zip(images, schedules, strict=True):
        for cell, w in zip(row, guidance, strict=True):
            image_grid.write_png(
                out / f'steps_{len(schedule)}_guidance_{w:g}.png',
                image_grid.grid(cell, columns, scale=scale),
                settings | {'schedule': schedule, 'guidance': w},
            )
    steps = [len(schedule) for schedule in schedules]
    table = sample_table.picture(images, steps, guidance)
    image_grid.write_png(out / 'grid.png', table, settings)


def run_flags() -> None:
    """Runs the command."""
    out = paths.from_user(FLAGS.out, '--out')
    run = trained_network.load(FLAGS.workdir, FLAGS.step)
    if FLAGS.schedule:
        given = [command_line.parse_numbers(FLAGS.schedule, float)]
    else:
        given = command_line.parse_numbers(FLAGS.steps, int)
    objective = run.experiment().objective
    interval = command_line.parse_numbers(FLAGS.interval, float) or None
    cells = dict(
        schedules=[objective.schedule(steps) for steps in given],
        guidance=command_line.parse_numbers(FLAGS.guidance, float)
        or run.config.sample.guidance,
        labels=parse_labels(FLAGS.labels, len(run.class_names)),
    )
    images = sample_grid(run, **cells, seed=FLAGS.seed, interval=interval)
    settings = {'seed': FLAGS.seed, 'trained_steps': run.step, 'workdir': FLAGS.workdir}
    if interval:
        settings['interval'] = interval
    write_samples(out, images, **cells, settings=settings)
    print(f'wrote {images[..., 0, 0, 0].size} samples to {out}/')


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True)
    flags.DEFINE_integer('step', None, 'Checkpoint; the latest by default.')
    flags.DEFINE_string('steps', '1,2,4,8,128', 'Numbers of sampling steps.')
    flags.DEFINE_string('schedule', '', 'Step sizes, instead of --steps.')
    flags.DEFINE_string(
        'guidance', '', "Guidance scales w, as 0,1.5; by default the config's."
    )
    flags.DEFINE_string(
        'interval', '', 'Start and end time of guidance, as 0.3,1, if it is an input.'
    )
    flags.DEFINE_string('labels', '0-9', 'Labels such as 0-4,7,null (the null label).')
    flags.DEFINE_integer('seed', 0, 'Seed of the noise.')
    flags.DEFINE_string('out', 'samples', 'Folder to write to.')
    command_line.run(run_flags)
