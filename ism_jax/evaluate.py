r"""Scores a run, or images of any origin.

    python -m ism_jax.evaluate --workdir runs/quickstart

Without `--metrics`, for small images: the Frechet distance of a small classifier's
features and the accuracy of the samples' classes, over steps and guidance scales, from
the inference EMA. The classifier is trained once on the real images and cached in the
workdir. Writes `scores.json` into the workdir.

    python -m ism_jax.evaluate --workdir runs/imagenet256_ism_xl2 \
        --metrics fid,sfid,is,pr,kid,fd_dinov2 --steps 1,2,4,8,128 --guidance 1.5 \
        --reference /data/VIRTUAL_imagenet256_labeled.npz

With `--metrics` (listed in `ism_jax/evaluation/metrics.py`), as in the literature:
50,000 samples for each pair of steps and guidance scale. Inception's weights are
downloaded, or read from `--inception`; DINOv2's come from the hub or a folder,
EfficientNet's from a Python package. The real images are an NPZ file in ADM's layout, a
folder, or a source such as `tfds:NAME`; their statistics are computed once and kept in
`--cache_dir`. Samples are drawn on all devices of this process, in chunks: the same
command resumes a stopped evaluation. The processes of a cluster share the work
(`--distributed`), and so do independent processes with `--process_index` and
`--process_count`. Results are in `<workdir>/evaluation`: a `record.json` for each pair,
and all of them in `records.json`.

    python -m ism_jax.evaluate --images samples.npz --metrics fid --reference ...

scores the images of another program: an NPZ file in ADM's layout, or a folder.
"""

from collections.abc import Mapping, Sequence
import functools
from pathlib import Path
from typing import Any

from absl import flags
import jax

from ism_jax import config as config_lib
from ism_jax import config_check, experiment, trained_network
from ism_jax.data import sources
from ism_jax.data.source import Source
from ism_jax.evaluation import (
    feature_network,
    metrics,
    protocol,
    real_images,
    records,
    reference_statistics,
    sample_scorer,
    score_table,
)
from ism_jax.interchange import autoencoder_weights, exported_network
from ism_jax.runtime import command_line, distributed, paths
from ism_jax.sampling.sampler import Sampler


def load_networks(
    names: Sequence[str],
    *,
    cache_dir: Path,
    batch_size: int = 64,
    inception: str = '',
    inception_name: str = '',
    dinov2: str = 'facebook/dinov2-large',
    efficientnet: str = '',
) -> dict[str, feature_network.FeatureNetwork]:
    """The feature networks that the metrics need, by name.

    Args:
      names: names of the metrics.
      cache_dir: folder of downloaded weights.
      batch_size: images per forward pass.
      inception: weights file; '' to download the published one.
      inception_name: name of other weights, whose distances are not called FID.
      dinov2: folder, or id on the hub.
      efficientnet: weights file; '' for the installed package.
    """
    loaders = {
        'inception': lambda **options: feature_network.load_inception(
            inception or feature_network.fetch_inception(cache_dir),
            other_name=inception_name,
            **options,
        ),
        'dinov2': functools.partial(feature_network.load_dinov2, dinov2),
        'efficientnet': functools.partial(
            feature_network.load_efficientnet_lite, efficientnet or None
        ),
    }
    return {
        name: loaders[name](batch_size=batch_size) for name in metrics.networks(names)
    }


def open_reference(
    text: str, *, image_size: int | None, data_dir: str = '', split: str = 'train'
) -> paths.Path | Source:
    """The real images that `--reference` names.

    Args:
      text: a path, or a data source such as 'tfds:NAME'.
      image_size: side of a source's images; None if only a path is allowed.
      data_dir: TFDS's folder.
      split: split of a TFDS data set.

    Raises:
      ValueError: neither a path nor a source.
    """
    path = paths.from_user(text, '--reference')
    if paths.is_bucket(path) and path.is_dir():
        raise ValueError(
            f'--reference {text} is a folder in a bucket; give an NPZ file, or '
            f'--reference folder:{text}, whose subfolders are classes'
        )
    if text and path.exists():
        return path
    if not text or image_size is None:
        problem = f'--reference {text} does not exist' if text else 'no --reference'
        raise ValueError(
            f"{problem}: give the real images, an NPZ file in ADM's layout or a folder"
            + ('' if image_size is None else ', or a source such as tfds:imagenet2012')
        )
    return sources.make_source(
        text, image_size=image_size, channels=3, data_dir=data_dir, split=split
    )


def load_metrics(
    names: Sequence[str],
    networks: Mapping[str, feature_network.FeatureNetwork],
    reference: paths.Path | Source,
    *,
    cache_dir: Path,
    image_size: int | None,
) -> metrics.MetricSet:
    """The metrics with their networks and the statistics of the real images.

    `image_size` is the side to which images of a folder are resized; None keeps it.
    """
    is_folder = isinstance(reference, Path) and reference.is_dir()
    references = {
        name: reference_statistics.load_or_compute(
            reference,
            network,
            cache_dir=cache_dir,
            image_size=image_size if is_folder else None,
            log=print,
        )
        for name, network in networks.items()
    }
    return metrics.MetricSet(tuple(names), networks, references)


def run_source(run: trained_network.TrainedNetwork) -> Source | None:
    """The images that a run was trained on; None if it was trained on latents."""
    if not run.config.data.source or run.config.data.source.startswith('latents:'):
        return None
    return experiment.make_source(run.config)


def describe(run: trained_network.TrainedNetwork) -> dict[str, Any]:
    """What identifies the network of a run, for the record and hash of its scores.

    Options at their defaults are left out: new ones keep the hash of earlier scores.
    """
    autoencoder = run.config.data.autoencoder
    name = run.config.objective.name
    changed = lambda options, usual: {
        field: value for field, value in options.items() if value != usual.get(field)
    }
    return {
        'params_sha256': exported_network.params_digest(run.params),
        'average': 'infer',
        'trained_steps': run.step,
        'objective': {'name': name}
        | changed(run.config.objective.to_dict(), config_lib.objective_defaults(name)),
        'model': changed(run.config.model.to_dict(), config_lib.default().model),
        'autoencoder': autoencoder,
        'autoencoder_sha256': autoencoder_weights.digest(autoencoder)
        if autoencoder
        else '',
    }


def evaluate_images(images, metric_set: metrics.MetricSet, *, out: paths.Path) -> dict:
    """Scores images and writes `images.json`; returns the record."""
    record = protocol.evaluate_images(images, metric_set)
    path = out / 'images.json'
    records.write_records(path, [record])
    print(f'\n{score_table.metrics_table([record])}\n\nwrote {path}')
    return record


def evaluate_run(
    run: trained_network.TrainedNetwork,
    sampler: Sampler,
    metric_set: metrics.MetricSet,
    *,
    out: Path,
    **options,
) -> list[dict] | None:
    """Scores a run by metrics; options are those of `protocol.evaluate_settings`."""
    found = protocol.evaluate_settings(
        run.params,
        sampler,
        metric_set,
        describe(run),
        num_classes=len(run.class_names),
        out=out,
        **options,
    )
    if found is not None:
        print(f'\n{score_table.metrics_table(found)}\n\nwrote {out}/records.json')
    return found


def evaluate_by_classifier(
    run: trained_network.TrainedNetwork,
    sampler: Sampler,
    *,
    steps: Sequence[int],
    guidance: Sequence[float],
    interval: tuple[float, float] | None = None,
    samples: int,
    workdir: Path,
) -> list[dict]:
    """Scores a run by a small classifier of the images that it was trained on.

    Raises:
      ValueError: it was trained on latents, or the samples are too few.
    """
    source = run_source(run)
    if source is None:
        raise ValueError(
            f'{workdir} has no images to train a small classifier on (its data are '
            f'{run.config.data.source!r}); choose metrics, such as --metrics fid,is '
            '--reference tfds:imagenet2012'
        )
    if samples < 2:
        raise ValueError(f'--samples {samples}: a score needs at least 2')
    scorer = sample_scorer.SampleScorer(
        source, sampler, cache_dir=workdir, seed=run.config.seed, samples=samples
    )
    return sample_scorer.score_settings(
        scorer,
        run.params,
        trained_steps=run.step,
        steps=steps,
        guidance=guidance,
        interval=interval,
        samples=samples,
        workdir=workdir,
    )


def check_flags(values) -> None:
    """Raises ValueError for flags that do not fit together."""
    if bool(values.images) == bool(values.workdir):
        raise ValueError('give --workdir, a run, or --images, a folder or NPZ file')
    for name in ('inception', 'dinov2', 'efficientnet'):
        paths.local_path(getattr(values, name), f'--{name}')
    unknown = set(command_line.parse_list(values.keep)) - set(protocol.KEEP)
    if unknown:
        raise ValueError(
            f'--keep {values.keep}: {min(unknown)!r} is not one of '
            f'{", ".join(protocol.KEEP)}'
        )
    index, count = values.process_index, values.process_count
    if None not in (index, count) and not 0 <= index < count:
        raise ValueError(f'--process_index {index} is not in 0 .. {count - 1}')


def run_flags():
    """Runs the command with its flags."""
    check_flags(FLAGS)
    distributed.start_by_flags(FLAGS)
    if jax.process_count() > 1 and (FLAGS.images or not FLAGS.metrics):
        raise ValueError(
            'several processes only share the samples of a --workdir for --metrics; '
            'start one process, with --distributed=off'
        )
    names = command_line.parse_list(FLAGS.metrics)
    cache_dir = paths.local_path(FLAGS.cache_dir, '--cache_dir')

    def load(reference, image_size):
        networks = load_networks(
            names,
            cache_dir=cache_dir,
            batch_size=FLAGS.network_batch_size,
            inception=FLAGS.inception,
            inception_name=FLAGS.inception_name,
            dinov2=FLAGS.dinov2,
            efficientnet=FLAGS.efficientnet,
        )
        return load_metrics(
            names, networks, reference, cache_dir=cache_dir, image_size=image_size
        )

    if FLAGS.images:
        metrics.networks(names)
        images = real_images.open_images(paths.from_user(FLAGS.images, '--images'))
        metric_set = load(open_reference(FLAGS.reference, image_size=None), None)
        evaluate_images(
            images, metric_set, out=paths.from_user(FLAGS.out or 'evaluation', '--out')
        )
        return

    run = trained_network.load(FLAGS.workdir, FLAGS.step)
    defaults = run.config.sample
    steps = command_line.parse_numbers(FLAGS.steps, int) or defaults.steps
    guidance = command_line.parse_numbers(FLAGS.guidance, float) or defaults.guidance
    parts = run.experiment()
    interval = command_line.parse_numbers(FLAGS.interval, float) or None
    config_check.check_guidance(parts.objective, guidance)
    config_check.check_interval(parts.objective, interval)
    sampler = parts.make_sampler(FLAGS.batch_size or defaults.batch_size)
    if not FLAGS.metrics:
        evaluate_by_classifier(
            run,
            sampler,
            steps=steps,
            guidance=guidance,
            interval=interval,
            samples=FLAGS.samples or run.config.scores.samples,
            workdir=paths.from_user(FLAGS.workdir, '--workdir'),
        )
        return
    metrics.networks(names)
    size, _, channels = sampler.output_shape()
    if channels not in (1, 3):
        raise ValueError(
            f'{FLAGS.workdir} generates latents of {channels} channels and has no '
            'autoencoder to decode them, but metrics need images'
        )
    options = dict(image_size=size, data_dir=FLAGS.data_dir, split=FLAGS.split)
    reference = None if FLAGS.reference else run_source(run)
    if reference is None:
        reference = open_reference(FLAGS.reference, **options)
    evaluate_run(
        run,
        sampler,
        load(reference, size),
        out=paths.from_user(FLAGS.out or f'{FLAGS.workdir}/evaluation', '--out'),
        steps=steps,
        guidance=guidance,
        interval=interval,
        samples=FLAGS.samples or 50_000,
        labels=FLAGS.labels,
        seed=FLAGS.seed,
        keep=command_line.parse_list(FLAGS.keep),
        **distributed.share_by_flags(FLAGS),
    )


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_string('workdir', None, 'Folder of the run.')
    flags.DEFINE_string('images', '', 'Images to score instead: folder or NPZ file.')
    flags.DEFINE_integer('step', None, 'Checkpoint; the latest by default.')
    flags.DEFINE_string('steps', '', "Sampling steps 1,2,...; by default the config's.")
    flags.DEFINE_string(
        'guidance', '', "Guidance scales w, as 0,1.5; by default the config's."
    )
    flags.DEFINE_string(
        'interval', '', 'Start and end time of guidance, as 0.3,1, if it is an input.'
    )
    flags.DEFINE_integer(
        'samples',
        0,
        'Samples per pair of steps and w; 0 for 50,000, or without --metrics for '
        "the config's.",
    )
    flags.DEFINE_string('metrics', '', f'Some of {",".join(metrics.METRICS)}.')
    flags.DEFINE_string(
        'reference', '', "Real images; by default the run's training images."
    )
    flags.DEFINE_string('data_dir', '', "TFDS's folder; '' for its default.")
    flags.DEFINE_string('split', 'train', 'Split of a TFDS data set.')
    flags.DEFINE_enum(
        'labels',
        'balanced',
        protocol.LABELS,
        'Labels of the samples: every class equally often, or random.',
    )
    flags.DEFINE_integer('seed', 0, 'Seed of the noise and of random labels.')
    flags.DEFINE_integer('batch_size', 0, "Samples per batch; 0 for the config's.")
    flags.DEFINE_string('keep', '', 'Files of samples to keep: npz,png.')
    flags.DEFINE_string(
        'out', '', 'Folder of the results; <workdir>/evaluation by default.'
    )
    flags.DEFINE_string('inception', '', 'Weights file; downloaded by default.')
    flags.DEFINE_string(
        'inception_name', '', 'Name of other weights, whose distances are not FID.'
    )
    flags.DEFINE_string('dinov2', 'facebook/dinov2-large', 'Folder or hub id.')
    flags.DEFINE_string(
        'efficientnet', '', 'Weights file; by default of the installed package.'
    )
    flags.DEFINE_integer(
        'network_batch_size',
        64,
        'Images per forward pass of a feature network.',
        lower_bound=1,
    )
    flags.DEFINE_string(
        'cache_dir', '~/.cache/ism_jax', 'Folder of weights and reference statistics.'
    )
    distributed.define_flags()
    distributed.define_share_flags('samples')
    command_line.run(run_flags)
