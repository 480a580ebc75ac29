"""The five faults of shortcut models as numbers (iSM, arXiv 2510.21250, section 3).

 1. Compounding guidance: which classifier-free-guidance scale a long step really has.
 2. Inflexible guidance: how far samples move as the strength w grows.
 3. Frequency bias: power of samples against power of data, frequency by frequency.
 4. Divergent self-consistency: how far the target network lags behind the online
    network, and by how much one step differs from its two halves.
 5. Curvy trajectories: how much longer the paths are than straight ones, and how often
    the pairs of a coupling cross.

Functions of arrays and callables; `ism_jax.diagnose` runs them on a trained run. Two
kinds of callables occur, with x [B, H, W, C] and all else [B]:

    velocity(x, t, d, w, label)   mean velocity over a step, as the sampler uses it
    field(x, t, label)            instantaneous velocity without guidance

**Proposition 1.** A shortcut model whose targets apply guidance of scale g at every
doubling,

    s_2d(c) = 1/2 [ G(s_d)(x_t, t) + G(s_d)(x', t + d) ],  x' = x_t + d G(s_d)(x_t, t),
    G(s) = s(null) + g (s(c) - s(null)),  s_2d(null) the same without guidance,

moves in a step of N smallest steps like the mean of N smallest guided steps of scale
g ** log2(N). *Where it is exact:* let v(null) be affine in x, and v(c) - v(null) a
function of t alone. By induction each s_d(c) - s_d(null) is a function of t alone too,
each doubling multiplies it by g, and both sides are null plus g ** log2(N) times the
difference of the unguided maps. (Constant along the path, as the source has it, is a
special case.) In the Gaussian flow of `ism_jax.method.gaussian_flow` that is class_std =
data_std. *Where it is not:* with class_std < data_std the difference shrinks along a
guided path. Small steps feel that and a jump, which extrapolates from where it starts,
does not, so that a still larger scale of small steps is needed to get as far. Measured
at g = 1.5 for class_std = data_std, 0.9 and 0.5 of it, by
`python -m ism_jax.diagnose compounding`, which says what the flow is:

    N                          2      8      32     64      128
    g ** log2(N)               1.500  3.375  7.594  11.391  17.086
    class_std = data_std       1.500  3.375  7.594  11.391  17.086
    class_std = 0.9 data_std   1.500  3.381  7.820  12.236  24.93
    class_std = 0.5 data_std   1.500  3.414  8.030  14.689  none up to 64

So the proposition is a lower bound there, 7 % and 29 % below at N = 64; in the last
cell the whole jump lands where no scale of small steps leads. With guidance in the
finest targets only, and in iSM, the scale is 1.500 at every N from 2 on in all three.

**Estimator of the scale** (`effective_scale`): the g' in [-1, 64] for which the mean
velocity of N smallest guided steps, `guided_steps`, is nearest to the jump's in least
squares over a batch; a search in one dimension. The small steps start where the jump
starts and follow their own path, so the estimate of a jump that *is* N guided steps is
exact, whatever the field.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from ism_jax.method import interpolant, time_grid, wavelet

# Scales among which the nearest one is looked for; the proposition's own end at 17.
LOWEST_SCALE, HIGHEST_SCALE = -1.0, 64.0
# Jumps of which guided small steps explain less say nothing about their scale.
LEAST_EXPLAINED = 0.5


def rms(array) -> float:
    """Root mean square over all elements."""
    return float(np.sqrt(np.mean(np.square(np.asarray(array, np.float64)))))


def relative_rms(error, reference) -> float:
    """RMS of `error` relative to that of `reference`, without unit."""
    size = rms(reference)
    if not size > 0:
        raise ValueError(
            f'the reference has a root mean square of {size}, so nothing is relative '
            'to it; give inputs for which it is not zero (an untrained network gives 0)'
        )
    return rms(error) / size


# 1. Compounding guidance.


class EffectiveScale(NamedTuple):
    """What `effective_scale` finds.

    Attributes:
      scale: g', 1 for no guidance.
      explained: share of the squared difference between the jump and unconditional
        small steps that guided small steps of that scale account for, at most 1.
    """

    scale: float
    explained: float

    def is_clear(self) -> bool:
        """Whether the jump is like guided steps of this scale and not of many."""
        inside = LOWEST_SCALE + 0.01 < self.scale < 0.99 * HIGHEST_SCALE
        return inside and self.explained >= LEAST_EXPLAINED


def guided_steps(
    field: Callable[..., jax.Array],
    x: jax.Array,
    t: jax.Array,
    d: jax.Array,
    label: jax.Array,
    *,
    null: int,
    scale,
    steps,
    interval: float = 0.0,
) -> jax.Array:
    """Mean velocity over d of Euler steps with classifier-free guidance.

    Args:
      field: see the module.
      x: [B, H, W, C]; t, d, label: [B].
      null: label of no class.
      scale: g of null + g (conditional - null); a number, may be traced.
      steps: how many steps of equal size make up d; may be traced.
      interval: time before which the scale is 1.

    Returns:
      [B, H, W, C].
    """
    no_class = jnp.full_like(label, null)
    small = d / steps

    def body(number, carry):
        x, total = carry
        now = t + number * small
        unconditional = field(x, now, no_class)
        g = jnp.where(now >= interval, scale, 1.0)[:, None, None, None]
        guided = unconditional + g * (field(x, now, label) - unconditional)
        return interpolant.step(x, guided, small), total + guided

    _, total = jax.lax.fori_loop(0, steps, body, (x, jnp.zeros_like(x)))
    return total / steps


def effective_scale(
    jump: jax.Array, small_steps: Callable[[float], jax.Array]
) -> EffectiveScale:
    """The guidance scale whose small steps are nearest to a jump; see the module.

    Args:
      jump: mean velocity over a step, [B, H, W, C].
      small_steps: scale -> mean velocity of small steps over the same, `guided_steps`.

    Raises:
      ValueError: the guidance has no effect, or a velocity is not finite.
    """
    jump = np.asarray(jump, np.float64)

    def error(scale):
        difference = jump - np.asarray(small_steps(scale), np.float64)
        # Far too large scales may overflow; they are not nearest.
        return np.nan_to_num(np.mean(np.square(difference)), nan=np.inf)

    if not np.isfinite(jump).all():
        raise ValueError(
            f'the jump has {np.count_nonzero(~np.isfinite(jump))} values that are not '
            'finite; look at the parameters for which it was made'
        )
    grid = np.concatenate([[LOWEST_SCALE, 0], np.geomspace(0.5, HIGHEST_SCALE, 15)])
    errors = [error(scale) for scale in grid]
    if not np.ptp(np.nan_to_num(errors, posinf=1e30)) > 1e-12 * np.mean(jump**2):
        raise ValueError(
            'small steps of all guidance scales are the same: the field does not '
            'depend on the label there; give times at which guidance acts'
        )
    best = int(np.argmin(errors))
    around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = optimize.minimize_scalar(
        error, bounds=around, method='bounded', options=dict(xatol=1e-4)
    )
    return EffectiveScale(float(found.x), float(1 - found.fun / errors[1]))


def shortcut_jump(
    field: Callable[..., jax.Array],
    x: jax.Array,
    t: jax.Array,
    label: jax.Array,
    *,
    null: int,
    steps: int,
    base_steps: int,
    scale: float,
    guided: Literal['all', 'finest', 'velocity'],
) -> jax.Array:
    """Mean velocity of one step that a perfectly trained shortcut model would have.

    The recursion of the module's proposition, carried out: 2 N log2(N) calls of the
    field for a step of N smallest steps.

    Args:
      field: see the module.
      x: [B, H, W, C]; t, label: [B].
      null: label of no class.
      steps: N, a power of two.
      base_steps: 1 / the smallest step.
      scale: g.
      guided: 'all' (guidance in the targets of every doubling), 'finest' (of the first
        doubling only, as in the official code) or 'velocity' (iSM: inside the velocity
        of the smallest step, in no doubling).

    Returns:
      [B, H, W, C].
    """
    if guided not in ('all', 'finest', 'velocity'):
        raise ValueError(f"guided = {guided!r} must be 'all', 'finest' or 'velocity'")
    if steps < 1 or steps & (steps - 1) or steps > base_steps:
        raise ValueError(
            f'steps = {steps} must be a power of two in 1 .. {base_steps} (base_steps)'
        )
    no_class = jnp.full_like(label, null)

    def extrapolate(conditional, unconditional):
        return unconditional + scale * (conditional - unconditional)

    def mean_velocity(x, t, label, steps):
        if steps == 1:
            velocity = field(x, t, label)
            if guided == 'velocity' and label is not no_class:
                return extrapolate(velocity, field(x, t, no_class))
            return velocity
        half = steps // 2
        d = jnp.full_like(t, half / base_steps)
        doubled = guided == 'all' or (guided == 'finest' and half == 1)

        def step(x, t):
            velocity = mean_velocity(x, t, label, half)
            if doubled and label is not no_class:
                return extrapolate(velocity, mean_velocity(x, t, no_class, half))
            return velocity

        first = step(x, t)
        return 0.5 * (first + step(interpolant.step(x, first, d), t + d))

    return mean_velocity(x, t, label, steps)


def aligned_times(
    rng: np.random.Generator, num: int, steps: int, base_steps: int, after: float = 0.0
) -> np.ndarray:
    """Start times [num] of steps of N smallest ones, uniform on the multiples of N.

    Args:
      after: only steps that end later than this.
    """
    size = steps / base_steps
    starts = np.arange(base_steps // steps) * size
    return rng.choice(starts[starts + size > after], num).astype(np.float32)


def compounding(
    jump: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    field: Callable[..., jax.Array],
    noise: jax.Array,
    data: jax.Array,
    label: jax.Array,
    *,
    null: int,
    base_steps: int,
    interval: float = 0.0,
    field_scale: float = 1.0,
    start_time: float = 0.0,
    seed: int = 0,
) -> dict[int, EffectiveScale]:
    """Effective guidance scale in steps of N = 1, 2, 4, ..., base_steps smallest ones.

    Args:
      jump: (x [B, H, W, C], t [B], d [B]) -> mean velocity of one step of size d.
      field: see the module.
      noise, data: [B, H, W, C], pairs; x_t lies on the straight path between them.
      label: [B].
      null: label of no class.
      base_steps: 1 / the smallest step.
      interval: time before which guidance does not act. Only steps that end after it
        are looked at, and the small steps are not guided before it.
      field_scale: scale that the field's conditional velocity has already, 1 for none;
        the scale of small steps is relative to it.
      start_time: where the method's time begins, a little after 0.
      seed: of the start times.

    Returns:
      {N: scale and how much of the jump it explains}.
    """
    rng = np.random.default_rng(seed)

    @jax.jit
    def small_steps(x, t, d, steps, scale):
        return guided_steps(
            field, x, t, d, label,
            null=null, scale=scale, steps=steps, interval=interval,
        )  # fmt: skip

    scales = {}
    for steps in 2 ** np.arange(time_grid.num_levels(base_steps) + 1):
        steps = int(steps)
        start = aligned_times(rng, label.shape[0], steps, base_steps, interval)
        t = jnp.maximum(start, start_time)
        x = interpolant.interpolate(noise, data, t)
        d = start + steps / base_steps - t
        found = effective_scale(
            jump(x, t, d),
            lambda scale: small_steps(x, t, d, steps, scale / field_scale),
        )
        scales[steps] = found
    return scales


# 2. Inflexible guidance.


class Response(NamedTuple):
    """How samples move as w grows; see `guidance_response`.

    Attributes:
      distance: [G] RMS distance per value from the samples of the lowest w, in the
        images' units (2 from black to white).
      monotone: share of the raises of w that moved samples farther away.
    """

    distance: np.ndarray
    monotone: float


def guidance_response(samples) -> Response:
    """Response of samples to guidance.

    Args:
      samples: [G, B, H, W, C] of the same noise and labels at G rising strengths.

    Raises:
      ValueError: another rank, or fewer than two strengths.
    """
    samples = np.asarray(samples, np.float64)
    if samples.ndim != 5 or len(samples) < 2:
        raise ValueError(
            f'samples have shape {samples.shape}; give [G, B, H, W, C] with at least '
            'two strengths w'
        )
    distance = np.asarray([rms(x - samples[0]) for x in samples])
    return Response(distance, float(np.mean(np.diff(distance) > 0)))


def displacement_agreement(samples, reference) -> tuple[float, float]:
    """How the move from the lowest to the highest w compares with a reference's.

    Args:
      samples, reference: [G, B, H, W, C], see `guidance_response`.

    Returns:
      Size relative to the reference's (1: as far), and the cosine of the angle between
      the two (1: the same direction; 0 where nothing moves).
    """
    move, other = (
        np.asarray(x[-1], np.float64) - np.asarray(x[0], np.float64)
        for x in (samples, reference)
    )
    size = relative_rms(move, other)
    product = rms(move) * rms(other)
    return size, float(np.mean(move * other) / product) if product else 0.0


# 3. Frequency bias.


def radial_power(images) -> tuple[np.ndarray, np.ndarray]:
    """Power spectrum over rings of equal spatial frequency, mean over images.

    |FFT|^2 / (H W), so that white noise of variance 1 has power 1 at all frequencies.
    Rings are 1 / min(H, W) cycles per pixel wide; corners beyond the highest frequency
    of an axis are left out. No window: what wraps around does so in samples and data
    alike.

    Args:
      images: [N, H, W, C].

    Returns:
      frequencies [R] in cycles per pixel, 0 to at most 0.5, and power [R].

    Raises:
      ValueError: another rank, or a side below 4.
    """
    images = np.asarray(images, np.float64)
    if images.ndim != 4 or min(images.shape[1:3]) < 4 or not len(images):
        raise ValueError(
            f'images have shape {images.shape}; give [N, H, W, C], H and W of at '
            'least 4, so that there are low and high frequencies'
        )
    _, height, width, _ = images.shape
    power = np.zeros((height, width))
    for image in images:  # One by one: complex spectra are four times the images.
        power += np.mean(np.abs(np.fft.fft2(image, axes=(0, 1))) ** 2, axis=-1)
    power /= len(images) * height * width
    side = min(height, width)
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width)))
    ring = np.rint(radius.T * side).astype(int)
    inside = ring <= side // 2
    sums = np.bincount(ring[inside], power[inside])
    return np.arange(len(sums)) / side, sums / np.bincount(ring[inside])


def level_power(images, *, wavelet_name: str = 'haar') -> np.ndarray:
    """Power in each level of a wavelet transform, coarse to fine.

    Args:
      images: [N, H, W, C], sides even.

    Returns:
      [L]: mean square of the detail coefficients of levels L .. 1 (all three
      directions), L as many as the sides allow and at most 5. White noise of variance
      1 has 1 everywhere, with an orthonormal wavelet.

    Raises:
      ValueError: see `wavelet.check`.
    """
    images = jnp.asarray(images)
    odd = min(int(side) & -int(side) for side in images.shape[1:3])
    levels = min(5, max(1, odd.bit_length() - 1))
    energies = wavelet.band_energies(images, wavelet=wavelet_name, levels=levels)
    energies = np.asarray(energies, np.float64).mean(0)
    details = energies[1:].reshape(levels, 3).sum(1)
    return details / (3 / 4.0 ** np.arange(levels, 0, -1))


def log_ratio(power, reference) -> np.ndarray:
    """ln(power / reference); 0 where they agree, 0.69 for twice the power.

    Raises:
      ValueError: shapes differ, or a power that is not positive.
    """
    power, reference = np.asarray(power), np.asarray(reference)
    if power.shape != reference.shape or not (min(power.min(), reference.min()) > 0):
        raise ValueError(
            f'power {power.shape} and reference {reference.shape} must have one shape '
            f'and be positive; their lowest values are {power.min()} and '
            f'{reference.min()}: give images that are not constant'
        )
    return np.log(power / reference)


def high_frequency_error(samples, data) -> float:
    """Mean |log ratio| of radial power in the upper half of frequencies.

    exp of it is the factor by which the power is off there.

    Args:
      samples, data: [N, H, W, C], any N of each.
    """
    frequencies, power = radial_power(samples)
    _, reference = radial_power(data)
    upper = frequencies > frequencies[-1] / 2
    return float(np.mean(np.abs(log_ratio(power[upper], reference[upper]))))


# 4. Divergent self-consistency.


def parameter_distance(target, online) -> float:
    """||target - online|| / ||online|| over all parameters of two trees."""
    leaves = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(target), jax.tree.leaves(online), strict=True)
    ]
    difference = sum(np.sum(np.square(a - b)) for a, b in leaves)
    norm = sum(np.sum(np.square(b)) for _, b in leaves)
    if not norm > 0:
        raise ValueError('all online parameters are 0; train the network first')
    return float(np.sqrt(difference / norm))


def self_consistency_error(
    velocity: Callable[..., jax.Array],
    x: jax.Array,
    t: jax.Array,
    d: jax.Array,
    w: jax.Array,
    label: jax.Array,
) -> float:
    """By how much one step of 2d differs from two of d.

    RMS[ s(x, t, 2d) - (s(x, t, d) + s(x', t + d, d)) / 2 ] / RMS[ s(x, t, 2d) ],
    x' = x + d s(x, t, d).

    Args:
      velocity: see the module.
      x: [B, H, W, C], on the path at time t; t, d, w, label: [B], d the half step.

    Raises:
      ValueError: a step ends after t = 1, or the velocity is 0 everywhere.
    """
    if not np.max(np.asarray(t + 2 * d)) <= 1 + 1e-6:
        raise ValueError(
            f't + 2d reaches {np.max(np.asarray(t + 2 * d))}; paths end at t = 1, so '
            'give smaller steps or earlier times'
        )
    whole = velocity(x, t, 2 * d, w, label)
    first = velocity(x, t, d, w, label)
    second = velocity(interpolant.step(x, first, d), t + d, d, w, label)
    return relative_rms(np.asarray(whole) - np.asarray(first + second) / 2, whole)


# 5. Curvy trajectories.


def trajectory(
    velocity: Callable[..., jax.Array],
    noise: jax.Array,
    w: jax.Array,
    label: jax.Array,
    times: Sequence[float],
    steps: Sequence[float],
) -> jax.Array:
    """The path of the sampler, with its start: [N + 1, B, H, W, C].

    Args:
      velocity: see the module.
      noise: [B, H, W, C]; w, label: [B].
      times, steps: [N].
    """

    def body(x, step):
        t, d = (jnp.full(label.shape, value) for value in step)
        x = interpolant.step(x, velocity(x, t, d, w, label), d)
        return x, x

    _, path = jax.lax.scan(body, noise, (jnp.asarray(times), jnp.asarray(steps)))
    return jnp.concatenate([noise[None], path])


def _flat_path(path) -> np.ndarray:
    path = np.asarray(path, np.float64)
    if path.ndim < 3 or len(path) < 2:
        raise ValueError(
            f'path has shape {path.shape}; give [N + 1, B, ...] with at least one step'
        )
    return path.reshape(*path.shape[:2], -1)


def path_length_ratio(path) -> np.ndarray:
    """Length over distance between the ends, [B]: 1 straight, pi / 2 a half circle.

    Args:
      path: [N + 1, B, ...].

    Raises:
      ValueError: no step, or a path that ends where it begins.
    """
    path = _flat_path(path)
    distance = np.linalg.norm(path[-1] - path[0], axis=-1)
    if not distance.min() > 0:
        raise ValueError(
            f'{np.count_nonzero(distance == 0)} paths end where they begin; their '
            'length has nothing to compare with'
        )
    return np.linalg.norm(np.diff(path, axis=0), axis=-1).sum(0) / distance


def straightness(path, steps: Sequence[float]) -> float:
    """S = mean over t and samples of ||(x1 - x0) - v||^2, per value; 0 is straight.

    Rectified flow (Liu et al., arXiv 2209.03003), section 2.2, divided by the number of
    values of a sample.

    Args:
      path: [N + 1, B, ...].
      steps: [N] sizes of the steps; S is weighted by them.
    """
    path = _flat_path(path)
    steps = np.asarray(steps, np.float64)
    if steps.shape != (len(path) - 1,):
        raise ValueError(
            f'steps have shape {steps.shape}, but the path of {len(path)} points has '
            f'{len(path) - 1} steps; give one size for each'
        )
    velocity = np.diff(path, axis=0) / steps[:, None, None]
    mean_velocity = (path[-1] - path[0]) / steps.sum()
    squares = np.mean(np.square(velocity - mean_velocity[None]), axis=(1, 2))
    return float(np.sum(steps * squares) / steps.sum())


def path_profile(path) -> tuple[np.ndarray, np.ndarray]:
    """Each path in the plane: progress along its own chord, and distance from it.

    Args:
      path: [N + 1, B, ...].

    Returns:
      along, across: [N + 1, B], in units of the chord: from (0, 0) to (1, 0), and
      across is 0 all the way where the path is straight.
    """
    path = _flat_path(path)
    chord = path[-1] - path[0]
    length = np.linalg.norm(chord, axis=-1)
    moved = path - path[0]
    along = np.sum(moved * chord, axis=-1) / length**2
    across = np.linalg.norm(moved - along[..., None] * chord, axis=-1) / length
    return along, across


def crossing_rate(
    noise, data, *, labels=None, num_pairs: int = 100_000, seed: int = 0
) -> float:
    """How often two pairs of a coupling would be shorter with partners swapped.

    The share of random i != j for which
    |x0_i - x1_j|^2 + |x0_j - x1_i|^2 < |x0_i - x1_i|^2 + |x0_j - x1_j|^2, which is
    <x0_i - x0_j, x1_i - x1_j> < 0. On a line it is the share of straight paths that
    cross. 0 for an optimal coupling, 1/2 for an independent one.

    Args:
      noise, data: [n, ...], row j paired with row j.
      labels: [n]; with them only pairs of the same class are looked at.
      num_pairs: how many random pairs; the standard error is at most
        0.5 / sqrt(num_pairs).
      seed: of their choice.

    Raises:
      ValueError: shapes differ, or there are no two pairs (of one class).
    """
    noise, data = (np.asarray(x, np.float32) for x in (noise, data))
    if noise.shape != data.shape or len(noise) < 2:
        raise ValueError(
            f'noise {noise.shape} and data {data.shape} must have the same shape, with '
            'at least two rows'
        )
    rng = np.random.default_rng(seed)
    size = len(noise)
    first = rng.integers(size, size=num_pairs)
    if labels is None:
        second = (first + rng.integers(1, size, size=num_pairs)) % size
    else:
        first, second = _same_class_pairs(rng, np.asarray(labels), num_pairs)
    noise, data = noise.reshape(size, -1), data.reshape(size, -1)
    crossings = 0
    for part in np.array_split(np.arange(num_pairs), max(1, num_pairs // 4096)):
        i, j = first[part], second[part]
        product = np.einsum('nd,nd->n', noise[i] - noise[j], data[i] - data[j])
        crossings += np.count_nonzero(product < 0)
    return crossings / num_pairs


def _same_class_pairs(rng, labels, num_pairs):
    """Two arrays [num_pairs] of rows, different and of the same class."""
    order = np.argsort(labels, kind='stable')
    _, begin, count = np.unique(labels[order], return_index=True, return_counts=True)
    rows = np.flatnonzero(np.repeat(count, count) > 1)  # Places in `order`.
    if not len(rows):
        raise ValueError(
            f'none of the {len(labels)} pairs has another one of its class; give a '
            'larger pool, or labels=None'
        )
    begin, count = np.repeat(begin, count), np.repeat(count, count)
    place = rng.choice(rows, num_pairs)
    offset = rng.integers(1, count[place])
    other = begin[place] + (place - begin[place] + offset) % count[place]
    return order[place], order[other]
