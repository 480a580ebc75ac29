"""Axes, lines, bars and colours that the figures of the diagnoses share."""

from collections.abc import Sequence
import io
import math
from typing import Any, NamedTuple

from matplotlib import figure as figures
from matplotlib import ticker
from matplotlib.backends import backend_agg
import numpy as np

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, PINK = '#0072B2', '#D55E00', '#AA4499'
SKY, GREY, BLACK = '#56B4E9', '#666666', '#000000'
FONT = 10.5
_DPI = 144


class Line(NamedTuple):
    """One line of a panel.

    Attributes:
      name: written beside the last point.
      x, y: coordinates of its points.
      colour: colour of the line and its name.
      style: matplotlib format of the line.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: Any
    style: str = '-'


def panels(titles: Sequence[tuple[str, str, str]], widths: Sequence[float]):
    """A figure and its axes, side by side.

    Args:
      titles: titles of each panel, of its x axis and of its y axis.
      widths: widths of the panels, in inches.
    """
    figure = figures.Figure(
        figsize=(sum(widths), 3.9), dpi=_DPI, facecolor='white', layout='constrained'
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06)
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for ax, (title, x, y) in zip(axes, titles, strict=True):
        ax.set_title(title, loc='left', fontsize=FONT + 0.5, weight='bold', pad=10)
        ax.set_xlabel(x, fontsize=FONT)
        ax.set_ylabel(y, fontsize=FONT)
        ax.spines[['top', 'right']].set_visible(False)
        ax.tick_params(labelsize=FONT - 1, length=3)
        ax.grid(axis='y', color='0.92', linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def png(figure) -> bytes:
    """The figure as a PNG file."""
    backend_agg.FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, format='png')
    return out.getvalue()


def draw_lines(ax, lines: Sequence[Line], labels: Sequence[Line] = ()) -> None:
    """Draws lines that end at the same x, with their names beside their last points.

    Names that would overlap are moved apart. `labels` are more lines that get a name
    but are not drawn. Set the scales of the axes first.
    """
    for line in lines:
        ax.plot(
            line.x, line.y, line.style, color=line.colour, linewidth=1.7, markersize=5
        )
    log = ax.get_yscale() == 'log'
    height = math.log10 if log else float
    low, high = (height(limit) for limit in ax.get_ylim())
    gap = 0.075 * (high - low)
    lines = sorted([*lines, *labels], key=lambda line: line.y[-1])
    wanted = [min(max(height(line.y[-1]), low), high) for line in lines]
    spots = list(wanted)
    for i in range(1, len(spots)):
        spots[i] = max(spots[i], spots[i - 1] + gap)
    # All names move by the mean shift, but stay inside the axes.
    shift = np.mean(np.subtract(spots, wanted))
    shift = min(max(shift, spots[-1] - high), spots[0] - low)
    for line, spot in zip(lines, np.subtract(spots, shift), strict=True):
        end = (line.x[-1], 10**spot if log else spot)
        annotate(ax, line.name, end, (6, 0), color=line.colour, va='center')


def annotate(ax, text: str, xy, offset, **options) -> None:
    """Writes text beside a point; `offset` in typographic points."""
    options = dict(fontsize=FONT - 0.5, annotation_clip=False) | options
    ax.annotate(text, xy, xytext=offset, textcoords='offset points', **options)


def draw_bars(ax, names: Sequence[str], groups, texts, colours) -> None:
    """Draws groups of horizontal bars on an axis of percentages.

    `groups` and `texts` map the name of a group to the lengths and labels of its bars,
    one per name from top to bottom. `colours` has one colour, or a list, per group.
    """
    position = np.arange(len(names), dtype=float)
    height = 0.8 / len(groups)
    for i, (group, values) in enumerate(groups.items()):
        offset = (i - (len(groups) - 1) / 2) * height
        bars = ax.barh(position + offset, values, 0.85 * height, color=colours[i])
        ax.bar_label(bars, texts[group], padding=4, fontsize=FONT - 1, color='0.2')
    ax.set_yticks(position, names)
    ax.invert_yaxis()
    ax.grid(False)
    ax.xaxis.set_major_formatter(ticker.PercentFormatter(1.0))


def set_x_ticks(ax, values: Sequence[float], names: Sequence[str]) -> None:
    """A logarithmic x axis with only these ticks."""
    ax.set_xscale('log', base=2)
    ax.set_xticks(values, names)
    ax.xaxis.set_minor_locator(ticker.NullLocator())


def set_log_limits(ax, low: float, high: float) -> None:
    """A logarithmic y axis with ticks 1, 2, 5, 10, ... between the limits."""
    ax.set_yscale('log')
    ax.set_ylim(low, high)
    ticks = [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    ax.set_yticks(ticks, [f'{tick:g}' for tick in ticks])
    ax.yaxis.set_minor_locator(ticker.NullLocator())


def set_log_ratio_limits(ax, log_ratios: Sequence[np.ndarray]) -> None:
    """A linear y axis for log ratios around 0, with ticks at round factors."""
    ax.axhline(0, color=BLACK, linewidth=1.2)
    extent = max(0.3, *(float(np.abs(ratio).max()) for ratio in log_ratios))
    kept = []
    for factor in (1e4, 1000, 100, 30, 10, 5, 3, 2, 1.5, 1.25):
        log, above = math.log(factor), math.log(kept[-1]) if kept else math.inf
        # Ticks this close to one another, or to 1, would touch.
        if log <= 1.05 * extent and 0.2 * extent < min(log, above - log):
            kept.append(factor)
    values = [-math.log(f) for f in kept] + [0] + [math.log(f) for f in kept]
    ax.set_yticks(values, [f'1/{f:g}' for f in kept] + ['1'] + [f'{f:g}' for f in kept])
    ax.set_ylim(-1.1 * extent, 1.1 * extent)
