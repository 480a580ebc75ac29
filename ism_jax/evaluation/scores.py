"""Scores of samples, and the table of them.

A metric knows neither the network that made the samples nor the one that looks at
them: it is given a feature function, and returns named values.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import json
import math
import warnings

import numpy as np

from ism_jax.data import pixels
from ism_jax.evaluation import frechet_distance
from ism_jax.runtime import files

# Images, float32 [B, H, W, C] in [-1, 1], to arrays by name: `features`, [B, F], and
# for a classifier `logits`, [B, num_classes].
FeatureFunction = Callable[[np.ndarray], Mapping[str, np.ndarray]]


def reference_statistics(
    feature_function: FeatureFunction, images, *, batch_size: int = 250
) -> frechet_distance.FeatureStatistics:
    """Statistics of the features of real images, for `Evaluator`.

    Args:
      feature_function: the one that the samples will be seen through.
      images: [N, H, W, C], floating in [-1, 1] or uint8.
      batch_size: images given to the feature function at once.

    Raises:
      ValueError: no images, a NaN in them, or features that are not finite.
    """
    if not len(images):
        raise ValueError('the reference holds no images: give at least 2')
    statistics = None
    for start in range(0, len(images), batch_size):
        batch = _as_stored(images[start : start + batch_size])
        features = np.asarray(feature_function(batch)['features'])
        if statistics is None:
            statistics = frechet_distance.FeatureStatistics(features.shape[1])
        statistics.update(features)
    return statistics


class Evaluator:
    """Compares samples with real images.

    Args:
      feature_function: see `FeatureFunction`. It should compile once for one batch
        size, as the last batch may be smaller.
      reference: `reference_statistics` of real images through the same function.
    """

    def __init__(
        self,
        feature_function: FeatureFunction,
        reference: frechet_distance.FeatureStatistics,
    ):
        self.feature_function = feature_function
        self.reference = reference

    def evaluate(self, batches: Iterable[tuple]) -> dict[str, float | int]:
        """Scores of all samples together.

        Samples are rounded to 8 bits first (`images.to_uint8`), as real images are.

        Args:
          batches: of (images [b, H, W, C] in [-1, 1] or uint8, labels [b]); None in
            place of labels where there is nothing to compare with.

        Returns:
          `fd`, the squared Frechet distance to the reference; `accuracy`, the share of
          samples that are read as their label (only with logits and labels); `samples`,
          their number. A sample with NaN makes `fd` NaN, counts as misread and is
          warned of: a diverged model must not end a training by being looked at.

        Raises:
          ValueError: fewer than 2 samples.
        """
        statistics = frechet_distance.FeatureStatistics(self.reference.num_features)
        samples = broken = correct = 0
        for images, labels in batches:
            images = np.asarray(images)
            if labels is None:
                correct = None
            samples += len(images)
            finite = _without_nan(images)
            broken += len(images) - int(finite.sum())
            if not finite.any():
                continue
            out = self.feature_function(_as_stored(images[finite]))
            statistics.update(out['features'])
            if 'logits' not in out:
                correct = None
            elif correct is not None:
                read = np.asarray(out['logits']).argmax(axis=1)
                correct += int((read == np.asarray(labels)[finite]).sum())
        if samples < 2:
            raise ValueError(f'samples = {samples}: a score needs at least 2')
        if broken:
            warnings.warn(
                f'{broken} of {samples} samples hold NaN: fd is NaN; the parameters or '
                'the sampler diverged',
                stacklevel=2,
            )
            fd = math.nan
        else:
            fd = frechet_distance.frechet_distance(statistics, self.reference)
        scores = {'fd': fd}
        if correct is not None:
            scores['accuracy'] = correct / samples
        return scores | {'samples': samples}


def format_table(
    records: Sequence[Mapping],
    *,
    floor: Mapping | None = None,
    reference: str = 'real images',
) -> str:
    """Scores as text: steps downwards, guidance to the right, a block for each score.

    Args:
      records: dicts with `steps`, `guidance`, `fd`, `samples` and, in all or in none,
        `accuracy` (a share, 0 .. 1). Other keys are left out. Cells without a record
        show '-'.
      floor: `fd`, `accuracy` and `samples` of held-out real images against the same
        reference, the best that a model can be expected to reach; None for none.
      reference: in words, what the samples are compared with.

    Raises:
      ValueError: no records, a record lacks a field, or two are of the same cell.
    """
    cells = _by_cell(records)
    steps = sorted({cell[0] for cell in cells})
    guidances = sorted({cell[1] for cell in cells})
    counts = sorted({record['samples'] for record in cells.values()})
    number = f'{counts[0]:,}' + (f' to {counts[-1]:,}' if len(counts) > 1 else '')
    lines = [
        f'{number} samples per cell, against {reference}.',
        'Rows: number of sampling steps. Columns: guidance strength w (0 is none).',
    ]
    if floor is not None:
        lines.append(
            f'"real" is {floor["samples"]:,} held-out real images in place of samples: '
            'the mark to reach.'
        )
        if counts != [floor['samples']]:
            lines.append(
                'FD is larger for fewer images, so "real" and samples compare only '
                'roughly.'
            )
    blocks = [('fd', 'FD, Frechet distance of features (lower is better)')]
    if all('accuracy' in record for record in records):
        title = 'Accuracy, samples that are read as their label (higher is better)'
        blocks.append(('accuracy', title))
    for field, title in blocks:
        values = {cell: record[field] for cell, record in cells.items()}
        real = None if floor is None else floor.get(field)
        write = _writer(field, [*values.values(), *([] if real is None else [real])])
        rows = [['steps', *(f'w={guidance:g}' for guidance in guidances)]]
        for step in steps:
            row = [values.get((step, guidance)) for guidance in guidances]
            rows.append([str(step), *('-' if v is None else write(v) for v in row)])
        if real is not None:
            rows.append(['real', write(real)])
        lines += ['', title, *_aligned(rows)]
        if real is not None:
            lines[-1] += '  (whatever the steps and the guidance)'
    return '\n'.join(lines)


def write_records(path, records: Sequence[Mapping]) -> None:
    """Writes records as a JSON list, whole or not at all.

    NumPy scalars become numbers. NaN and infinities, which JSON has not, become null.

    Raises:
      TypeError: a value is none of number, text, list and dict.
    """
    _write_json(path, [_plain(record) for record in records])


def write_record(path, record: Mapping) -> None:
    """As `write_records`, of one record by itself."""
    _write_json(path, _plain(record))


def _write_json(path, content) -> None:
    text = json.dumps(content, indent=1, allow_nan=False) + '\n'
    files.write_bytes(path, text.encode())


def _as_stored(images):
    """float32 in [-1, 1], rounded to what 8 bits hold."""
    return pixels.from_uint8(pixels.to_uint8(images))


def _without_nan(images):
    """[B] bool."""
    if images.dtype == np.uint8:
        return np.ones(len(images), bool)
    values = images.astype(np.float32).reshape(len(images), -1)
    return ~np.isnan(values).any(axis=1)


def _by_cell(records):
    cells = {}
    for record in records:
        missing = {'steps', 'guidance', 'fd', 'samples'} - set(record)
        if missing:
            raise ValueError(
                f'record {dict(record)} lacks {sorted(missing)}: steps, guidance, fd '
                'and samples are needed'
            )
        cell = record['steps'], float(record['guidance'])
        if cell in cells:
            raise ValueError(
                f'two records have steps = {cell[0]} and guidance = {cell[1]}: pass '
                'one for each cell, for instance those of the last evaluation'
            )
        cells[cell] = record
    if not cells:
        raise ValueError('there are no records: a table needs at least one')
    return cells


def _writer(field, values):
    """Function that writes a number of a block, all with equally many decimals."""
    if field == 'accuracy':
        return lambda value: f'{100 * value:.1f}%'
    # Three digits of the smallest, so that neighbours of a good score differ.
    least = min((v for v in values if math.isfinite(v) and v > 0), default=1)
    decimals = min(max(2 - math.floor(math.log10(least)), 1), 4)
    return lambda value: f'{value:.{decimals}f}'


def _aligned(rows):
    """Lines with the columns of `rows` right-aligned, a rule under the first."""
    columns = len(rows[0])
    rows = [[*row, *[''] * (columns - len(row))] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(columns)]
    lines = [
        '  ' + '  '.join(c.rjust(width) for c, width in zip(row, widths)).rstrip()
        for row in rows
    ]
    rule = '  ' + '-' * (sum(widths) + 2 * (columns - 1))
    return [lines[0], rule, *lines[1:]]


def _plain(value):
    """`value` as JSON knows it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, 'item'):  # NumPy and JAX scalars.
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
