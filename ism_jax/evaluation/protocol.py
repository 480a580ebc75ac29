"""Scores of many samples by the literature's metrics, for each setting of the sampler.

A setting is a number of steps and a guidance scale. Its samples are drawn chunk by
chunk (`evaluation.sample_chunks`), so that a stopped evaluation resumes. Its folder is
named after a hash of everything that the scores depend on. It holds `record.json`,
which states all of it, and the samples if they are kept: `samples_<N>x<H>x<W>x3.npz` in
ADM's layout, and `png/`.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import shlex
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from ism_jax.evaluation import (
    feature_network,
    metrics,
    padded_batches,
    records,
    sample_chunks,
    sample_files,
)
from ism_jax.runtime import distributed, paths, provenance
from ism_jax.sampling.sampler import Sampler

LABELS = ('balanced', 'uniform')
KEEP = ('npz', 'png')
# A stopped evaluation loses at most about this many samples.
CHUNK = 1000
# Its keys 'cell' (the folder), 'measures' and 'judges' (the metrics) predate the terms
# used here; they stay, so that earlier evaluations resume.
RECORD = 'record.json'
# Part of the hash, so that scores of another rounding get another folder.
ROUNDING = 'clip(x, -1, 1), (x + 1) 127.5, rounded half to even'


class Setting(NamedTuple):
    """A setting of the sampler, and the folder of its record and samples."""

    folder: paths.Path
    steps: int
    guidance: float
    schedule: tuple[float, ...]
    interval: tuple[float, float] | None = None

    def __str__(self):
        return f'steps {self.steps}, w {self.guidance:g}'


def sample_labels(kind: str, count: int, num_classes: int, seed: int) -> np.ndarray:
    """Labels of the samples, [count] int32.

    Args:
      kind: 'balanced' for 0, 1, 2, ... in turn, so that class counts differ by at most
        one; 'uniform' for random labels, as in ADM.
      count: number of samples.
      num_classes: number of classes.
      seed: seed for 'uniform'.
    """
    if kind == 'balanced':
        return np.arange(count, dtype=np.int32) % num_classes
    # RandomState, because NumPy guarantees that its stream never changes.
    random = np.random.RandomState(seed)
    return random.randint(num_classes, size=count).astype(np.int32)


def settings_of(
    description: Mapping,
    schedules: Mapping[int, tuple[float, ...]],
    guidance: Sequence[float],
    interval: tuple[float, float] | None,
    out,
) -> list[Setting]:
    """Every pair of steps and guidance, with its folder below `out`.

    Args:
      description: everything else that the scores depend on; part of the folder's hash.
      schedules: number of sampling steps -> step sizes.
      guidance: guidance scales w.
      interval: start and end time of guidance; None for the method's default.
      out: folder of the evaluation.
    """
    settings, out = [], paths.to_path(out)
    for number, schedule in schedules.items():
        for w in guidance:
            setting = Setting(out, number, float(w), schedule, interval)
            key = feature_network.identity_key(dict(description) | _fields(setting))
            folder = out / f'steps_{number}_guidance_{w:g}_{key[:8]}'
            settings.append(setting._replace(folder=folder))
    return settings


def evaluate_settings(
    params,
    sampler: Sampler,
    metric_set: metrics.MetricSet,
    description: Mapping[str, Any],
    *,
    num_classes: int,
    steps: Sequence[int],
    guidance: Sequence[float],
    interval: tuple[float, float] | None = None,
    samples: int,
    labels: str,
    seed: int,
    out,
    keep: Sequence[str] = (),
    process_index: int = 0,
    process_count: int = 1,
    wait: bool = False,
    log: Callable[[str], Any] = print,
) -> list[dict] | None:
    """Samples and scores every pair of steps and guidance that has no record yet.

    Args:
      params: inference EMA parameters.
      sampler: draws the samples.
      metric_set: scores them.
      description: description of the network, for the record and the hash; JSON values.
      num_classes: number of classes.
      steps, guidance: numbers of sampling steps, and guidance scales w.
      interval: start and end time of guidance; None for the method's default.
      samples: number of samples of each setting.
      labels: one of `LABELS`, see `sample_labels`.
      seed: seed of the noise, the same for each setting, and of random labels.
      out: folder of the evaluation.
      keep: which of `KEEP` to write.
      process_index, process_count: processes that share the chunks; the first scores.
      wait: whether process 0 waits for the chunks of the others.
      log: called with progress messages.

    Returns:
      The records of these settings, see `write_records`. None if chunks of other
      processes are missing, or if process 0 scores them.

    Raises:
      ValueError: a metric cannot be computed, or a sample contains NaN.
    """
    metric_set.check(samples)
    description = _extend(description, sampler, metric_set, samples, labels, seed)
    schedules = {number: sampler.schedule(number) for number in steps}
    settings = settings_of(description, schedules, guidance, interval, out)
    label = sample_labels(labels, samples, num_classes, seed)
    # Whole batches, because noise between steps depends on the batch.
    size = -(-min(CHUNK, samples) // sampler.batch_size) * sampler.batch_size
    incomplete = 0
    for shift, setting in enumerate(settings):
        folder = setting.folder
        if _is_finished(folder, keep):
            continue
        chunks = sample_chunks.Chunks(folder, label, size, keep_images=bool(keep))
        chunks.discard_unusable()
        # Shifted, so that settings with few chunks occupy all processes.
        turn = (process_index - shift) % process_count
        own = [i for i in chunks.missing() if i % process_count == turn]
        _draw(chunks, own, setting, params, sampler, metric_set, samples, seed)
        if wait and process_index == 0:
            distributed.wait_until(lambda chunks=chunks: not chunks.missing())
        if process_index or chunks.missing():
            incomplete += 1
            continue
        log(f'{setting}: scoring {samples:,} samples')
        _score(chunks, setting, description, metric_set, keep)
    if incomplete:
        if not wait:
            log(
                f'{incomplete} of {len(settings)} settings wait for other processes, '
                'or for process 0 to score them; run it again when all have finished'
            )
        return None
    by_folder = {record['cell']: record for record in write_records(out)}
    return [by_folder[setting.folder.name] for setting in settings]


def evaluate_images(
    images, metric_set: metrics.MetricSet, *, log: Callable[[str], Any] = print
) -> dict:
    """The record of images of any origin.

    Args:
      images: images from `evaluation.real_images.open_images`.
      metric_set: scores them.
      log: called with progress messages.

    Raises:
      ValueError: a metric cannot be computed.
    """
    metric_set.check(len(images))
    log(f'scoring {images.description}')
    parts = []
    with tqdm.tqdm(total=len(images), unit='image', disable=None) as bar:
        for batch in images.batches(CHUNK):
            parts.append(metric_set.extract(batch))
            bar.update(len(batch))
    record = {'images': images.description, 'images_sha256': images.digest()}
    record |= {'samples': len(images), 'judges': metric_set.description()}
    return (
        record
        | {'scores': metric_set.compute(padded_batches.concatenate(parts))}
        | _provenance()
    )


def write_records(out) -> list[dict]:
    """Writes `records.json` with the records of all settings below `out`; returns them.

    Each gets `guidance_grid`: all guidance scales that were scored with the same
    network, steps and noise. The best score of a grid is biased by its selection.
    """
    out = paths.to_path(out)
    found = [_read(path.parent) for path in sorted(out.glob(f'*/{RECORD}'))]
    grids = {}
    for record in found:
        grids.setdefault(_all_but_guidance(record), set()).add(record['guidance'])
    found = [r | {'guidance_grid': sorted(grids[_all_but_guidance(r)])} for r in found]
    records.write_records(out / 'records.json', found)
    return found


def _draw(chunks, indices, setting, params, sampler, metric_set, samples, seed):
    """Draws the chunks of these indices and extracts their features."""

    def sample(first, labels):
        return sampler.batches(
            params,
            jax.random.key(seed),
            labels,
            guidance=setting.guidance,
            schedule=setting.schedule,
            interval=setting.interval,
            first=first,
        )

    bar = tqdm.tqdm(
        total=samples,
        initial=samples - sum(map(chunks.num_samples, indices)),
        desc=str(setting),
        unit='sample',
        disable=None,
        dynamic_ncols=True,
    )
    with bar:
        for index in indices:
            try:
                chunks.make(index, sample, metric_set.extract, progress=bar.update)
            except ValueError as error:
                raise ValueError(f'{setting}: {error}') from error


def _score(chunks, setting, description, metric_set, keep) -> None:
    """Scores the samples, writes the record and removes the chunks."""
    folder, kept = setting.folder, {}
    if 'npz' in keep:
        kept['npz'] = sample_files.write_npz(folder, chunks.images)
    if 'png' in keep:
        sample_files.write_pngs(folder / 'png', chunks.images)
        kept['png'] = 'png'
    record = {'cell': folder.name} | description | _fields(setting) | {'kept': kept}
    record |= {'scores': metric_set.compute(chunks.features())} | _provenance()
    records.write_records(folder / RECORD, record)
    chunks.remove()


def _extend(description, sampler, metric_set, samples, labels, seed) -> dict:
    """The description of a network, with all that its settings have in common."""
    return dict(description) | {
        'rounding': ROUNDING,
        'measures': list(metric_set.names),
        'judges': metric_set.description(),
        'samples': samples,
        'labels': labels,
        'seed': seed,
        'sampler_batch_size': sampler.batch_size,
    }


def _fields(setting) -> dict:
    """A setting as it is in its record and its hash."""
    fields = {
        'steps': setting.steps,
        'guidance': setting.guidance,
        'schedule': list(setting.schedule),
    }
    # No key for None, so that records of networks without this input keep their hash.
    return fields | ({'interval': list(setting.interval)} if setting.interval else {})


def _provenance() -> dict:
    """When, where and how a record was made; not part of the hash."""
    return {
        'pipeline': 'ism_jax.evaluate',
        'command': shlex.join(['python', '-m', 'ism_jax.evaluate', *sys.argv[1:]]),
        'date': time.strftime('%Y-%m-%d'),
        **provenance.environment(),
    }


def _read(folder) -> dict:
    return json.loads(paths.read_bytes(folder / RECORD))


def _is_finished(folder, keep) -> bool:
    if not (folder / RECORD).exists():
        return False
    return all(kind in _read(folder)['kept'] for kind in keep)


def _all_but_guidance(record) -> tuple:
    """Fields that records of one grid over guidance share."""
    names = ('params_sha256', 'steps', 'seed', 'labels')
    return *map(record.get, names), str(record.get('interval'))
