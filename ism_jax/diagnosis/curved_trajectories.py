"""Fault 5: sampling paths are curved, and training pairs cross."""

from collections.abc import Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
from matplotlib import ticker
import numpy as np

from ism_jax.diagnosis import figure_axes, report
from ism_jax.diagnosis.figure_axes import BLACK, BLUE, GREY
from ism_jax.diagnosis.subject import NUM_SAMPLES, Subject
from ism_jax.method import interpolant, time_grid
from ism_jax.sampling import image_grid

# Paths in the figure.
NUM_SHOWN = 24
# Random pairs of pairs per crossing rate; its standard error is at most 0.0016.
NUM_PAIRS = 100_000
ABOUT = dict(
    fault='Curved trajectories',
    question='Are the paths from noise to data straight?',
    good='length 1, S = 0, crossing rate 0% (independent pairs: 50%)',
    text='A straight path needs one step; a curved one needs many. Paths curve where '
    'training pairs of noise and data cross, so pairs made by optimal transport give '
    'straighter paths.',
)


def trajectory(velocity, noise, w, label, times, steps) -> jax.Array:
    """The sampler's path, starting at the noise, [N + 1, B, H, W, C].

    `times` and `steps`, [N], are the start times and sizes of its steps.
    """

    def body(x, step):
        t, d = (jnp.full(label.shape, value) for value in step)
        x = interpolant.step(x, velocity(x, t, d, w, label), d)
        return x, x

    _, path = jax.lax.scan(body, noise, (jnp.asarray(times), jnp.asarray(steps)))
    return jnp.concatenate([noise[None], path])


def path_length_ratio(path) -> np.ndarray:
    """Length of each path divided by the distance between its ends, [B].

    It is 1 for a straight path and pi / 2 for a half circle.

    Args:
      path: [N + 1, B, ...].
    """
    path = _flatten(path)
    distance = np.linalg.norm(path[-1] - path[0], axis=-1)
    return np.linalg.norm(np.diff(path, axis=0), axis=-1).sum(0) / distance


def straightness(path, steps: Sequence[float]) -> float:
    """S = mean over t, samples and values of ((x1 - x0) - v)^2; 0 is straight.

    As in rectified flow (Liu et al., arXiv 2209.03003, section 2.2), but divided by the
    number of values per sample.

    Args:
      path: [N + 1, B, ...].
      steps: [N] sizes of the steps, the weights of the mean over t.
    """
    path, steps = _flatten(path), np.asarray(steps, np.float64)
    chex.assert_shape(steps, (len(path) - 1,))
    velocity = np.diff(path, axis=0) / steps[:, None, None]
    mean_velocity = (path[-1] - path[0]) / steps.sum()
    squares = np.mean(np.square(velocity - mean_velocity[None]), axis=(1, 2))
    return float(np.sum(steps * squares) / steps.sum())


def path_profile(path) -> tuple[np.ndarray, np.ndarray]:
    """Each path relative to its chord, the straight line between its ends.

    Args:
      path: [N + 1, B, ...].

    Returns:
      Progress along the chord and distance from it, [N + 1, B] each, in units of the
      chord: from (0, 0) to (1, 0).
    """
    path = _flatten(path)
    chord = path[-1] - path[0]
    length = np.linalg.norm(chord, axis=-1)
    moved = path - path[0]
    along = np.sum(moved * chord, axis=-1) / length**2
    across = np.linalg.norm(moved - along[..., None] * chord, axis=-1) / length
    return along, across


def _flatten(path) -> np.ndarray:
    path = np.asarray(path, np.float64)
    return path.reshape(*path.shape[:2], -1)


def crossing_rate(noise, data, *, labels=None) -> float:
    """How often two pairs of a coupling cross: exchanging their noise shortens them.

    The share of random i != j for which
    |x0_i - x1_j|^2 + |x0_j - x1_i|^2 < |x0_i - x1_i|^2 + |x0_j - x1_j|^2, which is
    <x0_i - x0_j, x1_i - x1_j> < 0. In one dimension it is the share of straight paths
    that cross. It is 0 for an optimal coupling and 1/2 for an independent one.

    Args:
      noise: [n, ...].
      data: [n, ...], row j paired with row j of the noise.
      labels: [n]; if given, i and j are of the same class.

    Raises:
      ValueError: no class has two samples.
    """
    noise, data = (np.asarray(x, np.float32) for x in (noise, data))
    chex.assert_equal_shape([noise, data])
    rng = np.random.default_rng(0)
    size = len(noise)
    first = rng.integers(size, size=NUM_PAIRS)
    if labels is None:
        second = (first + rng.integers(1, size, size=NUM_PAIRS)) % size
    else:
        first, second = _same_class_rows(rng, np.asarray(labels), NUM_PAIRS)
    noise, data = noise.reshape(size, -1), data.reshape(size, -1)
    crossings = 0
    for part in np.array_split(np.arange(NUM_PAIRS), max(1, NUM_PAIRS // 4096)):
        i, j = first[part], second[part]
        product = np.einsum('nd,nd->n', noise[i] - noise[j], data[i] - data[j])
        crossings += np.count_nonzero(product < 0)
    return crossings / NUM_PAIRS


def _same_class_rows(rng, labels: np.ndarray, num: int):
    """Two arrays [num] of rows that differ but have the same class."""
    order = np.argsort(labels, kind='stable')
    _, begin, count = np.unique(labels[order], return_index=True, return_counts=True)
    begin, count = np.repeat(begin, count), np.repeat(count, count)
    rows = np.flatnonzero(count > 1)
    if not len(rows):
        raise ValueError(
            f'no class occurs twice among the {len(labels)} pairs of a pool; raise '
            '--samples, or train with larger pools'
        )
    # Positions in `order`, where each class is contiguous.
    first = rng.choice(rows, num)
    offset = rng.integers(1, count[first])
    second = begin[first] + (first - begin[first] + offset) % count[first]
    return order[first], order[second]


def crossing_rates(subject: Subject) -> dict[str, float]:
    """Crossing rates of the first pool, as trained and with its pairs shuffled."""
    size = subject.pool_size
    noise, data, label = (
        x[:size] for x in (subject.noise, subject.data, subject.label)
    )
    shuffled = noise[np.random.default_rng(subject.seed).permutation(size)]
    rates = {}
    for name, partner in (('as trained', noise), ('independent', shuffled)):
        rates[f'{name}, any class'] = crossing_rate(partner, data)
        rates[f'{name}, same class'] = crossing_rate(partner, data, labels=label)
    return rates


def sampling_path(subject: Subject, num: int, w: float):
    """The path of `num` samples in finest steps, and the sizes [N] of the steps."""
    base_steps = subject.objective.base_steps
    grid = time_grid.times_and_sizes(time_grid.dyadic_schedule(base_steps, base_steps))
    times, steps = map(np.asarray, subject.objective.clip_step(*grid))
    _, _, label = subject.pairs(num)
    w = jnp.full(label.shape, w)
    path = jax.jit(
        lambda noise: trajectory(subject.velocity, noise, w, label, times, steps)
    )
    return path(subject.sampler_noise(num)), steps


def diagnose(subject: Subject) -> report.Section:
    """Measures the sampling paths and the training pairs."""
    rates = crossing_rates(subject)
    same_class = report.percent(rates['as trained, same class'])
    rate = f'crossing rate {same_class} (same class)'
    caption = (
        'Two training pairs cross if exchanging their noise makes them shorter. '
        f'Training pairs: {subject.coupling}.'
    )
    if not subject.objective.deterministic:
        verdict = f'{subject.method} adds noise between steps, so it has no fixed paths'
        return report.Section(
            **ABOUT,
            **report.not_applicable(verdict, f'length not applicable; {rate}'),
            figure=figure(None, None, rates),
            caption=caption,
        )
    num = min(NUM_SAMPLES, len(subject.label))
    low, _ = subject.guidance_range
    path, steps = sampling_path(subject, num, low)
    ratios = path_length_ratio(path)
    length, curvature = report.number(ratios.mean()), straightness(path, steps)
    grade = report.grade(ratios.mean() - 1, 0.05, 0.2)
    shape = dict(good='nearly straight', fair='somewhat curved', poor='strongly curved')
    return report.Section(
        **ABOUT,
        number=f'length {length}, S = {report.number(curvature)}; {rate}',
        verdict=f'paths are {shape[grade]}',
        grade=grade,
        figure=figure(path_profile(path), ratios, rates),
        caption=f'Paths of {num} samples in {image_grid.step_count(len(steps))} at w = '
        f'{report.number(low)}, in units of their chord, the straight line from noise '
        f'to sample. {caption}',
    )


def figure(profile, ratios, rates: Mapping[str, float]) -> bytes:
    """PNG of the sampling paths, their lengths and the crossing rates.

    Args:
      profile: see `path_profile`; None where there are no paths.
      ratios: [B] see `path_length_ratio`; None with `profile`.
      rates: name of a coupling -> crossing rate.
    """
    titles = [('Crossing rate', 'share of random pairs that cross', '')]
    if profile is not None:
        x, y = 'progress along the chord', 'distance from the chord'
        lengths = ('Path length', 'length / chord', 'samples')
        titles = [('Sampling paths', x, y), lengths, *titles]
    canvas, axes = figure_axes.panels(titles, [5.4, 3.6, 4.6][-len(titles) :])
    if profile is not None:
        _draw_paths(axes[0], *profile)
        axes[1].hist(ratios, bins=min(24, max(6, len(ratios) // 4)), color=BLUE)
        axes[1].set_xlim(left=min(1.0, float(ratios.min())))
        axes[1].yaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
    ax = axes[-1]
    colours = [[GREY if 'independent' in name else BLUE for name in rates]]
    texts = [report.percent(rate) for rate in rates.values()]
    lengths = {'': list(rates.values())}
    figure_axes.draw_bars(ax, list(rates), lengths, {'': texts}, colours)
    ax.set_xlim(0, 0.68)
    ax.set_xticks([0, 0.25, 0.5])
    return figure_axes.png(canvas)


def _draw_paths(ax, along: np.ndarray, across: np.ndarray) -> None:
    along, across = along[:, :NUM_SHOWN], across[:, :NUM_SHOWN]
    ax.plot(along, across, color=BLUE, linewidth=1, alpha=0.45)
    ax.plot([0, 1], [0, 0], 'o-', color=BLACK, linewidth=1.5, markersize=6)
    top = max(0.25, 1.15 * float(across.max()))
    ax.set_ylim(-0.13 * top, top)
    figure_axes.annotate(ax, 'noise', (0, 0), (0, -8), ha='left', va='top')
    figure_axes.annotate(ax, 'sample', (1, 0), (0, -8), ha='right', va='top')
