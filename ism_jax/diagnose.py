"""Diagnoses a run: `python -m ism_jax.diagnose --workdir runs/quickstart`.

Measures the five faults of shortcut models (iSM, arXiv 2510.21250), see
`ism_jax.diagnosis`, and writes `report.html` into the workdir: one file with a table of
results and a section with a figure for each fault.

    python -m ism_jax.diagnose compounding [--workdir runs/shortcut]

prints the effective guidance scale of one step as long as N = 1, 2, 4, ..., 128 finest
steps: in a flow known in closed form, and with --workdir in a trained network.
"""

from collections.abc import Callable
import contextlib
import math
from pathlib import Path
from typing import Any

from absl import flags
import jax
import numpy as np

from ism_jax import trained_network
from ism_jax.diagnosis import (
    compounding_guidance,
    curved_trajectories,
    frequency_bias,
    guidance_recursion,
    inflexible_guidance,
    report,
    self_consistency,
)
from ism_jax.diagnosis.subject import NUM_SAMPLES, Subject
from ism_jax.experiment import Experiment
from ism_jax.method import random_streams
from ism_jax.runtime import command_line, files, paths, sharding


def load_subject(workdir, step: int | None, samples: int) -> tuple[Subject, int]:
    """A trained network with at least `samples` pairs, and its training step.

    Raises:
      ValueError: there is no run or no such checkpoint, or the data are missing.
    """
    network = trained_network.load(workdir, step)
    parts = network.experiment()
    objective = parts.objective
    apply = objective.at_interval(parts.apply, objective.default_interval)
    noise, data, label, pool_size = _pairs(network.config, samples, workdir)
    # Equal batches, because the sampler pads the last one.
    batches = math.ceil(samples / network.config.sample.batch_size)
    subject = Subject(
        method=network.config.objective.name,
        objective=objective,
        sampler=parts.make_sampler(math.ceil(samples / batches)),
        parameter_sets=trained_network.load_parameter_sets(workdir, network),
        apply=jax.jit(
            lambda params, *inputs: objective.velocity(apply, params, *inputs)
        ),
        noise=noise,
        data=data,
        label=label,
        pool_size=pool_size,
        coupling=_coupling_name(network.config, pool_size),
        seed=network.config.seed,
    )
    return subject, network.step


def _coupling_name(config, pool_size: int) -> str:
    if not config.transport.enabled:
        return 'independent'
    if config.transport.method == 'semidiscrete':
        return 'semidiscrete optimal transport per class'
    scope = 'per class' if config.transport.per_class else 'over all classes'
    return f'optimal transport {scope}, pools of {pool_size:,}'


def _pairs(config, samples: int, workdir):
    """Noise, data and labels of at least `samples` pairs, and the pool size."""
    # One device: pairs do not depend on the mesh.
    parts = Experiment(config, mesh=sharding.make_mesh(1, 1, jax.devices()[:1]))
    parts.restore_potentials(workdir, print)
    batches = parts.pool_batches
    if not config.transport.enabled:
        batches = max(1, math.ceil(samples / config.train.batch_size))
    size = batches * config.train.batch_size
    pools = []
    with contextlib.closing(parts.make_loader(batches)) as loader:
        for _ in range(math.ceil(samples / size)):
            pool, _ = parts.next_pool(loader)
            data = pool.data.reshape(size, *pool.data.shape[2:])
            noise = random_streams.sample_noise(
                random_streams.stream(
                    parts.seed_key, random_streams.NOISE, pool.number
                ),
                pool.noise_index.reshape(size),
                data.shape[1:],
            )
            pools.append([np.asarray(x) for x in (noise, data, pool.labels.ravel())])
    return *(np.concatenate(arrays) for arrays in zip(*pools, strict=True)), size


def diagnose(
    workdir,
    *,
    out=None,
    step: int | None = None,
    samples: int = 512,
    log: Callable[[str], Any] = print,
) -> list[report.Section]:
    """Runs all five diagnoses and writes the report.

    Args:
      workdir: folder of the run.
      out: the HTML file; None for `report.html` in the workdir.
      step: checkpoint to load; None for the latest.
      samples: number of samples for the spectra.
      log: called with one line per diagnosis.

    Raises:
      ValueError: there is no run or no such checkpoint, or too few samples.
    """
    if samples < 16:
        raise ValueError(
            f'--samples {samples} is too few for a spectrum; use 16 or more'
        )
    subject, trained = load_subject(workdir, step, samples)
    sections = [
        compounding_guidance.diagnose(subject, guidance_recursion.closed_form_scales()),
        inflexible_guidance.diagnose(subject),
        frequency_bias.diagnose(subject, samples),
        self_consistency.diagnose(subject),
        curved_trajectories.diagnose(subject),
    ]
    page = report.page(
        f'Diagnosis of {Path(workdir).name}',
        f'{subject.method}, {trained:,} training steps, inference EMA; '
        f'{samples} samples; training pairs: {subject.coupling}',
        sections,
        'The faults are those of arXiv 2510.21250. The thresholds of good, fair and '
        'poor are our own and serve to compare runs. Command: '
        f'python -m ism_jax.diagnose --workdir {workdir} --samples {samples}',
    )
    out = paths.from_user(out or f'{workdir}/report.html', '--out')
    files.write_bytes(out, page.encode())
    for section in sections:
        log(f'{section.fault}: {section.number} ({section.verdict})')
    log(f'wrote {out}')
    return sections


def run_diagnose():
    """Runs the command without `compounding`."""
    if not FLAGS.workdir:
        raise ValueError('give the --workdir of a run, or the command compounding')
    diagnose(FLAGS.workdir, out=FLAGS.out, step=FLAGS.step, samples=FLAGS.samples)


def run_compounding():
    """Runs the command `compounding`."""
    scale, std = compounding_guidance.CLOSED_FORM_SCALE, guidance_recursion.DATA_STD
    table = guidance_recursion.scale_table
    for share in (1.0, 0.9, 0.5):
        exact = ' (where the proposition is exact)' if share == 1 else ''
        print(f'\nclosed form, g = {scale}, class_std = {share:g} data_std{exact}')
        print(table(guidance_recursion.closed_form_scales(share * std), scale))
    if FLAGS.workdir:
        subject, step = load_subject(FLAGS.workdir, FLAGS.step, NUM_SAMPLES)
        w = compounding_guidance.requested_guidance(subject)
        if not w:
            raise ValueError(
                f'{FLAGS.workdir} was trained with {subject.method!r}, which has no '
                'guidance or is not conditioned on the step size; give another run'
            )
        print(f'\n{FLAGS.workdir} ({subject.method}), step {step}, g = {1 + w:g}')
        scales = compounding_guidance.network_scales(subject, w)
        print(table({'network': scales}, 1 + w))
    print('\n~ no scale below 64 explains half of the step')


def run_flags(command: str):
    """Runs the command: 'compounding', or '' for all diagnoses."""
    (run_compounding if command else run_diagnose)()


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_string('workdir', None, 'Folder of the run.')
    flags.DEFINE_string('out', None, 'HTML file; WORKDIR/report.html by default.')
    flags.DEFINE_integer('step', None, 'Checkpoint; the latest by default.')
    flags.DEFINE_integer('samples', 512, 'Number of samples for the spectra.')
    command_line.run(run_flags, commands=('compounding', ''))
