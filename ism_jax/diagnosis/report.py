"""Plots of the five diagnoses and the page that shows them: arrays in, bytes out.

The page is one HTML file without scripts and without anything to fetch.
"""

import base64
from collections.abc import Mapping, Sequence
import html
import io
import math
from typing import Literal, NamedTuple

from matplotlib import figure as figures
from matplotlib import ticker
from matplotlib.backends import backend_agg
import numpy as np

from ism_jax.diagnosis.diagnostics import EffectiveScale
from ism_jax.sampling import image_grid

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, PINK, SKY, GREY = (
    '#0072B2', '#D55E00', '#009E73', '#AA4499', '#56B4E9', '#666666',
)  # fmt: skip
_DPI = 144
_FONT = 10.5


class Section(NamedTuple):
    """One diagnosis.

    Attributes:
      fault: its name.
      question: what it asks, in a few words.
      number: what was measured, in words and figures.
      good: what a good value is.
      verdict: what the number says of this run.
      grade: 'good', 'fair', 'poor', or 'none' where nothing was or could be judged.
      text: two sentences for a newcomer.
      figure: PNG, or None.
      caption: of the figure.
    """

    fault: str
    question: str
    number: str
    good: str
    verdict: str
    grade: Literal['good', 'fair', 'poor', 'none']
    text: str
    figure: bytes | None = None
    caption: str = ''


def _axes(count: int, *, width=10.5, height=3.9, ratios=None):
    figure = figures.Figure(
        figsize=(width, height), dpi=_DPI, facecolor='white', layout='constrained'
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06)
    axes = figure.subplots(1, count, squeeze=False, width_ratios=ratios)[0]
    for ax in axes:
        ax.spines[['top', 'right']].set_visible(False)
        ax.tick_params(labelsize=_FONT - 1, length=3)
        ax.grid(axis='y', color='0.92', linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def _title(ax, title: str, x: str, y: str) -> None:
    ax.set_title(title, loc='left', fontsize=_FONT + 0.5, weight='bold', pad=10)
    ax.set_xlabel(x, fontsize=_FONT)
    ax.set_ylabel(y, fontsize=_FONT)


def _png(figure) -> bytes:
    backend_agg.FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, format='png')
    return out.getvalue()


def _label_lines(ax, lines: Sequence[tuple[float, float, str, str]], log: bool) -> None:
    """Names beside the ends of lines, moved apart where they would overlap.

    Args:
      lines: (x, y, name, colour) of each end, all x alike.
      log: whether the y axis is logarithmic; its limits must be set.
    """
    place = math.log10 if log else float
    low, high = (place(limit) for limit in ax.get_ylim())
    gap = 0.075 * (high - low)
    lines = sorted(lines, key=lambda line: line[1])
    wanted = [min(max(place(y), low), high) for _, y, _, _ in lines]
    spots = list(wanted)
    for i in range(1, len(spots)):
        spots[i] = max(spots[i], spots[i - 1] + gap)
    # Down again by what the middle was pushed up, but not out of the axes.
    shift = np.mean(np.subtract(spots, wanted))
    shift = min(max(shift, spots[-1] - high), spots[0] - low)
    for (x, _, name, colour), spot in zip(lines, spots):
        spot -= shift
        ax.annotate(
            name, (x, 10**spot if log else spot), xytext=(6, 0),
            textcoords='offset points', color=colour, fontsize=_FONT - 0.5,
            va='center', annotation_clip=False,
        )  # fmt: skip


def _powers_of_two(ax, values) -> None:
    ax.set_xscale('log', base=2)
    ax.set_xticks(values)
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f'{v:g}'))
    ax.xaxis.set_minor_locator(ticker.NullLocator())


def _plain_log(ax, low: float, high: float) -> None:
    """A logarithmic y axis with ticks 1, 2, 5, 10, ... between the limits."""
    ax.set_yscale('log')
    ax.set_ylim(low, high)
    ticks = [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5)]
    ax.yaxis.set_major_locator(
        ticker.FixedLocator([tick for tick in ticks if low <= tick <= high])
    )
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f'{v:g}'))
    ax.yaxis.set_minor_locator(ticker.NullLocator())


def compounding_figure(
    panels: Mapping[str, tuple[float, Mapping[str, Mapping[int, EffectiveScale]]]],
) -> bytes:
    """Effective guidance scale against the size of the step.

    Args:
      panels: title -> (scale asked for, {name of a line: {N: EffectiveScale}}).

    Returns:
      PNG.
    """
    figure, axes = _axes(len(panels), width=5.4 * len(panels) + 0.6)
    colours = [ORANGE, PINK, BLUE]
    for ax, (title, (asked, curves)) in zip(axes, panels.items()):
        sizes = sorted(next(iter(curves.values())))
        expected = [asked ** math.log2(size) for size in sizes]
        scales = [e.scale for curve in curves.values() for e in curve.values()]
        top = max([*expected, *(s for s in scales if s > 0)])
        _powers_of_two(ax, sizes)
        _plain_log(ax, 0.6 if min(scales) > 0.3 else 0.2, 1.5 * top)
        ax.plot(sizes, expected, '--', color=GREY, linewidth=1.3)
        ax.plot(sizes, [asked] * len(sizes), color='0.75', linewidth=1.3, zorder=0)
        ends = [(sizes[-1], expected[-1], 'g ** log2 N', GREY)]
        if all(
            abs(curve[sizes[-1]].scale / asked - 1) > 0.15 for curve in curves.values()
        ):
            ends.append((sizes[-1], asked, 'asked for', '0.55'))
        for colour, (name, curve) in zip(
            colours[-len(curves) :] if len(curves) > 1 else [BLUE], curves.items()
        ):
            known = [
                (n, s) for n, (s, share) in curve.items() if share >= 0.5 and s > 0
            ]
            vague = [
                (n, e.scale)
                for n, e in curve.items()
                if not e.is_clear() and e.scale > 0
            ]
            if known:
                ax.plot(*zip(*known), 'o-', color=colour, markersize=5, linewidth=1.8)
                ends.append((sizes[-1], known[-1][1], name, colour))
            if vague:
                ax.plot(
                    *zip(*vague), 'o', color=colour, markersize=6,
                    markerfacecolor='white',
                )  # fmt: skip
        _label_lines(ax, ends, log=True)
        _title(ax, title, 'smallest steps in one jump, N', 'effective scale g')
    return _png(figure)


def response_figure(
    strengths: Sequence[float],
    responses: Mapping[str, Sequence[float]],
    reference: Sequence[float],
    strips: Mapping[float, np.ndarray],
) -> bytes:
    """How far samples move as w grows, and what that looks like.

    Args:
      strengths: [G] w, rising.
      responses: name -> [G] distance from the samples of the lowest w.
      reference: [G] the same by classifier-free guidance in many small steps.
      strips: some strengths -> [B, H, W, C] samples of the same noise; may be empty.

    Returns:
      PNG.
    """
    count = 2 if strips else 1
    figure, axes = _axes(count, width=6 * count - 0.4, ratios=[1.15, 1][:count])
    ax = axes[0]
    ax.plot(strengths, reference, '--', color=GREY, linewidth=1.5)
    highest = max(max(map(max, responses.values())), max(reference), 1e-3)
    ax.set_ylim(-0.02 * highest, 1.12 * highest)
    ends = [(strengths[-1], reference[-1], 'CFG, small steps', GREY)]
    for colour, (name, distance) in zip((ORANGE, BLUE, GREEN), responses.items()):
        ax.plot(strengths, distance, 'o-', color=colour, markersize=4, linewidth=1.8)
        ends.append((strengths[-1], distance[-1], name, colour))
    _label_lines(ax, ends, log=False)
    _title(ax, 'Response to guidance', 'guidance strength w', 'RMS move from lowest w')
    if strips:
        ax = axes[1]
        samples = np.stack(list(strips.values()), axis=1)  # [B, strengths, H, W, C]
        number = len(strips)
        scale = image_grid.readable_scale(samples.shape[3])
        picture = image_grid.grid(
            samples.reshape(-1, *samples.shape[2:]), number, scale=scale
        )
        ax.imshow(
            np.broadcast_to(picture, (*picture.shape[:2], 3)), interpolation='nearest'
        )
        ax.spines[:].set_visible(False)
        ax.grid(False)
        wide = samples.shape[3] * scale + 2
        ax.set_xticks([(i + 0.5) * wide for i in range(number)])
        ax.set_xticklabels([f'{w:.2g}' for w in strips])
        ax.set_yticks([])
        ax.tick_params(length=0)
        _title(ax, 'The same noise at rising w', 'guidance strength w', '')
    return _png(figure)


def spectrum_figure(
    frequencies: np.ndarray,
    data: np.ndarray,
    samples: Mapping[int, np.ndarray],
    level_ratios: Mapping[int, np.ndarray],
    noise_floor: np.ndarray,
) -> bytes:
    """Power against frequency, and samples' power over data's.

    Args:
      frequencies: [R] cycles per pixel, 0 first.
      data: [R] power.
      samples: number of steps -> [R].
      level_ratios: number of steps -> [L] log ratio per wavelet level, coarse to fine.
      noise_floor: [R] |log ratio| between two halves of the data.

    Returns:
      PNG.
    """
    figure, axes = _axes(3, width=13.2, height=4.0)
    shades = np.linspace(0, 1, len(samples))
    # From orange (one step) to blue (many), through a dark middle.
    mix = lambda a, b, s: tuple((1 - s) * np.asarray(a) + s * np.asarray(b))
    orange, blue = (0.84, 0.37, 0.0), (0.0, 0.35, 0.7)
    colours = {n: mix(orange, blue, s) for n, s in zip(samples, shades)}
    name = lambda n: '1 step' if n == 1 else f'{n} steps'

    ax, inside = axes[0], slice(1, None)
    ax.plot(frequencies[inside], data[inside], color='black', linewidth=2.4)
    for n, power in samples.items():
        ax.plot(frequencies[inside], power[inside], color=colours[n], linewidth=1.5)
    ax.set_xscale('log')
    ax.set_yscale('log')
    ticks = [f for f in (0.03125, 0.0625, 0.125, 0.25, 0.5) if f >= frequencies[1]]
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f'{v:.2g}'))
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ends = [(frequencies[-1], data[-1], 'data', 'black')]
    ends += [(frequencies[-1], p[-1], name(n), colours[n]) for n, p in samples.items()]
    _label_lines(ax, ends, log=True)
    _title(ax, 'Radial power', 'cycles per pixel', 'power')

    ax = axes[1]
    half = frequencies[-1] / 2
    ax.axvspan(half, frequencies[-1], color='0.955', zorder=0, linewidth=0)
    ax.axhline(0, color='black', linewidth=1.2)
    ax.fill_between(
        frequencies[inside], -noise_floor[inside], noise_floor[inside], color='0.8',
        linewidth=0,
    )  # fmt: skip
    ends, extent = [], 0.3
    for n, power in samples.items():
        ratio = np.log(power / data)
        extent = max(extent, float(np.abs(ratio[inside]).max()))
        ax.plot(frequencies[inside], ratio[inside], color=colours[n], linewidth=1.5)
        ends.append((frequencies[-1], ratio[-1], name(n), colours[n]))
    ax.set_ylim(-1.1 * extent, 1.1 * extent)
    _factors(ax, extent)
    _label_lines(ax, ends, log=False)
    ax.annotate(
        'upper half', (half, 1.08 * extent), xytext=(4, -4), color=GREY,
        textcoords='offset points', fontsize=_FONT - 1.5, va='top',
    )  # fmt: skip
    _title(ax, "Samples' power over data's", 'cycles per pixel', 'factor')

    ax = axes[2]
    ax.axhline(0, color='black', linewidth=1.2)
    levels = len(next(iter(level_ratios.values())))
    extent = max(0.3, *(float(np.abs(r).max()) for r in level_ratios.values()))
    ends = []
    for n, ratio in level_ratios.items():
        ax.plot(
            np.arange(levels), ratio, 'o-', color=colours[n], markersize=5,
            linewidth=1.2,
        )  # fmt: skip
        ends.append((levels - 1, ratio[-1], name(n), colours[n]))
    ax.set_ylim(-1.1 * extent, 1.1 * extent)
    _factors(ax, extent)
    _label_lines(ax, ends, log=False)
    ax.set_xticks(np.arange(levels))
    ax.set_xticklabels([f'{2**level}' for level in range(levels, 0, -1)])
    ax.set_xlim(-0.3, levels - 0.7)
    _title(ax, 'The same by wavelet level', 'size of the detail in pixels', 'factor')
    return _png(figure)


def _factors(ax, extent: float) -> None:
    """Labels a linear axis of logarithms with the factors that they mean."""
    choices = (1.25, 1.5, 2, 3, 5, 10, 30, 100, 1000, 1e4)
    shown = [f for f in choices if math.log(f) <= extent * 1.05]
    kept = []
    for factor in reversed(shown):  # Not so many that they touch.
        if not kept or math.log(kept[-1] / factor) > 0.2 * extent:
            kept.append(factor)
    kept = [f for f in kept if math.log(f) > 0.2 * extent]
    values = [*(-math.log(f) for f in kept), 0, *(math.log(f) for f in kept)]
    ax.set_yticks(values)
    ax.set_yticklabels(
        [*(f'1/{f:g}' for f in kept), '1', *(f'{f:g}' for f in kept)]
    )  # fmt: skip


def consistency_figure(
    errors: Mapping[float, Mapping[float, float]],
    lags: Mapping[str, Mapping[str, float]],
) -> bytes:
    """Self-consistency error per step size, and lags of the averages.

    Args:
      errors: w -> {whole step 2d: relative error}; empty where there are no steps.
      lags: name of an average -> {what: relative distance from the online network}.

    Returns:
      PNG.
    """
    count = bool(errors) + bool(lags)
    ratios = [1.15, 1] if count == 2 else [1]
    figure, axes = _axes(count, width=5.6 * count + 0.3, ratios=ratios)
    if errors:
        ax = axes[0]
        sizes = sorted(next(iter(errors.values())))
        values = [value for curve in errors.values() for value in curve.values()]
        _powers_of_two(ax, sizes)
        ax.set_xticklabels([f'1/{1 / size:g}' if size < 1 else '1' for size in sizes])
        low, high = max(min(values), 1e-6), max(max(values), 1e-5)
        _plain_log(ax, low / 1.6, high * 1.6)
        ends = []
        for colour, (w, curve) in zip((GREY, BLUE, ORANGE), errors.items()):
            line = [max(curve[size], 1e-6) for size in sizes]  # On a log axis.
            ax.plot(sizes, line, 'o-', color=colour, markersize=5, linewidth=1.8)
            ends.append((sizes[-1], line[-1], f'w = {w:g}', colour))
        _label_lines(ax, ends, log=True)
        _title(
            ax, 'One step against its two halves', 'size of the whole step, 2d',
            'relative error',
        )  # fmt: skip
    if lags:
        ax = axes[-1]
        names = list(next(iter(lags.values())))
        place = np.arange(len(names), dtype=float)
        thick = 0.8 / len(lags)
        for i, (colour, (average, values)) in enumerate(zip((BLUE, SKY), lags.items())):
            spots = place + (i - (len(lags) - 1) / 2) * thick
            ax.barh(spots, [values[n] for n in names], 0.9 * thick, color=colour)
            for number, (spot, what) in enumerate(zip(spots, names)):
                text = f'{100 * values[what]:.2g} %'
                text += f'  {average}' if number == 0 else ''
                ax.annotate(
                    text, (values[what], spot), xytext=(4, 0), va='center',
                    textcoords='offset points', fontsize=_FONT - 1, color='0.2',
                    annotation_clip=False,
                )  # fmt: skip
        ax.set_yticks(place)
        ax.set_yticklabels(names)
        ax.invert_yaxis()
        ax.grid(False)
        ax.set_xlim(0, 1.5 * max(max(v.values()) for v in lags.values()) + 1e-9)
        ax.xaxis.set_major_formatter(ticker.PercentFormatter(1.0))
        ax.xaxis.set_major_locator(ticker.MaxNLocator(4))
        _title(ax, 'Distance from the online network', 'relative to its size', '')
    return _png(figure)


def trajectory_figure(
    profile: tuple[np.ndarray, np.ndarray] | None,
    ratios: np.ndarray | None,
    crossings: Mapping[str, float],
) -> bytes:
    """How curved paths are, and how often pairs cross.

    Args:
      profile: of `diagnostics.path_profile`, or None.
      ratios: [B] path length over displacement, or None.
      crossings: name of a coupling -> share of pairs better swapped.

    Returns:
      PNG.
    """
    count = 1 if profile is None else 3
    widths = [1.25, 0.85, 1][-count:]
    figure, axes = _axes(count, width=(13.2 if count == 3 else 5.6), ratios=widths)
    if profile is not None:
        along, across = (array[:, :24] for array in profile)
        ax = axes[0]
        ax.plot(along, across, color=BLUE, linewidth=1, alpha=0.45)
        ax.plot([0, 1], [0, 0], color='black', linewidth=1.5)
        ax.plot([0, 1], [0, 0], 'o', color='black', markersize=6)
        top = max(0.25, 1.15 * float(across.max()))
        ax.set_ylim(-0.13 * top, top)
        for x, name, side in ((0, 'noise', 'left'), (1, 'sample', 'right')):
            ax.annotate(
                name, (x, 0), xytext=(0, -8), va='top', textcoords='offset points',
                ha=side, fontsize=_FONT - 0.5,
            )  # fmt: skip
        _title(
            ax, 'Paths seen from the side', 'progress along the straight line',
            'distance from it',
        )  # fmt: skip
        ax = axes[1]
        ax.hist(ratios, bins=min(24, max(6, len(ratios) // 4)), color=BLUE)
        ax.set_xlim(left=min(1.0, float(ratios.min())))
        ax.yaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
        _title(ax, 'Length of paths', 'length / straight line', 'samples')
    ax = axes[-1]
    place = np.arange(len(crossings))
    values = list(crossings.values())
    ax.barh(
        place, values, 0.6, color=[GREY if 'indep' in n else BLUE for n in crossings]
    )
    for spot, value in zip(place, values):
        ax.annotate(
            f'{100 * value:.3g} %', (value, spot), xytext=(4, 0), va='center',
            textcoords='offset points', fontsize=_FONT - 0.5,
        )  # fmt: skip
    ax.set_yticks(place)
    ax.set_yticklabels(crossings)
    ax.invert_yaxis()
    ax.grid(False)
    ax.set_xlim(0, 0.68)
    ax.set_xticks([0, 0.25, 0.5])
    ax.xaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    _title(ax, 'Pairs better swapped', 'share of pairs of pairs', '')
    return _png(figure)


_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1080px; padding: 2rem 1.5rem 4rem;
  background: #fff; color: #1d1d1f;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .1rem; }
.about, .question, figcaption, footer { color: #5c5c61; }
.question { margin: 0 0 .8rem; }
table { border-collapse: collapse; width: 100%; margin: 1.6rem 0 1rem;
  font-size: .94rem; }
th { text-align: left; font-weight: 600; color: #5c5c61;
  border-bottom: 2px solid #1d1d1f; padding: .35rem .8rem .35rem 0; }
td { vertical-align: top; padding: .55rem .8rem .55rem 0;
  border-bottom: 1px solid #e4e4e7; }
td:first-child { min-width: 11.5rem; } td:last-child { width: 30%; }
td a { color: inherit; font-weight: 600; }
.grade { display: inline-block; min-width: 2.6rem; margin-right: .5rem;
  padding: 0 .5rem; border-radius: .7rem; font-size: .82rem; font-weight: 600;
  text-align: center; }
.good { background: #cfeee4; color: #00513b; }
.fair { background: #fdeac2; color: #5e4300; }
.poor { background: #fbd9c7; color: #7a3000; }
.none { background: #ececef; color: #4a4a4f; }
figure { margin: 1rem 0 0; }
figure img { max-width: 100%; height: auto; }
figcaption { font-size: .88rem; margin-top: .3rem; }
"""
_GRADES = {'good': 'good', 'fair': 'fair', 'poor': 'poor', 'none': 'n/a'}


def page(title: str, about: str, sections: Sequence[Section], notes: str) -> str:
    """The report as one HTML file.

    Args:
      title, about: heading and the line below it.
      sections: in order.
      notes: small print at the end.
    """
    escape = html.escape
    rows, bodies = [], []
    for number, section in enumerate(sections, 1):
        grade = (
            f'<span class="grade {section.grade}">{_GRADES[section.grade]}</span>'
            f'{escape(section.verdict)}'
        )
        rows.append(
            f'<tr><td><a href="#fault-{number}">{number}. {escape(section.fault)}</a>'
            f'</td><td>{escape(section.number)}</td><td>{escape(section.good)}</td>'
            f'<td>{grade}</td></tr>'
        )
        picture = ''
        if section.figure is not None:
            data = base64.b64encode(section.figure).decode()
            picture = (
                f'<figure><img alt="{escape(section.caption)}" '
                f'src="data:image/png;base64,{data}">'
                f'<figcaption>{escape(section.caption)}</figcaption></figure>'
            )
        bodies.append(
            f'<section id="fault-{number}"><h2>{number}. {escape(section.fault)}</h2>'
            f'<p class="question">{escape(section.question)}</p>'
            f'<p>{escape(section.text)}</p><p>{grade}</p>{picture}</section>'
        )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n'
        f'<h1>{escape(title)}</h1><p class="about">{escape(about)}</p>\n'
        '<table><thead><tr><th>Fault</th><th>Measured</th><th>A good value</th>'
        f'<th>Verdict</th></tr></thead><tbody>{"".join(rows)}</tbody></table>\n'
        + '\n'.join(bodies)
        + f'\n<footer><p>{escape(notes)}</p></footer>\n</body></html>\n'
    )
