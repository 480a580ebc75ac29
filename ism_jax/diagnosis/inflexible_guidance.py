"""Fault 2: the guidance scale is fixed in training.

The measure is how far samples move as w grows, with the noise and labels fixed, against
classifier-free guidance (CFG) in finest steps of the same network.
"""

from collections.abc import Mapping, Sequence
import math

import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.diagnosis import figure_axes, report
from ism_jax.diagnosis import subject as subjects
from ism_jax.diagnosis.figure_axes import BLUE, GREY, ORANGE, Line
from ism_jax.diagnosis.subject import Subject, relative_rms, rms
from ism_jax.method import interpolant
from ism_jax.sampling import image_grid

NUM_GUIDANCES = 8
STEP_COUNTS = (1, 4)
# Samples in the figure, and the indices of their guidance scales.
NUM_SHOWN, SHOWN = 5, (0, 2, 4, 7)
ABOUT = dict(
    fault='Inflexible guidance',
    question='Can the guidance scale be chosen at sampling time?',
    good='moves as far as CFG, and farther with every increase of w',
    text='The guidance scale w trades diversity for fidelity. A shortcut model fixes '
    'it in training, so that it cannot be changed afterwards. iSM takes w as an input '
    'and should respond like classifier-free guidance (CFG), which needs two network '
    'evaluations in each of many small steps.',
)


def guidance_response(samples) -> tuple[np.ndarray, float]:
    """How samples move as w grows.

    Args:
      samples: [G, B, H, W, C] of the same noise and labels at G increasing w.

    Returns:
      The RMS distance per value from the samples at the lowest w, [G], and the share of
      the increases of w that move samples farther away.
    """
    samples = np.asarray(samples, np.float64)
    distance = np.asarray([rms(x - samples[0]) for x in samples])
    return distance, float(np.mean(np.diff(distance) > 0))


def displacement_agreement(samples, reference) -> tuple[float, float]:
    """Compares the displacement from the lowest to the highest w with a reference's.

    Both are [G, B, H, W, C], as for `guidance_response`.

    Returns:
      The size relative to the reference's, and the cosine of the angle between the two
      (0 where nothing moves).
    """
    move, other = (
        np.asarray(x[-1], np.float64) - np.asarray(x[0], np.float64)
        for x in (samples, reference)
    )
    product = rms(move) * rms(other)
    cosine = float(np.mean(move * other) / product) if product else 0.0
    return relative_rms(move, other), cosine


def cfg_samples(subject: Subject, guidances: Sequence[float], num: int) -> np.ndarray:
    """Samples in finest steps with CFG of scale 1 + w, [G, num, H, W, C]."""
    _, _, label = subject.pairs(num)
    noise = subject.sampler_noise(num)
    t = jnp.full(label.shape, subject.objective.start_time)
    steps, field_scale = subject.objective.base_steps, subject.field_scale()

    @jax.jit
    def samples(scale):
        velocity = subject.cfg_velocity(noise, t, 1 - t, label, steps, scale)
        return interpolant.step(noise, velocity, 1 - t)

    return np.stack([np.asarray(samples((1 + w) / field_scale)) for w in guidances])


def diagnose(subject: Subject) -> report.Section:
    """Measures how samples respond to w."""
    low, high = subject.guidance_range
    if not high:
        verdict = f'{subject.method} has no guidance'
        return report.Section(**ABOUT, **report.not_applicable(verdict))
    fixed = low == high
    num = min(subjects.NUM_SAMPLES, len(subject.label))
    ends = (0, subjects.MAX_GUIDANCE) if fixed else (low, high)
    guidances = np.linspace(*ends, NUM_GUIDANCES)
    reference = cfg_samples(subject, guidances, num)
    distances, images = {'CFG, small steps': guidance_response(reference)[0]}, {}
    for steps in [n for n in STEP_COUNTS if n <= subject.objective.base_steps]:
        name = image_grid.step_count(steps)
        if fixed:
            distances[name] = np.zeros(len(guidances))
            continue
        samples = np.stack([subject.samples(steps, w, num) for w in guidances])
        distances[name], monotone = guidance_response(samples)
    if fixed:
        number = f'no movement: w = {report.number(low)} is fixed in training'
        verdict, grade = 'w cannot be chosen at sampling time', 'poor'
    else:
        size, cosine = displacement_agreement(samples, reference)
        grade, verdict = judge(size, cosine, monotone)
        number = (
            f'{report.percent(size)} as far as CFG at w = {report.number(high)} in '
            f'{name} (cosine {report.number(cosine)}); farther with '
            f'{report.percent(monotone)} of the increases of w'
        )
        if samples.shape[-1] in (1, 3):
            images = {guidances[i]: samples[i, :NUM_SHOWN] for i in SHOWN}
    return report.Section(
        **ABOUT,
        number=number,
        verdict=verdict,
        grade=grade,
        figure=figure(guidances, distances, images),
        caption='RMS distance per value (black to white is 2) of samples from those at '
        'the lowest w, with the same noise and labels. Dashed: finest steps of the '
        'same network with CFG of scale 1 + w.'
        + (f' Right: samples in {name}.' if images else ''),
    )


def judge(size: float, cosine: float, monotone: float) -> tuple[report.Grade, str]:
    """Grade and verdict; see `displacement_agreement` and `guidance_response`."""
    grade = 'poor'
    if monotone >= 0.8 and cosine >= 0.5:
        grade = report.grade(abs(math.log(max(size, 1e-9))), 0.4, 1.1)
    return grade, {
        'good': 'responds to w like CFG',
        'fair': f'responds to w, but {"less" if size < 1 else "more"} than CFG',
        'poor': 'does not respond to w like CFG',
    }[grade]


def figure(guidances: Sequence[float], distances, images) -> bytes:
    """PNG of how far samples move as w grows, and of some samples.

    Args:
      guidances: [G] w, increasing.
      distances: name -> [G] RMS distance from the samples at the lowest w; CFG first.
      images: w -> [B, H, W, C] samples of the same noise; may be empty.
    """
    x = 'guidance scale w'
    titles = [('Response to guidance', x, 'RMS distance from lowest w')]
    if images:
        titles.append(('The same noise at increasing w', x, ''))
    canvas, axes = figure_axes.panels(titles, [6.2, 5.4][: len(titles)])
    ax, top = axes[0], max(1e-3, *map(max, distances.values()))
    ax.set_ylim(-0.02 * top, 1.12 * top)
    styles = zip((GREY, ORANGE, BLUE), ('--', 'o-', 'o-'), strict=True)
    lines = [
        Line(name, guidances, distance, *style)
        for (name, distance), style in zip(distances.items(), styles, strict=False)
    ]
    figure_axes.draw_lines(ax, lines)
    if images:
        _draw_images(axes[1], images)
    return figure_axes.png(canvas)


def _draw_images(ax, images: Mapping[float, np.ndarray]) -> None:
    samples = np.stack(list(images.values()), axis=1)  # [B, number of w, H, W, C]
    side = samples.shape[3]
    scale = image_grid.readable_scale(side)
    picture = image_grid.grid(
        samples.reshape(-1, *samples.shape[2:]), len(images), scale=scale
    )
    rgb = np.broadcast_to(picture, (*picture.shape[:2], 3))
    ax.imshow(rgb, interpolation='nearest')
    ax.spines[:].set_visible(False)
    ax.grid(False)
    ticks = [
        (i + 0.5) * (side * scale + image_grid.PADDING) for i in range(len(images))
    ]
    ax.set_xticks(ticks, [f'{w:.2g}' for w in images])
    ax.set_yticks([])
    ax.tick_params(length=0)
