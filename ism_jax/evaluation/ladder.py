"""The table and the figure of an ablation, from its records.

A record has the scores of one run at one number of sampling steps: a dict with
`recipe`, `seed`, `steps`, `network_calls` (per sample), `fd`, `accuracy`, `real_fd`,
`trained_steps` and `step_gflop`, the GFLOP of a training step. Records of earlier
versions have neither the network calls nor the GFLOP.
"""

from collections.abc import Sequence
import itertools
import math

from matplotlib import figure as figures
from matplotlib import ticker
import numpy as np

from ism_jax.sampling import image_grid

COLORS = (
    *('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00', '#000'),
    *('#F0E442', '#999'),
)


def summarize(records: Sequence[dict], field: str) -> dict:
    """{(recipe, steps): (mean, standard error, number of seeds)} of a field.

    The standard error of a single seed is NaN. A null value, from samples that
    diverged, makes the mean NaN.
    """
    cells = {}
    for record in records:
        value = math.nan if record[field] is None else record[field]
        cells.setdefault((record['recipe'], record['steps']), []).append(value)
    return {cell: _mean_and_error(values) for cell, values in cells.items()}


def _mean_and_error(values: Sequence[float]) -> tuple[float, float, int]:
    count = len(values)
    error = math.nan if count < 2 else np.std(values, ddof=1) / math.sqrt(count)
    return float(np.mean(values)), float(error), count


def format_table(records: Sequence[dict], recipes: Sequence[str]) -> str:
    """A Markdown table with a row per recipe and a column per number of steps.

    The last columns have the network calls in one step, of which classifier-free
    guidance takes two, and the FLOPs of the training. A line below the table says if
    the records have scores of different classifiers.

    Args:
      records: records of the ablation.
      recipes: recipes in the order of the rows; others follow in alphabetical order.
    """
    distance, accuracy = (summarize(records, field) for field in ('fd', 'accuracy'))
    steps = sorted({record['steps'] for record in records})
    calls = summarize([r for r in records if 'network_calls' in r], 'network_calls')
    tflop = {}
    for record in records:
        of_recipe = tflop.setdefault(record['recipe'], {})
        of_recipe[record['seed']] = (
            record['trained_steps'] * record.get('step_gflop', math.nan) / 1000
        )

    def cell(recipe, number):
        if (recipe, number) not in distance:
            return ''
        share = accuracy[recipe, number][0]
        return f'{format_mean(*distance[recipe, number][:2])} ({share:.0%})'

    header = ['recipe', *map(image_grid.step_count, steps), 'seeds', 'calls', 'TFLOP']
    rows = [header, ['---'] * len(header)]
    order = [recipe for recipe in recipes if recipe in tflop]
    for recipe in (*order, *sorted(tflop.keys() - set(recipes))):
        of_seeds = list(tflop[recipe].values())
        cells = (cell(recipe, number) for number in steps)
        spent = format_number(np.mean(of_seeds))
        first = calls.get((recipe, steps[0]))
        per_step = f'{first[0] / steps[0]:.2g}' if first else ''
        rows.append([f'`{recipe}`', *cells, f'{len(of_seeds)}', per_step, spent])
    table = '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows) + '\n'
    floors = {format_number(r['real_fd']) for r in records if 'real_fd' in r}
    if len(floors) > 1:
        # The classifier is trained anew in each --workdir, and not alike on all CPUs.
        table += (
            f'\nReal images score {" or ".join(sorted(floors))}, so not all rows were '
            'scored by the same classifier with as many real images: they cannot be '
            'compared.\n'
        )
    return table


def format_mean(mean: float, error: float) -> str:
    """The mean ± its standard error; without the error if that is NaN."""
    spread = '' if math.isnan(error) else f' ± {format_number(error)}'
    return f'{format_number(mean)}{spread}'


def format_number(value: float | None) -> str:
    """A number with three significant digits; None is NaN."""
    if value is None or not math.isfinite(value):
        return 'NaN'
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 1
    return f'{value:.{digits}f}'


def plot(
    records: Sequence[dict],
    rungs: Sequence[str],
    systems: Sequence[str],
    changed_rungs: Sequence[str] = (),
) -> figures.Figure:
    """A figure of the ladder (left) and of the systems by sampling steps (right).

    Args:
      records: records of the ablation.
      rungs: recipes of the ladder, in order.
      systems: recipes to compare with 'ism' over the number of steps.
      changed_rungs: the rungs as recipes 'rung' or 'rung/field=value', drawn dashed.
    """
    distance = summarize(records, 'fd')
    steps = sorted({record['steps'] for record in records})
    figure = figures.Figure(figsize=(12, 4.6), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    few = [number for number in (1, 4) if number in steps] or steps[:2]
    change = changed_rungs[-1].partition('/')[2] if changed_rungs else ''
    for number, color in zip(few, COLORS, strict=False):
        step_count = image_grid.step_count(number)
        for recipes, line, label in (
            (rungs, '-', step_count),
            (changed_rungs, '--', f'{step_count}, {change}'),
        ):
            cells = {x: distance.get((r, number)) for x, r in enumerate(recipes)}
            _draw_line(left, cells, color=color, ls=line, label=label)
    left.set_xticks(range(len(rungs)), rungs, rotation=20, ha='right')
    left.set_title('The ladder: each rung adds one part')
    for system, color in zip((*systems, 'ism'), itertools.cycle(COLORS), strict=False):
        cells = {number: distance.get((system, number)) for number in steps}
        _draw_line(right, cells, color=color, label=system)
    right.set_xscale('log', base=2)
    right.set_xticks(steps, [str(number) for number in steps])
    right.set_xlabel('sampling steps')
    right.set_title('The systems')
    for axes in (left, right):
        axes.set_yscale('log')
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter('{x:g}')
        axes.yaxis.set_minor_formatter('')
        axes.set_ylabel('Frechet distance (lower is better)')
        axes.grid(alpha=0.3, which='both')
        axes.spines[['top', 'right']].set_visible(False)
        if axes.get_legend_handles_labels()[0]:  # Empty if no such recipe was run.
            axes.legend(frameon=False)
    return figure


def _draw_line(axes, cells: dict, **style) -> None:
    """Draws the means with their standard errors; `cells` maps x to a summary."""
    found = {x: cell for x, cell in cells.items() if cell is not None}
    if found:
        mean, error, _ = zip(*found.values(), strict=True)
        style |= dict(marker='o', capsize=3, lw=1.8)
        axes.errorbar(list(found), mean, np.nan_to_num(error), **style)
