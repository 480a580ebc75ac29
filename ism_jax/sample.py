"""Samples from a run.

    python -m ism_jax.sample --workdir runs/quickstart --steps 1,2,4,8,128 \\
        --guidance 0,1,2.5 --labels 0-9 --seed 0 --out samples

Writes `grid.png` (steps by guidance), one PNG for each cell and `samples.npz` with
`images` [steps, guidance, labels, H, W, C] uint8 and the settings. The same seed shows
the same noise in every cell. Steps that are no power of two are made of dyadic steps
(see `ism_jax.method.time_grid.dyadic_schedule`); `--schedule 0.5,0.25,0.25` gives them
explicitly. One network call per step, whatever the guidance; samples are made from the
slow average, `infer`.
"""

import io
from pathlib import Path

from absl import app, flags
import jax
import numpy as np

from ism_jax import config as config_lib
from ism_jax import experiment, trained_network
from ism_jax.data import pixels
from ism_jax.method import time_grid
from ism_jax.runtime import command_line, files
from ism_jax.sampling import image_grid


def parse_labels(text: str, num_classes: int) -> list[int]:
    """Labels of '0-4,7,null'; 'null' asks for no class.

    Raises:
      ValueError: a label out of range, named.
    """
    labels = []
    for part in text.split(','):
        if part.strip() == 'null':
            labels.append(num_classes)
            continue
        first, _, last = part.partition('-')
        try:
            labels += range(int(first), int(last or first) + 1)
        except ValueError as error:
            raise ValueError(
                f'--labels {text!r}: {part!r} is no label; write such as 0-4,7,null'
            ) from error
    for label in labels:
        if not 0 <= label <= num_classes:
            raise ValueError(
                f'--labels {text!r}: {label} is not in 0 .. {num_classes - 1} (the '
                "classes of this run; 'null' for none)"
            )
    if not labels:
        raise ValueError(f'--labels {text!r} names no label; write such as 0-4,7,null')
    return labels


def sample_grid(
    run: trained_network.TrainedNetwork, *, schedules_, guidance, labels, seed: int
) -> np.ndarray:
    """Samples for every schedule and guidance.

    Args:
      run: `checkpoint.load_run`.
      schedules_: tuples of step sizes.
      guidance: strengths.
      labels: one for each sample of a cell.
      seed: of the noise, which is the same in every cell.

    Returns:
      [schedules, guidance, labels, H, W, C] float32, not clipped.

    Raises:
      ValueError: a schedule or a strength that the network was not trained for.
    """
    objective = config_lib.make_objective(run.config, len(run.class_names))
    config_lib.check_guidance(objective, guidance)
    for steps in schedules_:
        time_grid.check_schedule(steps, objective.base_steps)
    sampler = experiment.make_sampler(
        run.config, objective, run.apply, run.image_shape,
        batch_size=min(run.config.sample.batch_size, len(labels)),
    )  # fmt: skip

    def cell(steps, w):
        batches = sampler.batches(
            run.params, jax.random.key(seed), labels, guidance=w, schedule=steps
        )
        return np.concatenate([np.asarray(images) for images, _ in batches])

    return np.stack([[cell(s, w) for w in guidance] for s in schedules_])


def write_samples(out, images: np.ndarray, schedules_, guidance, labels, settings):
    """Writes the pictures and the NPZ; `images` as of `sample_grid`."""
    out = Path(out)
    images = pixels.to_uint8(images)
    buffer = io.BytesIO()
    np.savez(
        buffer, images=images, labels=labels, guidance=guidance,
        schedules=np.array([','.join(map(str, s)) for s in schedules_]),
        **{name: np.array(value) for name, value in settings.items()},
    )  # fmt: skip
    files.write_bytes(out / 'samples.npz', buffer.getvalue())
    if images.shape[-1] not in (1, 3):
        return  # Latents: the numbers are all there is to see.
    columns = min(10, len(labels))
    scale = image_grid.readable_scale(images.shape[3])
    numbers = [len(steps) for steps in schedules_]
    for i, steps in enumerate(schedules_):
        for j, w in enumerate(guidance):
            image_grid.write_png(
                out / f'steps_{len(steps)}_guidance_{w:g}.png',
                image_grid.grid(images[i, j], columns, scale=scale),
                settings | {'schedule': steps, 'guidance': w},
            )
    table = image_grid.steps_by_guidance_figure(
        images, numbers, guidance, columns=min(5, columns), scale=scale
    )
    image_grid.write_png(out / 'grid.png', table, settings)


def run_flags():
    """Does what the command line says."""
    run = trained_network.load(FLAGS.workdir, FLAGS.step)
    base_steps = config_lib.make_objective(run.config, 1).base_steps
    if FLAGS.schedule:
        chosen = [command_line.parse_numbers(FLAGS.schedule, float)]
    else:
        chosen = [
            time_grid.dyadic_schedule(n, base_steps)
            for n in command_line.parse_numbers(FLAGS.steps, int)
        ]
    guidance = command_line.parse_numbers(FLAGS.guidance, float)
    labels = parse_labels(FLAGS.labels, len(run.class_names))
    images = sample_grid(
        run, schedules_=chosen, guidance=guidance, labels=labels, seed=FLAGS.seed
    )
    settings = {'seed': FLAGS.seed, 'trained_steps': run.step, 'workdir': FLAGS.workdir}
    write_samples(FLAGS.out, images, chosen, guidance, labels, settings)
    print(f'wrote {images[..., 0, 0, 0].size} samples to {FLAGS.out}/')


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True)
    flags.DEFINE_integer('step', None, 'Checkpoint; the latest if not given.')
    flags.DEFINE_string('steps', '1,2,4,8,128', 'Numbers of sampling steps.')
    flags.DEFINE_string('schedule', '', 'Explicit step sizes, instead of --steps.')
    flags.DEFINE_string('guidance', '0,1,2.5', 'Guidance strengths w.')
    flags.DEFINE_string('labels', '0-9', "Such as 0-4,7; 'null' for no class.")
    flags.DEFINE_integer('seed', 0, 'Of the noise.')
    flags.DEFINE_string('out', 'samples', 'Folder to write to.')
    app.run(command_line.main(run_flags))
