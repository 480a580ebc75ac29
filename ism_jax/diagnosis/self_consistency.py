"""Fault 4: one step disagrees with its two halves, and the target EMA lags behind."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from matplotlib import ticker
import numpy as np

from ism_jax.diagnosis import figure_axes, report
from ism_jax.diagnosis.figure_axes import BLUE, GREY, ORANGE, SKY, Line
from ism_jax.diagnosis.subject import NUM_SAMPLES, Subject, relative_rms, step_sizes
from ism_jax.method import interpolant

ABOUT = dict(
    fault='Divergent self-consistency',
    question='Does one step agree with its two halves, and the target EMA with the '
    'online network?',
    good='error below 0.1, smaller for smaller steps; lag of a few percent',
    text='A shortcut model learns a large step from two half steps of the target EMA. '
    'If the target EMA lags far behind the online network, its targets are out of '
    'date, and one step and its two halves diverge.',
)
EMA_NAMES = {'target': 'target EMA', 'infer': 'inference EMA'}


def parameter_distance(ema, online) -> float:
    """||ema - online|| / ||online|| over all parameters of two trees."""
    squares = np.zeros(2)
    for a, b in zip(jax.tree.leaves(ema), jax.tree.leaves(online), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        squares += np.sum(np.square(a - b)), np.sum(np.square(b))
    return float(np.sqrt(squares[0] / squares[1]))


def self_consistency_error(velocity, x, t, d, w, label) -> float:
    """Relative difference between one step of 2d and two steps of d.

    RMS[ s(x, t, 2d) - (s(x, t, d) + s(x', t + d, d)) / 2 ] / RMS[ s(x, t, 2d) ],
    x' = x + d s(x, t, d), for the mean velocity s(x [B, H, W, C], t, d, w, label [B]).
    """
    whole = velocity(x, t, 2 * d, w, label)
    first = velocity(x, t, d, w, label)
    second = velocity(interpolant.step(x, first, d), t + d, d, w, label)
    return relative_rms(np.asarray(whole) - np.asarray(first + second) / 2, whole)


def consistency_errors(subject: Subject) -> dict[float, dict[float, float]]:
    """{w: {size 2d of the full step: error}} at points of training paths."""
    num, base_steps = 2 * NUM_SAMPLES, subject.objective.base_steps
    _, _, label = subject.pairs(num)

    def error(rng, w, steps):
        x, t, whole = subject.step_starts(rng, num, steps)
        w = jnp.full_like(t, w)
        return self_consistency_error(subject.velocity, x, t, whole / 2, w, label)

    low, high = subject.guidance_range
    sizes = step_sizes(base_steps)[1:]
    errors = {}
    for w in sorted({low, (low + high) / 2, high}):
        rng = np.random.default_rng(subject.seed)  # The same points for every w.
        errors[w] = {steps / base_steps: error(rng, w, steps) for steps in sizes}
    return errors


def output_distances(subject: Subject, ema) -> dict[str, float]:
    """Relative distance of an EMA's outputs from the online network's, by step size."""
    num, base_steps = 2 * NUM_SAMPLES, subject.objective.base_steps
    _, _, label = subject.pairs(num)
    low, _ = subject.guidance_range
    rng = np.random.default_rng(subject.seed)
    sizes = [base_steps]
    if subject.objective.conditions_on_step:
        sizes = sorted({base_steps, max(1, base_steps // 8), 1}, reverse=True)
    distances = {}
    for steps in sizes:
        x, t, d = subject.step_starts(rng, num, steps)
        online, other = (
            np.asarray(subject.apply(p, x, t, d, jnp.full_like(t, low), label))
            for p in (subject.parameter_sets['online'], ema)
        )
        size = f', d = {_fraction(steps / base_steps)}' if len(sizes) > 1 else ''
        distances[f'outputs{size}'] = relative_rms(other - online, online)
    return distances


def diagnose(subject: Subject) -> report.Section:
    """Measures self-consistency, and the lag of the EMAs behind the online network."""
    has_steps = subject.objective.conditions_on_step
    errors = consistency_errors(subject) if has_steps else {}
    online = subject.parameter_sets['online']
    lags = {
        EMA_NAMES[name]: {'parameters': parameter_distance(ema, online)}
        | output_distances(subject, ema)
        for name, ema in subject.parameter_sets.items()
        if name != 'online'
    }
    name, lag = next(iter(lags.items()))
    output_lag = max(value for key, value in lag.items() if key != 'parameters')
    lag = (
        f'{name} lags by {report.percent(lag["parameters"])} in parameters, '
        f'{report.percent(output_lag)} in outputs'
    )
    caption = (
        'Distance of each EMA from the online network; outputs are at the same inputs.'
    )
    if errors:
        caption = (
            'Left: RMS difference between one step and its two halves, relative to the '
            f'step. Right: {caption}'
        )
        mean = np.mean([e for curve in errors.values() for e in curve.values()])
        uses_target = subject.objective.uses_target_ema
        grade, verdict = judge(mean, output_lag if uses_target else 0)
        if not uses_target:
            verdict += f' ({subject.method} does not use a target EMA)'
        number = f'error {report.number(mean)}; {lag}'
        judged = dict(number=number, verdict=verdict, grade=grade)
    else:
        verdict = f'{subject.method} is not conditioned on the step size'
        judged = report.not_applicable(verdict, f'error not applicable; {lag}')
    return report.Section(
        **ABOUT, **judged, figure=figure(errors, lags), caption=caption
    )


def judge(error: float, lag: float) -> tuple[report.Grade, str]:
    """Grade and verdict of the mean error and the lag of the target EMA's outputs."""
    # A target that is off by more than the error is a fault too.
    grade = report.grade(max(error, lag), 0.1, 0.3)
    if grade == 'poor' and error < 0.3:
        return grade, 'the target EMA lags far behind'
    relation = dict(
        good='agree with', fair='differ somewhat from', poor='disagree with'
    )
    return grade, f'steps {relation[grade]} their halves'


def figure(errors, lags: Mapping[str, Mapping[str, float]]) -> bytes:
    """PNG of the error per step size, and of the lags of the EMAs.

    Args:
      errors: w -> {size of the full step: relative error}; may be empty.
      lags: name of an EMA -> {measure: relative distance from the online network}.
    """
    distance = 'Distance from the online network'
    titles = [(distance, 'relative to the online network', '')]
    if errors:
        x = 'size of the full step, 2d'
        titles.insert(0, ('One step against its two halves', x, 'relative error'))
    canvas, axes = figure_axes.panels(titles, [6.1, 5.4][-len(titles) :])
    if errors:
        _draw_errors(axes[0], errors)
    _draw_lags(axes[-1], lags)
    return figure_axes.png(canvas)


def _draw_errors(ax, errors) -> None:
    sizes = sorted(next(iter(errors.values())))
    # On a logarithmic axis.
    values = {w: [max(e[size], 1e-6) for size in sizes] for w, e in errors.items()}
    low, high = min(map(min, values.values())), max(map(max, values.values()))
    figure_axes.set_x_ticks(ax, sizes, [_fraction(size) for size in sizes])
    figure_axes.set_log_limits(ax, low / 1.6, 1.6 * max(high, 1e-5))
    lines = [
        Line(f'w = {report.number(w)}', sizes, line, colour, 'o-')
        for colour, (w, line) in zip((GREY, BLUE, ORANGE), values.items(), strict=False)
    ]
    figure_axes.draw_lines(ax, lines)


def _draw_lags(ax, lags) -> None:
    names = list(next(iter(lags.values())))
    groups = {ema: list(values.values()) for ema, values in lags.items()}
    texts = {ema: list(map(report.percent, values)) for ema, values in groups.items()}
    for ema in texts:
        texts[ema][0] += f'  {ema}'
    figure_axes.draw_bars(ax, names, groups, texts, [BLUE, SKY])
    ax.set_xlim(0, 1.5 * max(map(max, groups.values())) + 1e-9)
    ax.xaxis.set_major_locator(ticker.MaxNLocator(4))


def _fraction(size: float) -> str:
    return '1' if size == 1 else f'1/{1 / size:g}'
