"""Fault 3: samples have too much or too little power at high spatial frequencies."""

import math

import jax.numpy as jnp
import numpy as np

from ism_jax.diagnosis import figure_axes, report
from ism_jax.diagnosis.figure_axes import BLACK, GREY, Line
from ism_jax.diagnosis.subject import Subject
from ism_jax.method import wavelet
from ism_jax.sampling import image_grid

STEP_COUNTS = (1, 2, 4, 8, 128)
ABOUT = dict(
    fault='Frequency bias',
    question='Do samples have as much fine detail as the data?',
    text='An image is a sum of waves: long ones for the layout, short ones for edges '
    'and texture. Squared errors are dominated by the long ones, so samples may look '
    'smooth or noisy although their layout is right.',
)


def radial_power(images) -> tuple[np.ndarray, np.ndarray]:
    """Power spectrum over rings of equal spatial frequency, mean over images.

    The power is |FFT|^2 / (H W): white noise of variance 1 has power 1 at every
    frequency. Rings are 1 / min(H, W) cycles per pixel wide. Corners beyond the highest
    frequency of an axis are left out. No window is applied: samples and data wrap
    around alike.

    Args:
      images: [N, H, W, C].

    Returns:
      Frequencies [R] in cycles per pixel, 0 to at most 0.5, and power [R].
    """
    images = np.asarray(images, np.float64)
    _, height, width, _ = images.shape
    power = np.zeros((height, width))
    for image in images:  # One at a time: spectra take four times the memory.
        power += np.mean(np.abs(np.fft.fft2(image, axes=(0, 1))) ** 2, axis=-1)
    power /= len(images) * height * width
    side = min(height, width)
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width)))
    ring = np.rint(radius.T * side).astype(int)
    inside = ring <= side // 2
    sums = np.bincount(ring[inside], power[inside])
    return np.arange(len(sums)) / side, sums / np.bincount(ring[inside])


def level_power(images) -> np.ndarray:
    """Power in each level of a Haar transform, coarse to fine.

    Args:
      images: [N, H, W, C], with even sides.

    Returns:
      [L]: mean square of the detail coefficients (all three directions) of the levels
      L .. 1, with the largest L up to 5 that the sides allow. White noise of variance 1
      has power 1 at every level.
    """
    images = jnp.asarray(images)
    levels = min(5, max(1, wavelet.max_levels(*images.shape[1:3])))
    energies = wavelet.band_energies(images, wavelet='haar', levels=levels)
    energies = np.asarray(energies, np.float64).mean(0)
    details = energies[1:].reshape(levels, 3).sum(1)
    return details / (3 / 4.0 ** np.arange(levels, 0, -1))


def log_ratio(power, reference) -> np.ndarray:
    """ln(power / reference): 0 where they agree, 0.69 for twice the power.

    Raises:
      ValueError: a power is not positive.
    """
    power, reference = np.asarray(power), np.asarray(reference)
    if not min(power.min(), reference.min()) > 0:
        raise ValueError(
            f'the lowest power is {min(power.min(), reference.min())}: samples or data '
            'are constant or not finite; choose another checkpoint'
        )
    return np.log(power / reference)


def high_frequency_ratio(frequencies, power, reference) -> np.ndarray:
    """`log_ratio` of radial power in the upper half of the frequencies."""
    upper = frequencies > frequencies[-1] / 2
    return log_ratio(power[upper], reference[upper])


def diagnose(subject: Subject, num: int) -> report.Section:
    """Compares the spectra of `num` samples at the lowest w with those of the data."""
    low, _ = subject.guidance_range
    images = subject.data[:num]
    frequencies, power = radial_power(images)
    # Each half has half as many images as the samples: sqrt(2) times the deviation.
    halves = [radial_power(images[i::2])[1] for i in (0, 1)]
    chance = np.abs(log_ratio(*halves)) / math.sqrt(2)
    high_chance = np.mean(chance[frequencies > frequencies[-1] / 2])
    levels = level_power(images)
    spectra, level_ratios, errors, signed = {}, {}, {}, []
    for steps in [n for n in STEP_COUNTS if n <= subject.objective.base_steps]:
        samples = subject.samples(steps, low, num)
        if samples.shape[-1] in (1, 3):  # As images are displayed.
            samples = np.clip(samples, -1, 1)
        _, spectra[steps] = radial_power(samples)
        level_ratios[steps] = log_ratio(level_power(samples), levels)
        ratio = high_frequency_ratio(frequencies, spectra[steps], power)
        errors[steps] = np.mean(np.abs(ratio))
        signed.append(np.mean(ratio))
    error = np.mean(list(errors.values()))
    grade = report.grade(error, 0.2, 0.7)
    amount = 'too much' if np.mean(signed) > 0 else 'too little'
    wrong = f'{amount} fine detail, by a factor of {report.number(math.exp(error))}'
    numbers = [
        f'{report.number(errors[n])} ({image_grid.step_count(n)})'
        for n in sorted({1, 4, max(errors)} & set(errors))
    ]
    return report.Section(
        **ABOUT,
        good=f'0, up to {report.number(high_chance)} by chance; 0.69 is a factor of 2',
        number=f'|log ratio| {", ".join(numbers)}',
        verdict={
            'good': 'fine detail is as strong as in the data',
            'fair': wrong,
            'poor': f'far {wrong}',
        }[grade],
        grade=grade,
        figure=figure(frequencies, power, spectra, level_ratios, chance),
        caption=f'{len(images)} samples at w = {report.number(low)} against the same '
        'number of images of the same classes. Shaded: the upper half of the '
        'frequencies, over which the number is averaged. Grey band: the difference '
        'between two random sets of data.',
    )


def figure(frequencies, data, spectra, level_ratios, chance) -> bytes:
    """PNG of power against frequency, and of samples' power over that of the data.

    Args:
      frequencies: [R] cycles per pixel, 0 first.
      data: [R] power of the data.
      spectra: number of steps -> [R] power of samples.
      level_ratios: number of steps -> [L] log ratio per wavelet level, coarse to fine.
      chance: [R] |log ratio| between two sets of data.
    """
    titles = [
        ('Radial power', 'cycles per pixel', 'power'),
        ('Power of samples / power of data', 'cycles per pixel', 'factor'),
        ('The same by wavelet level', 'size of the detail in pixels', 'factor'),
    ]
    canvas, axes = figure_axes.panels(titles, [4.4, 4.4, 4.4])
    # Without the mean, at frequency 0.
    frequencies, data, chance = frequencies[1:], data[1:], chance[1:]
    spectra = {n: power[1:] for n, power in spectra.items()}
    colours = _colours(spectra)
    _draw_power(axes[0], frequencies, data, spectra, colours)
    _draw_ratios(axes[1], frequencies, data, spectra, chance, colours)
    _draw_levels(axes[2], level_ratios, colours)
    return figure_axes.png(canvas)


def _colours(counts) -> dict[int, tuple]:
    """Number of steps -> colour, from orange for the fewest to blue for the most."""
    orange, blue = np.array([0.84, 0.37, 0.0]), np.array([0.0, 0.35, 0.7])
    shares = np.linspace(0, 1, len(counts))
    mixed = [tuple((1 - s) * orange + s * blue) for s in shares]
    return dict(zip(counts, mixed, strict=True))


def _lines(x, curves, colours, style='-') -> list[Line]:
    return [
        Line(image_grid.step_count(n), x, y, colours[n], style)
        for n, y in curves.items()
    ]


def _draw_power(ax, frequencies, data, spectra, colours) -> None:
    ticks = [f for f in (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2) if f >= frequencies[0]]
    figure_axes.set_x_ticks(ax, ticks, [f'{f:.2g}' for f in ticks])
    ax.set_yscale('log')
    lines = _lines(frequencies, spectra, colours)
    figure_axes.draw_lines(ax, [Line('data', frequencies, data, BLACK), *lines])


def _draw_ratios(ax, frequencies, data, spectra, chance, colours) -> None:
    ratios = {n: np.log(power / data) for n, power in spectra.items()}
    figure_axes.set_log_ratio_limits(ax, list(ratios.values()))
    half = frequencies[-1] / 2
    ax.axvspan(half, frequencies[-1], color='0.955', zorder=0, linewidth=0)
    ax.fill_between(frequencies, -chance, chance, color='0.8', linewidth=0)
    figure_axes.draw_lines(ax, _lines(frequencies, ratios, colours))
    top = (half, ax.get_ylim()[1])
    figure_axes.annotate(ax, 'upper half', top, (4, -4), color=GREY, va='top')


def _draw_levels(ax, level_ratios, colours) -> None:
    figure_axes.set_log_ratio_limits(ax, list(level_ratios.values()))
    levels = len(next(iter(level_ratios.values())))
    position = np.arange(levels)
    figure_axes.draw_lines(ax, _lines(position, level_ratios, colours, 'o-'))
    ax.set_xticks(position, [f'{2**level}' for level in range(levels, 0, -1)])
    ax.set_xlim(-0.3, levels - 0.7)
