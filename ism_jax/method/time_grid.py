"""Times and step sizes of training and sampling.

Shortcut models are trained on a dyadic grid: step sizes are powers of two, 1, 1/2, ...,
1/base_steps, and a step of size `d` starts at a multiple of `d`. The finest step
1/base_steps takes the instantaneous velocity: the network is then conditioned on d = 0
(Shortcut Models, arXiv 2410.12557, section 3; iSM, arXiv 2510.21250, section 3).

Methods that train every t and d can sample with any step sizes that sum to 1.
"""

from collections.abc import Callable, Sequence
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

# Largest difference from 1 of a sum of step sizes, as users write them.
SUM_TOLERANCE = 1e-6
TimeDraw = Literal['uniform', 'logit_normal']


def is_base_steps(base_steps: int) -> bool:
    """Whether steps can be halved from 1 to 1/base_steps: a power of two above 1."""
    return base_steps >= 2 and not base_steps & (base_steps - 1)


def num_levels(base_steps: int) -> int:
    """Number of step sizes 1, 1/2, ..., 2/base_steps that self-consistency trains."""
    return int(math.log2(base_steps))


def dyadic_schedule(num_steps: int, base_steps: int = 128) -> tuple[float, ...]:
    """Step sizes from noise to data, each a power of two, that sum to 1.

    A power of two gives equal steps. Any other number starts from the power of two
    below it and halves steps, the last ones first: 3 steps are 1/2, 1/4, 1/4, and 5
    are 1/4, 1/4, 1/4, 1/8, 1/8. Large steps thus come first, where the flow is
    straightest, and every step starts at a multiple of its size, as in training.

    Raises:
      ValueError: fewer than 1 or more than `base_steps` steps.
    """
    _check_number(num_steps, base_steps)
    coarse = 2 ** int(math.log2(num_steps))
    halved = num_steps - coarse
    return (1 / coarse,) * (coarse - halved) + (0.5 / coarse,) * (2 * halved)


def equal_schedule(num_steps: int, base_steps: int = 128) -> tuple[float, ...]:
    """`num_steps` equal step sizes.

    Raises:
      ValueError: see `dyadic_schedule`.
    """
    _check_number(num_steps, base_steps)
    return (1 / num_steps,) * num_steps


def _check_number(num_steps, base_steps) -> None:
    if not 1 <= num_steps <= base_steps:
        raise ValueError(
            f'steps = {num_steps} must lie in 1 .. {base_steps}, the base steps that '
            'the network was trained with'
        )


def check_schedule(
    schedule: Sequence[float], base_steps: int = 128, *, dyadic: bool = True
) -> None:
    """Checks that the network was trained for all steps of a schedule.

    Args:
      schedule: step sizes.
      base_steps: 1 / the finest step size of a dyadic schedule.
      dyadic: whether each step must be a power of two in [1/base_steps, 1] that starts
        at a multiple of its size.

    Raises:
      ValueError: a step is not positive or not dyadic, or the steps do not sum to 1.
    """
    fault = _dyadic_fault(schedule, base_steps) if dyadic else _free_fault(schedule)
    if fault:
        raise ValueError(f'schedule {list(schedule)} {fault}')


def _free_fault(schedule) -> str:
    """The fault of a schedule of any step sizes in words; '' if it is valid."""
    if not all(d > 0 for d in schedule):
        return 'has a step that is not positive'
    end = sum(schedule)
    if abs(end - 1) >= SUM_TOLERANCE:
        return f'ends at t = {end:g}; the steps must sum to 1'
    return ''


def _dyadic_fault(schedule, base_steps) -> str:
    """The fault of a dyadic schedule in words; '' if it is valid."""
    t = 0.0  # Sums of powers of two are exact in floating point.
    for number, d in enumerate(schedule):
        if not 1 / base_steps <= d <= 1 or math.frexp(d)[0] != 0.5:
            return (
                f'has step {number} of size {d}, which is not one of 1, 1/2, ..., '
                f'1/{base_steps}, the sizes that the network was trained for'
            )
        if t % d:
            return (
                f'has step {number} of size {d}, which starts at t = {t}; a step must '
                'start at a multiple of its size, so put larger steps first'
            )
        t += d
    return '' if t == 1 else f'ends at t = {t}; the steps must sum to 1'


def times_and_sizes(schedule: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Start times and sizes of the steps of a schedule, each [N] float32."""
    d = np.asarray(schedule, np.float32)
    t = np.concatenate([[0.0], np.cumsum(schedule)[:-1]]).astype(np.float32)
    return t, d


def take_steps(step: Callable, state, times, sizes):
    """The state after `step(state, (t, d))` at each step up to the first of size 0.

    Schedules that are padded with zeros to one length share one compiled program. If
    `sizes` is a NumPy array, the number of steps is part of the program.

    Args:
      step: (state, (t, d)) -> state; t and d are scalars.
      state: a tree of arrays.
      times, sizes: see `times_and_sizes`, [N].
    """
    count = (sizes > 0).sum()
    times, sizes = jnp.asarray(times), jnp.asarray(sizes)
    return jax.lax.fori_loop(
        0, count, lambda i, state: step(state, (times[i], sizes[i])), state
    )


def embedded_step(d, base_steps: int):
    """The step size that the network is conditioned on: 0 for the finest, else `d`."""
    return d * (d > 1.5 / base_steps)


def sample_times(
    key: jax.Array, num: int, draw: TimeDraw, mean: float, std: float
) -> jax.Array:
    """Random times t in (0, 1), [num].

    'uniform' draws from U(0, 1), 'logit_normal' from the sigmoid of N(mean, std^2), as
    Stable Diffusion 3 does (arXiv 2403.03206, section 3.1).
    """
    if draw == 'uniform':
        return jax.random.uniform(key, (num,))
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, (num,)))


def sample_steps(
    key: jax.Array, num: int, mean: float, std: float
) -> tuple[jax.Array, jax.Array]:
    """Random t and d, each [num], with 0 < t <= t + d < 1.

    The noise levels 1 - t and 1 - t - d are two sorted draws of sigmoid(N(mean, std^2))
    (MeanFlow, arXiv 2505.13447, section 4.3).
    """
    level = jax.nn.sigmoid(mean + std * jax.random.normal(key, (2, num)))
    noisier, cleaner = level.max(0), level.min(0)
    return 1 - noisier, noisier - cleaner
