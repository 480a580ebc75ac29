"""Labels, bars and ticks of the figures."""

import io

import numpy as np
from PIL import Image

from ism_jax.diagnosis import figure_axes
from ism_jax.diagnosis.figure_axes import BLUE, Line


def _axes():
    figure, (ax,) = figure_axes.panels([('title', 'x', 'y')], [5])
    return figure, ax


def test_names_of_lines_do_not_overlap():
    figure, ax = _axes()
    figure_axes.set_log_limits(ax, 0.5, 20)
    lines = [Line(f'line {i}', [1, 2], [1, 10 + 0.01 * i], BLUE) for i in range(4)]
    figure_axes.draw_lines(ax, lines)
    image = Image.open(io.BytesIO(figure_axes.png(figure)))
    assert image.size == (720, 561)
    boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda b: b.y0)
    assert len(boxes) == 4
    assert all(a.y1 <= b.y0 for a, b in zip(boxes[:-1], boxes[1:], strict=True))


def test_ticks_of_log_ratios_are_factors():
    _, ax = _axes()
    figure_axes.set_log_ratio_limits(ax, [np.log([0.5, 3.0])])
    names = [label.get_text() for label in ax.get_yticklabels()]
    ticks = dict(zip(names, ax.get_yticks(), strict=True))
    assert set(ticks) == {'1/3', '1/2', '1/1.5', '1', '1.5', '2', '3'}
    assert ticks['1/3'] == -np.log(3) and ticks['1.5'] == np.log(1.5)


def test_bars_are_labelled_in_groups():
    _, ax = _axes()
    groups = {'a': [0.1, 0.2], 'b': [0.3, 0.4]}
    texts = {'a': ['1', '2'], 'b': ['3', '4']}
    figure_axes.draw_bars(ax, ['top', 'bottom'], groups, texts, [BLUE, BLUE])
    assert [text.get_text() for text in ax.texts] == ['1', '2', '3', '4']
    assert [label.get_text() for label in ax.get_yticklabels()] == ['top', 'bottom']
    assert ax.yaxis_inverted()
