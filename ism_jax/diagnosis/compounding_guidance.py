"""Fault 1: the guidance of large steps compounds.

The measure is the *effective guidance scale* of a step as long as N finest steps: the
scale g' in [-1, 64] at which the mean velocity of N guided finest steps is nearest to
that of the one large step, in least squares over a batch. The small steps start where
the large step starts and follow their own path, so the estimate is exact for a step
that *is* N guided steps, for any field.

`guidance_recursion` has the scales of perfectly trained networks.
"""

from collections.abc import Callable, Mapping
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from ism_jax.diagnosis import figure_axes, report
from ism_jax.diagnosis.figure_axes import BLUE, GREY, ORANGE, PINK, Line
from ism_jax.diagnosis.subject import NUM_SAMPLES, Subject, step_sizes

# Range of the search; proposition 1 predicts at most 17.
MIN_SCALE, MAX_SCALE = -1.0, 64.0
# If guided small steps explain less of a step, it has no effective scale.
MIN_EXPLAINED = 0.5
# w for networks that are not trained for a single w.
GUIDANCE = 1.5
# g in the flow known in closed form.
CLOSED_FORM_SCALE = 1.5
ABOUT = dict(
    fault='Compounding guidance',
    question='Do large steps have the guidance scale that was requested?',
    good='the requested scale at every N',
    text='Classifier-free guidance of scale g pushes samples towards their class. A '
    'method that applies it again at every doubling of the step size trains a step of '
    'N finest steps with scale g to the power log2 N: 17 instead of 1.5 at N = 128.',
)


class EffectiveScale(NamedTuple):
    """The guidance scale of one step size.

    Attributes:
      scale: g'; 1 means no guidance.
      explained: share of the squared difference between the step and unconditional
        small steps that guided small steps of this scale account for, at most 1.
    """

    scale: float
    explained: float

    def is_clear(self) -> bool:
        """Whether the scale is inside the range and explains the step."""
        inside = MIN_SCALE + 0.01 < self.scale < 0.99 * MAX_SCALE
        return inside and self.explained >= MIN_EXPLAINED


Scales = Mapping[int, EffectiveScale]


def effective_scale(
    large_step: jax.Array, small_steps: Callable[[float], jax.Array]
) -> EffectiveScale:
    """The guidance scale whose small steps are nearest to one large step.

    Args:
      large_step: mean velocity of the large step, [B, H, W, C].
      small_steps: scale -> mean velocity of guided small steps from the same points.

    Raises:
      ValueError: guidance has no effect, or the velocity is not finite.
    """
    large_step = np.asarray(large_step, np.float64)

    def error(scale):
        difference = large_step - np.asarray(small_steps(scale), np.float64)
        # Steps with far too large scales may overflow.
        return np.nan_to_num(np.mean(np.square(difference)), nan=np.inf)

    grid = np.concatenate([[MIN_SCALE, 0], np.geomspace(0.5, MAX_SCALE, 15)])
    errors = [error(scale) for scale in grid]
    spread = np.ptp(np.nan_to_num(errors, posinf=1e30))
    if not spread > 1e-12 * np.mean(large_step**2):
        raise ValueError(
            'the velocity does not depend on the label, or is not finite; choose '
            'another checkpoint or train for longer'
        )
    best = int(np.argmin(errors))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = optimize.minimize_scalar(
        error, bounds=bounds, method='bounded', options=dict(xatol=1e-4)
    )
    return EffectiveScale(float(found.x), float(1 - found.fun / errors[1]))


def requested_guidance(subject: Subject) -> float:
    """The w at which a network is measured; 0 where the fault cannot occur."""
    low, high = subject.guidance_range
    if not subject.objective.conditions_on_step:
        return 0.0
    return low if low == high else min(GUIDANCE, high)


def network_scales(subject: Subject, w: float) -> Scales:
    """Effective guidance scales of the network's own steps at guidance w."""
    num = NUM_SAMPLES // 2
    _, _, label = subject.pairs(num)
    rng = np.random.default_rng(subject.seed)
    field_scale = subject.field_scale()
    cfg_velocity = jax.jit(subject.cfg_velocity)

    def small_steps(x, t, d, steps, scale):
        return cfg_velocity(x, t, d, label, steps, scale / field_scale)

    scales = {}
    for steps in step_sizes(subject.objective.base_steps):
        # Steps that end before guidance begins have no scale.
        after = subject.objective.guidance_interval
        x, t, d = subject.step_starts(rng, num, steps, after)
        large_step = subject.velocity(x, t, d, jnp.full_like(t, w), label)
        small = functools.partial(small_steps, x, t, d, steps)
        scales[steps] = effective_scale(large_step, small)
    return scales


def diagnose(subject: Subject, closed_form: Mapping[str, Scales]) -> report.Section:
    """Measures the guidance scale of the network's steps.

    Args:
      subject: the network.
      closed_form: see `guidance_recursion.closed_form_scales`, for comparison.
    """
    w = requested_guidance(subject)
    panels = {'Gaussian flow in closed form': (CLOSED_FORM_SCALE, closed_form)}
    if not w:
        guided = subject.guidance_range[1] > 0
        reason = 'is not conditioned on the step size' if guided else 'has no guidance'
        return report.Section(
            **ABOUT,
            **report.not_applicable(f'{subject.method} {reason}'),
            figure=figure(panels),
            caption='Scales in a Gaussian flow known in closed form, for comparison.',
        )
    scales = network_scales(subject, w)
    return report.Section(
        **ABOUT,
        **judge(scales, 1 + w),
        figure=figure({'This network': (1 + w, {subject.method: scales})} | panels),
        caption='Guidance scale at which N finest steps are nearest to one step of '
        f'the same length. Hollow points: no scale from {MIN_SCALE:g} to '
        f'{MAX_SCALE:g} explains half of the step.',
    )


def judge(scales: Scales, requested: float) -> dict[str, str]:
    """The number, verdict and grade of a network's scales."""
    clear = [n for n, found in scales.items() if found.is_clear()]
    if not clear:
        verdict = 'no guidance scale explains the steps: train for longer'
        return dict(number='undetermined', verdict=verdict, grade='none')
    last = clear[-1]
    scale = scales[last].scale
    ratio = scale / requested
    grade = report.grade(abs(math.log(ratio)) if ratio > 0 else 9, 0.15, 0.5)
    if grade == 'good':
        verdict = 'large steps have the requested guidance'
    elif ratio > 1:
        times = report.number(ratio)
        verdict = f'the guidance of large steps is {times} times the requested one'
    else:
        grade = 'fair'  # A fault, but not this one.
        fades = scale / scales[clear[0]].scale < 0.8
        where = 'in large steps' if fades else 'at every step size'
        verdict = f'guidance is weaker than requested {where}'
    if last < max(scales):
        verdict += '; no guidance scale explains larger steps'
    found, wanted = report.number(scale), report.number(requested)
    number = f'g = {found} at N = {last}, requested {wanted}'
    return dict(number=number, verdict=verdict, grade=grade)


def figure(panels: Mapping[str, tuple[float, Mapping[str, Scales]]]) -> bytes:
    """PNG of the effective guidance scale against the step size.

    Args:
      panels: title -> (requested scale, {name of a line: {N: its scale}}).
    """
    x, y = 'step size in finest steps, N', 'effective guidance scale g'
    titles = [(title, x, y) for title in panels]
    canvas, axes = figure_axes.panels(titles, [5.7] * len(panels))
    for ax, (requested, curves) in zip(axes, panels.values(), strict=True):
        _draw_panel(ax, requested, curves)
    return figure_axes.png(canvas)


def _draw_panel(ax, requested: float, curves: Mapping[str, Scales]) -> None:
    sizes = sorted(next(iter(curves.values())))
    expected = [requested ** math.log2(size) for size in sizes]
    found = [e.scale for scales in curves.values() for e in scales.values()]
    figure_axes.set_x_ticks(ax, sizes, sizes)
    low = 0.6 if min(found) > 0.3 else 0.2
    figure_axes.set_log_limits(ax, low, 1.5 * max(expected + found))
    ax.plot(sizes, [requested] * len(sizes), color='0.75', linewidth=1.3, zorder=0)
    ax.plot(sizes, expected, '--', color=GREY, linewidth=1.3)
    labels, last = [Line('g ** log2 N', sizes, expected, GREY)], sizes[-1]
    if all(abs(c[last].scale / requested - 1) > 0.15 for c in curves.values()):
        labels.append(Line('requested', [last], [requested], '0.55'))
    colours = [ORANGE, PINK, BLUE][-len(curves) :]
    for colour, (name, scales) in zip(colours, curves.items(), strict=True):
        positive = {n: e for n, e in scales.items() if e.scale > 0}
        unclear = {n: e.scale for n, e in positive.items() if not e.is_clear()}
        ax.plot(unclear.keys(), unclear.values(), 'o', color=colour, mfc='white')
        clear = {n: e.scale for n, e in positive.items() if e.is_clear()}
        if clear:
            ax.plot(clear.keys(), clear.values(), 'o-', color=colour, markersize=5)
            labels.append(Line(name, [last], [*clear.values()][-1:], colour))
    figure_axes.draw_lines(ax, [], labels)
