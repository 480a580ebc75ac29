"""Scores a run, or images of any origin.

    python -m ism_jax.evaluate --workdir runs/quickstart

With no `--metrics`, as for runs on small images: the Frechet distance of a small
classifier's features (the classifier is trained once on the real images and kept in
the workdir) and the accuracy of the samples' classes, over steps and guidance, from the
slow average. Writes `scores.json` into the workdir.

    python -m ism_jax.evaluate --workdir runs/imagenet256_ism_xl2 \\
        --metrics fid,sfid,is,pr,kid,fd_dinov2 --steps 1,2,4,8,128 --guidance 1.5 \\
        --reference /data/VIRTUAL_imagenet256_labeled.npz

With `--metrics` (`ism_jax/evaluation/metrics.py` lists them), as in the literature:
50,000 samples of each cell. Weights of Inception are fetched, or read from
`--inception`; those of DINOv2 come from the hub or a folder, those of EfficientNet from
a package.
Real images are an NPZ batch of ADM's, a folder, or a source such as `tfds:NAME`; their
statistics are computed once and kept in `--cache_dir`. Samples are made on all devices
of this process, in chunks that survive a kill: the same command goes on. Processes of
a cluster share the work (`--distributed`), and so do processes that do not know each
other, by `--process_index` and `--process_count`. Results are in
`<workdir>/evaluation`, a `record.json` for each cell and all of them in `records.json`.

    python -m ism_jax.evaluate --images samples.npz --metrics fid --reference ...

scores images of another program: an NPZ file in ADM's layout, or a folder.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
import jax

from ism_jax import config as config_lib
from ism_jax import experiment, trained_network
from ism_jax.data import sources
from ism_jax.evaluation import (
    feature_network,
    metrics,
    protocol,
    real_images,
    reference_statistics,
    sample_scorer,
    scores,
)
from ism_jax.runtime import command_line, distributed
from ism_jax.sampling.sampler import Sampler


def load_judges(
    names: Sequence[str], source, image_size: int | None
) -> protocol.Judges:
    """Networks and references as the command line says.

    Args:
      names: of metrics.
      source: real images where `--reference` says nothing; None for none.
      image_size: side of the samples, to which real images of a folder are brought;
        None to take them as they are.
    """
    cache = Path(FLAGS.cache_dir).expanduser()
    load = {
        'inception': lambda: feature_network.load_inception(
            FLAGS.inception or feature_network.fetch_inception(cache),
            other_name=FLAGS.inception_name, batch_size=FLAGS.network_batch_size,
        ),
        'dinov2': lambda: feature_network.load_dinov2(
            FLAGS.dinov2, batch_size=FLAGS.network_batch_size
        ),
        'efficientnet': lambda: feature_network.load_efficientnet_lite(
            FLAGS.efficientnet or None, batch_size=FLAGS.network_batch_size
        ),
    }  # fmt: skip
    needed = metrics.networks(names)
    place = open_reference(source, image_size)
    networks = {name: load[name]() for name in needed}
    size = image_size if isinstance(place, Path) and place.is_dir() else None
    return protocol.Judges(
        tuple(names),
        networks,
        {
            name: reference_statistics.load_or_compute(
                place, network, cache_dir=cache, image_size=size, report=print
            )
            for name, network in networks.items()
        },
    )


def open_reference(source, image_size: int | None):
    """What `--reference` names: a path, or a source of data."""
    text = FLAGS.reference
    if not text:
        if source is None:
            raise ValueError(
                "--reference names the real images: an NPZ file of ADM's, a folder, or "
                'a source such as tfds:imagenet2012'
            )
        return source
    if Path(text).expanduser().exists():
        return Path(text).expanduser()
    if image_size is None:
        raise ValueError(f'--reference {text} is neither a file nor a folder')
    return sources.make_source(
        text, image_size=image_size, channels=3, data_dir=FLAGS.data_dir,
        split=FLAGS.split,
    )  # fmt: skip


def run_images():
    """Scores `--images`."""
    names = command_line.parse_list(FLAGS.metrics)
    metrics.networks(names)
    images = real_images.open_images(FLAGS.images)
    judges = load_judges(names, None, None)
    record = protocol.evaluate_images(images, judges)
    path = Path(FLAGS.out or 'evaluation') / 'images.json'
    scores.write_records(path, [record])
    print(f'\n{protocol.table([record])}\n\nwrote {path}')


def run_cells(run, sampler: Sampler, steps, guidance):
    """Scores a run by `--metrics`."""
    names = command_line.parse_list(FLAGS.metrics)
    metrics.networks(names)
    source = None if FLAGS.reference else source_of(run)
    judges = load_judges(names, source, sampler.shown_shape()[0])
    out = Path(FLAGS.out or Path(FLAGS.workdir) / 'evaluation')
    records = protocol.evaluate_cells(
        run, sampler, judges, steps=steps, guidance=guidance,
        samples=FLAGS.samples or 50_000, labels=FLAGS.labels, seed=FLAGS.seed, out=out,
        keep=command_line.parse_list(FLAGS.keep), **distributed.share_by_flags(FLAGS),
    )  # fmt: skip
    if records is not None:
        print(f'\n{protocol.table(records)}\n\nwrote {out}/records.json')


def run_classifier(run, sampler: Sampler, steps, guidance):
    """Scores a run by a small classifier."""
    source = source_of(run)
    if source is None:
        raise ValueError(
            f'{FLAGS.workdir} names no images that a small classifier could learn from '
            f'(data.source = {run.config.data.source!r}); say how to judge its '
            'samples, such as --metrics fid,is --reference tfds:imagenet2012'
        )
    config = run.config
    scorer = sample_scorer.SampleScorer(
        source, sampler, cache_dir=FLAGS.workdir, seed=config.seed
    )
    sample_scorer.score_settings(
        scorer, run.params, trained_steps=run.step, steps=steps, guidance=guidance,
        samples=FLAGS.samples or config.scores.samples, workdir=FLAGS.workdir,
    )  # fmt: skip


def source_of(run: trained_network.TrainedNetwork) -> sources.Source | None:
    """The images that a run was trained on, if its config names such."""
    if not run.config.data.source or run.config.data.source.startswith('latents:'):
        return None
    return sources.make_source(
        run.config.data.source, **config_lib.source_options(run.config)
    )


def run_flags():
    """Does what the command line says."""
    if bool(FLAGS.images) == bool(FLAGS.workdir):
        raise ValueError('give --workdir, a run, or --images, a folder or NPZ file')
    distributed.start_by_flags(FLAGS)
    if jax.process_count() > 1 and (FLAGS.images or not FLAGS.metrics):
        raise ValueError(
            'several processes share the samples of a --workdir for --metrics; the '
            'rest is the work of one: start it by itself, with --distributed=off'
        )
    if FLAGS.images:
        return run_images()
    run = trained_network.load(FLAGS.workdir, FLAGS.step)
    objective = config_lib.make_objective(run.config, len(run.class_names))
    steps = command_line.parse_numbers(FLAGS.steps, int) or run.config.sample.steps
    guidance = (
        command_line.parse_numbers(FLAGS.guidance, float) or run.config.sample.guidance
    )
    config_lib.check_guidance(objective, guidance)
    sampler = experiment.make_sampler(
        run.config, objective, run.apply, run.image_shape,
        batch_size=FLAGS.batch_size or run.config.sample.batch_size,
    )  # fmt: skip
    score = run_cells if FLAGS.metrics else run_classifier
    score(run, sampler, steps, guidance)


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_string('workdir', None, 'Folder of the run.')
    flags.DEFINE_string('images', '', 'Images to score instead: folder or NPZ file.')
    flags.DEFINE_integer('step', None, 'Checkpoint; the latest if not given.')
    flags.DEFINE_string('steps', '', 'Such as 1,2,4; the config says by default.')
    flags.DEFINE_string('guidance', '', 'Such as 0,1.5; the config says by default.')
    flags.DEFINE_integer(
        'samples',
        0,
        'Of each cell; 0: 50,000, or without --metrics as the config says.',
    )
    flags.DEFINE_string('metrics', '', f'Such as {",".join(metrics.MEASURES)}.')
    flags.DEFINE_string('reference', '', 'Real images; those of the run by default.')
    flags.DEFINE_string('data_dir', '', "TFDS's folder; '' for its default.")
    flags.DEFINE_string('split', 'train', 'Of a TFDS data set.')
    flags.DEFINE_enum(
        'labels',
        'balanced',
        protocol.LABELS,
        'Every class equally often, or at random.',
    )
    flags.DEFINE_integer('seed', 0, 'Of the noise and of random labels.')
    flags.DEFINE_integer('batch_size', 0, 'Samples at once; 0: as the config says.')
    flags.DEFINE_string('keep', '', 'Samples to keep: npz,png.')
    flags.DEFINE_string('out', '', 'Folder of results; <workdir>/evaluation if empty.')
    flags.DEFINE_string('inception', '', 'File of its weights; fetched if empty.')
    flags.DEFINE_string('inception_name', '', 'Name of other weights: no FID then.')
    flags.DEFINE_string('dinov2', 'facebook/dinov2-large', 'Folder or hub id.')
    flags.DEFINE_string('efficientnet', '', "File of its weights; '' for the package.")
    flags.DEFINE_integer(
        'network_batch_size', 64, 'Images that a network sees at once.'
    )
    flags.DEFINE_string('cache_dir', '~/.cache/ism_jax', 'Of weights and references.')
    distributed.define_flags()
    distributed.define_share_flags('samples')
    app.run(command_line.main(run_flags))
