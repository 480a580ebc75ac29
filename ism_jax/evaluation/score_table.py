"""Score tables for the terminal: of the small classifier, and of the metrics."""

from collections.abc import Mapping, Sequence
import math


def classifier_table(
    records: Sequence[Mapping], *, floor: Mapping, reference: str
) -> str:
    """Text: a block per score, a row per number of steps, a column per guidance scale.

    Args:
      records: dicts with `steps`, `guidance`, `fd`, `accuracy` (0 .. 1) and `samples`,
        one for each setting. A setting without a record prints '-'.
      floor: `fd`, `accuracy` and `samples` of held-out real images against the same
        reference, the best that a model can be expected to reach.
      reference: describes the real images.
    """
    settings = {(record['steps'], record['guidance']): record for record in records}
    steps = sorted({setting[0] for setting in settings})
    guidances = sorted({setting[1] for setting in settings})
    counts = sorted({record['samples'] for record in records})
    number = f'{counts[0]:,}' + (f' to {counts[-1]:,}' if len(counts) > 1 else '')
    lines = [
        f'{number} samples per setting, against {reference}.',
        'Rows: number of sampling steps. Columns: guidance scale w (0: no guidance).',
        f'"real" is {floor["samples"]:,} held-out real images in place of samples: '
        'the score to reach.',
    ]
    if counts != [floor['samples']]:
        lines.append(
            'FD is larger for fewer images: compare "real" and samples only roughly.'
        )
    blocks = {
        'fd': 'FD, Frechet distance of features (lower is better)',
        'accuracy': 'Accuracy, samples classified as their label (higher is better)',
    }
    for field, title in blocks.items():
        values = {setting: record[field] for setting, record in settings.items()}
        number_format = _number_format(field, [*values.values(), floor[field]])
        rows = [['steps', *(f'w={guidance:g}' for guidance in guidances)]]
        for step in steps:
            row = [values.get((step, guidance)) for guidance in guidances]
            cells = ('-' if value is None else number_format(value) for value in row)
            rows.append([str(step), *cells])
        rows.append(['real', number_format(floor[field])])
        lines += ['', title, *_aligned(rows)]
        lines[-1] += '  (at any steps and guidance)'
    return '\n'.join(lines)


def metrics_table(records: Sequence[Mapping]) -> str:
    """Markdown: a row for each record, then what the scores depend on.

    Args:
      records: from `protocol.write_records`, or one of `protocol.evaluate_images`.
    """
    names = [n for n in records[0]['scores'] if not n.endswith('deviation')]
    of_a_run = 'steps' in records[0]
    rows = [[*(['steps', 'w'] if of_a_run else []), *names, 'samples']]
    rows.append(['---'] * len(rows[0]))
    grids = {}
    for record in records:
        row = []
        if of_a_run:
            grid = record['guidance_grid']
            row = [str(record['steps']), f'{record["guidance"]:g}']
            if len(grid) > 1:
                row[1] += f' (grid of {len(grid)})'
                grids[record['steps']] = tuple(grid)
        row += [f'{record["scores"][name]:.4g}' for name in names]
        rows.append([*row, f'{record["samples"]:,}'])
    notes = [
        f'{name}: {network["network"]} (weights {network["weights"][:12]}), against '
        f'{network["reference"]} (key {network["reference_key"]}).'
        for name, network in records[0]['judges'].items()
    ]
    if of_a_run:
        notes.append(
            f'Labels {records[0]["labels"]}, seed {records[0]["seed"]}, after '
            f'{records[0]["trained_steps"]} steps of training.'
        )
    intervals = {tuple(r['interval']) for r in records if 'interval' in r}
    notes += [
        f'Guidance in the interval {start:g} .. {end:g}.' for start, end in intervals
    ]
    for grid in sorted(set(grids.values())):
        numbers = ', '.join(str(n) for n in sorted(grids) if grids[n] == grid)
        scales = ', '.join(f'{w:g}' for w in grid)
        notes.append(
            f'Steps {numbers}: a grid over guidance, w = {scales}. The best of a grid '
            'is selected on the samples that it is scored on: do not report it. Select '
            'w with another --seed, then score only that w.'
        )
    return '\n'.join([*(f'| {" | ".join(row)} |' for row in rows), '', *notes])


def _number_format(field, values):
    """A function that formats the numbers of a block, all with the same decimals."""
    if field == 'accuracy':
        return lambda value: f'{100 * value:.1f}%'
    # Three digits of the smallest value, so that good scores can be distinguished.
    smallest = min((v for v in values if math.isfinite(v) and v > 0), default=1)
    decimals = min(max(2 - math.floor(math.log10(smallest)), 1), 4)
    return lambda value: f'{value:.{decimals}f}'


def _aligned(rows):
    """Lines with right-aligned columns and a rule under the first row."""
    num_columns = len(rows[0])
    rows = [[*row, *[''] * (num_columns - len(row))] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(num_columns)]
    lines = [
        '  '
        + '  '.join(
            c.rjust(width) for c, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    rule = '  ' + '-' * (sum(widths) + 2 * (num_columns - 1))
    return [lines[0], rule, *lines[1:]]
