"""The table and the figure of an ablation."""

import math

from ladder_records import ladder_records
import numpy as np

from ism_jax.evaluation import ladder


def test_summaries_are_means_and_standard_errors():
    cells = ladder.summarize(ladder_records(), 'fd')
    mean, error, count = cells['sm', 4]
    assert (mean, count) == (25.0, 3)
    np.testing.assert_allclose(error, 1 / math.sqrt(3))
    assert math.isnan(ladder.summarize(ladder_records()[:1], 'fd')['sm', 1][1])
    diverged = [{'recipe': 'sm', 'steps': 1, 'fd': None}]
    assert math.isnan(ladder.summarize(diverged, 'fd')['sm', 1][0])


def test_the_table_has_a_row_per_recipe():
    other = {'recipe': 'another', 'seed': 0, 'steps': 4, 'fd': None, 'accuracy': 0.1}
    records = [*ladder_records(), other | {'trained_steps': 9}]
    header, _, *rows = ladder.format_table(records, ('sm', 'ism')).splitlines()
    assert header == '| recipe | 1 step | 4 steps | seeds | calls | TFLOP |'
    recipes = [row.split('`')[1] for row in rows]
    assert recipes == ['sm', 'ism', 'another', 'flow_matching']
    assert '| 22.0 ± 0.577 (50%) | 25.0 ± 0.577 (50%) | 3 | 1 | 2.00 |' in rows[0]
    assert rows[2] == '| `another` |  | NaN (10%) | 1 |  | NaN |'


def test_rows_of_different_classifiers_are_not_compared():
    sm, *rest = ladder_records()
    same = ladder.format_table([sm | {'real_fd': 0.354}, *rest], ())
    assert 'Real images score' not in same
    mixed = [sm | {'real_fd': 0.354}, *(r | {'real_fd': 0.372} for r in rest)]
    assert 'Real images score 0.354 or 0.372, so' in ladder.format_table(mixed, ())


def test_numbers_have_three_digits():
    numbers = (0, 0.01234, 1.234, 12.34, 1234.5, None, math.inf)
    expected = ['0.0', '0.0123', '1.23', '12.3', '1234', 'NaN', 'NaN']
    assert [ladder.format_number(n) for n in numbers] == expected


def test_the_figure_has_a_line_per_number_of_steps_and_per_system():
    figure = ladder.plot(
        ladder_records(), ('sm', 'ism'), ('sm', 'flow_matching', 'imm')
    )
    left, right = figure.axes
    assert left.get_legend_handles_labels()[1] == ['1 step', '4 steps']
    assert right.get_legend_handles_labels()[1] == ['sm', 'flow_matching', 'ism']
    means = left.containers[0].lines[0].get_ydata(orig=False)
    np.testing.assert_allclose(means, [22, 12])


def test_rungs_with_a_change_are_drawn_beside_the_others():
    changed = 'sm', 'ism/objective.guidance_max=1.5'
    records = ladder_records()
    records += [
        r | {'recipe': changed[1], 'fd': r['fd'] / 2}
        for r in records
        if r['recipe'] == 'ism'
    ]
    left, _ = ladder.plot(records, ('sm', 'ism'), (), changed).axes
    assert left.get_legend_handles_labels()[1] == [
        '1 step',
        '1 step, objective.guidance_max=1.5',
        '4 steps',
        '4 steps, objective.guidance_max=1.5',
    ]
    means = left.containers[1].lines[0].get_ydata(orig=False)
    np.testing.assert_allclose(means, [22, 6])
