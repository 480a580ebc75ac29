"""Scores as the literature has them: many samples of each setting, through networks.

A cell is one setting of the sampler: steps and guidance. Its samples are made chunk by
chunk (`evaluation.sample_chunks`), so that a killed evaluation goes on where it was; its record
says everything that is needed to repeat it.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
from pathlib import Path
import platform
import shlex
import sys
import time
from typing import Any

import jax
import numpy as np
import tqdm

from ism_jax import trained_network
from ism_jax.evaluation import (
    feature_network,
    metrics,
    reference_statistics,
    sample_chunks,
    sample_files,
    scores,
)
from ism_jax.interchange import exported_network
from ism_jax.method import time_grid
from ism_jax.models import vae
from ism_jax.runtime import distributed, provenance
from ism_jax.sampling.sampler import Sampler

LABELS = ('balanced', 'uniform')
KEEP = ('npz', 'png')
# About so many samples are lost at most when an evaluation is killed.
CHUNK = 1000
RECORD = 'record.json'
ROUNDING = 'clip(x, -1, 1), (x + 1) 127.5, rounded half to even'


@dataclasses.dataclass(frozen=True)
class Judges:
    """How samples are judged.

    Attributes:
      names: of measures, see `evaluation.metrics`.
      networks: by the names of `measures.networks`.
      references: of each network.
    """

    names: tuple[str, ...]
    networks: Mapping[str, feature_network.FeatureNetwork]
    references: Mapping[str, reference_statistics.Reference]

    def look(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs of all networks that the measures need, 'network/output': [N, F]."""
        seen = {}
        for name, network in self.networks.items():
            out = network(images)
            needed = metrics.outputs(self.names, name)
            seen |= {f'{name}/{output}': out[output] for output in needed}
        return seen

    def scores(self, seen: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The scores of what `look` saw in all samples."""
        by_network = {name: {} for name in self.networks}
        for key, values in seen.items():
            name, _, output = key.partition('/')
            by_network[name][output] = values
        return metrics.compute(self.names, by_network, self.networks, self.references)

    def identity(self) -> dict[str, Any]:
        """Which networks and which real images, for the record."""
        return {
            name: network.identity
            | {
                'reference': self.references[name].description,
                'reference_key': self.references[name].key,
                'reference_images': self.references[name].count,
            }
            for name, network in self.networks.items()
        }


def sample_labels(kind: str, count: int, num_classes: int, seed: int) -> np.ndarray:
    """Labels of the samples, [count] int32.

    Args:
      kind: 'balanced', 0, 1, 2, ... in turn, every class equally often (to one);
        'uniform', drawn at random as in ADM.
      count: of samples.
      num_classes: labels are below.
      seed: of 'uniform'.

    Raises:
      ValueError: another kind.
    """
    if kind == 'balanced':
        return np.arange(count, dtype=np.int32) % num_classes
    if kind == 'uniform':
        # RandomState, because NumPy promises that its stream never changes.
        random = np.random.RandomState(seed)
        return random.randint(num_classes, size=count).astype(np.int32)
    raise ValueError(f'labels {kind!r} must be one of {", ".join(LABELS)}')


def evaluate_cells(
    run: trained_network.TrainedNetwork,
    sampler: Sampler,
    judges: Judges,
    *,
    steps: Sequence[int],
    guidance: Sequence[float],
    samples: int,
    labels: str,
    seed: int,
    out,
    keep: Sequence[str] = (),
    process_index: int = 0,
    process_count: int = 1,
    wait: bool = False,
    show: Callable[[str], Any] = print,
) -> list[dict] | None:
    """Samples and scores every pair of steps and guidance that is not done yet.

    Each cell has a folder below `out`, with `record.json` once it is scored, and the
    samples where they are to be kept: `samples_<N>x<H>x<W>x3.npz` in ADM's layout, and
    `png/`.

    Args:
      run: that is scored, by its slow average.
      sampler: of the run, `build.make_sampler`.
      judges: what it is judged by.
      steps, guidance: lists; every pair of them is a cell.
      samples: of each cell.
      labels: see `sample_labels`.
      seed: of the noise, the same in every cell, and of random labels.
      out: folder.
      keep: of `KEEP`.
      process_index, process_count: makes the chunks `process_index`, `process_index +
        process_count`, ... of the first cell, and of each next cell those one before;
        the first process scores.
      wait: the first process waits for what the others make.
      show: is told in words what is done.

    Returns:
      The records of these cells, see `write_records`; None where chunks of other
      processes are missing, or where these wait for the first.

    Raises:
      ValueError: what cannot be measured, or a sample with NaN.
    """
    for kind in keep:
        if kind not in KEEP:
            raise ValueError(f'keep = {kind!r} must be one of {", ".join(KEEP)}')
    if not 0 <= process_index < process_count:
        raise ValueError(
            f'process_index = {process_index} must be in 0 .. {process_count - 1}'
        )
    metrics.check(judges.names, samples, judges.references)
    about = _about(run, judges) | {
        'samples': samples,
        'labels': labels,
        'seed': seed,
        'sampler_batch_size': sampler.batch_size,
    }
    label = sample_labels(labels, samples, len(run.class_names), seed)
    # Whole batches, for samplers whose noise depends on a batch.
    size = -(-min(CHUNK, samples) // sampler.batch_size) * sampler.batch_size
    cells, waiting = [], []
    for number in steps:
        schedule = time_grid.dyadic_schedule(number, sampler.base_steps)
        for w in guidance:
            cell = {'steps': number, 'guidance': float(w), 'schedule': list(schedule)}
            key = feature_network.identity_key(about | cell)
            folder = Path(out) / f'steps_{number}_guidance_{w:g}_{key[:8]}'
            cells.append((folder, cell))
    for shift, (folder, cell) in enumerate(cells):
        if _is_done(folder, keep):
            continue
        parts = sample_chunks.Chunks(folder, label, size, keep_images=bool(keep))
        parts.discard_unusable()
        # Shifted, so that those of few chunks have work too.
        turn = (process_index - shift) % process_count
        own = [i for i in parts.missing() if i % process_count == turn]
        description = f'steps {cell["steps"]}, w {cell["guidance"]:g}'
        bar = tqdm.tqdm(
            total=samples, initial=samples - sum(map(parts.samples, own)),
            desc=description, unit='sample', disable=None, dynamic_ncols=True,
        )  # fmt: skip

        def sample(first, part, cell=cell):
            return sampler.batches(
                run.params, jax.random.key(seed), part, guidance=cell['guidance'],
                schedule=cell['schedule'], first=first,
            )  # fmt: skip

        with bar:
            for number in own:
                try:
                    parts.make(number, sample, judges.look, progress=bar.update)
                except ValueError as error:
                    raise ValueError(f'{description}: {error}') from error
        if wait and not process_index:
            distributed.wait_until(lambda parts=parts: not parts.missing())
        if process_index or parts.missing():
            waiting.append(folder.name)
            continue
        show(f'{description}: scoring {samples:,} samples')
        kept = _keep(folder, parts, keep)
        content = {'cell': folder.name} | about | cell | {'kept': kept}
        content |= {'scores': judges.scores(parts.outputs())} | _circumstances()
        scores.write_record(folder / RECORD, content)
        parts.remove()
    if waiting and not wait:
        show(
            f'{len(waiting)} of {len(cells)} cells wait for other processes, or for '
            'the first to score them; when all have ended, run it again'
        )
    if waiting:
        return None
    records = {record['cell']: record for record in write_records(out)}
    return [records[folder.name] for folder, _ in cells]


def evaluate_images(
    images, judges: Judges, *, show: Callable[[str], Any] = print
) -> dict:
    """Scores images of any origin.

    Args:
      images: of `evaluation.real_images.open_images`.
      judges: what they are judged by.
      show: is told in words what is done.

    Returns:
      The record.

    Raises:
      ValueError: what cannot be measured.
    """
    metrics.check(judges.names, len(images), judges.references)
    show(f'scoring {images.description}')
    parts = []
    with tqdm.tqdm(total=len(images), unit='image', disable=None) as bar:
        for batch in images.batches(CHUNK):
            parts.append(judges.look(batch))
            bar.update(len(batch))
    seen = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    about = {'images': images.description, 'images_sha256': images.digest()}
    about |= {'samples': len(images), 'judges': judges.identity()}
    return about | {'scores': judges.scores(seen)} | _circumstances()


def record_of(folder) -> dict:
    """The record of a cell."""
    return json.loads((Path(folder) / RECORD).read_text())


def write_records(out) -> list[dict]:
    """Writes `records.json`, of all cells below `out`, and returns them.

    `guidance_grid` is added to each: all strengths that were tried for this network
    and number of steps with this noise. A score that is chosen among them by itself
    is no plain result.
    """
    records = [record_of(path.parent) for path in sorted(Path(out).glob(f'*/{RECORD}'))]
    tried = {}
    for record in records:
        tried.setdefault(_choice(record), set()).add(record['guidance'])
    records = [r | {'guidance_grid': sorted(tried[_choice(r)])} for r in records]
    scores.write_records(Path(out) / 'records.json', records)
    return records


def table(records: Sequence[Mapping]) -> str:
    """A table in Markdown, a row for each cell, with what it must be read with.

    Args:
      records: of `write_records`, or one of `evaluate_images`.
    """
    names = [n for n in records[0]['scores'] if not n.endswith('deviation')]
    settings = ['steps', 'w'] if 'steps' in records[0] else []
    rows = [[*settings, *names, 'samples']]
    rows.append(['---'] * len(rows[0]))
    grids = {}
    for record in records:
        row = []
        if settings:
            grid = record['guidance_grid']
            row = [str(record['steps']), f'{record["guidance"]:g}']
            if len(grid) > 1:
                row[1] += f' (grid of {len(grid)})'
                grids[record['steps']] = tuple(grid)
        row += [f'{record["scores"][name]:.4g}' for name in names]
        rows.append([*row, f'{record["samples"]:,}'])
    lines = [f'| {" | ".join(row)} |' for row in rows]
    for name, about in records[0]['judges'].items():
        lines.append(
            f'{name}: {about["network"]} (weights {about["weights"][:12]}), against '
            f'{about["reference"]} (key {about["reference_key"]}).'
        )
    if settings:
        lines.append(
            f'Labels {records[0]["labels"]}, seed {records[0]["seed"]}, after '
            f'{records[0]["trained_steps"]} steps of training.'
        )
    for grid in sorted(set(grids.values())):
        numbers = ', '.join(str(n) for n in sorted(grids) if grids[n] == grid)
        tried = ', '.join(f'{w:g}' for w in grid)
        lines.append(
            f'Steps {numbers}: a grid over guidance, w = {tried}. Its best is chosen '
            'by the samples that it is scored on, and is no plain result: choose w '
            'with another --seed, then score that w alone.'
        )
    return '\n'.join([*lines[: len(rows)], '', *lines[len(rows) :]])


def _about(run, judges) -> dict:
    """What a cell's samples and scores depend on, but for the cell."""
    autoencoder = run.config.data.autoencoder
    return {
        'params_sha256': exported_network.params_digest(run.params),
        'average': 'infer',
        'trained_steps': run.step,
        'objective': run.config.objective.to_dict(),
        'model': run.config.model.to_dict(),
        'autoencoder': autoencoder,
        'autoencoder_sha256': vae.digest(autoencoder) if autoencoder else '',
        'rounding': ROUNDING,
        'measures': list(judges.names),
        'judges': judges.identity(),
    }


def _circumstances() -> dict:
    """When, where and by what; does not name a cell."""
    return {
        'pipeline': 'ism_jax.evaluate',
        'commit': provenance.commit(),
        'command': shlex.join(['python', '-m', 'ism_jax.evaluate', *sys.argv[1:]]),
        'date': time.strftime('%Y-%m-%d'),
        'python': platform.python_version(),
        'jax': jax.__version__,
        'hardware': provenance.hardware(),
    }


def _choice(record):
    """What records share of which one could be chosen by its guidance."""
    return record['params_sha256'], record['steps'], record['seed'], record['labels']


def _is_done(folder, keep) -> bool:
    if not (folder / RECORD).exists():
        return False
    return all(kind in record_of(folder)['kept'] for kind in keep)


def _keep(folder, parts: sample_chunks.Chunks, keep) -> dict[str, str]:
    """Writes the samples; kind to name."""
    kept = {}
    if 'npz' in keep:
        kept['npz'] = sample_files.write_npz(folder, parts.images)
    if 'png' in keep:
        sample_files.write_pngs(folder / 'png', parts.images)
        kept['png'] = 'png'
    return kept
