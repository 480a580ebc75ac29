"""The dyadic time grid on which shortcut models are trained and sampled.

Step sizes are powers of two, 1, 1/2, ..., 1/base_steps, and a step of size `d` starts
at a multiple of `d`. The finest step 1/base_steps takes the instantaneous velocity: the
network is then conditioned on d = 0 (Shortcut Models, arXiv 2410.12557, section 3; iSM,
arXiv 2510.21250, section 3).
"""

from collections.abc import Sequence
import math

import numpy as np


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
    if not 1 <= num_steps <= base_steps:
        raise ValueError(
            f'steps = {num_steps} must lie in 1 .. {base_steps}, the base steps that '
            'the network was trained with'
        )
    coarse = 2 ** int(math.log2(num_steps))
    halved = num_steps - coarse
    return (1 / coarse,) * (coarse - halved) + (0.5 / coarse,) * (2 * halved)


def check_schedule(schedule: Sequence[float], base_steps: int = 128) -> None:
    """Checks that the network was trained for all steps of a schedule.

    Raises:
      ValueError: a step is not a power of two in [1/base_steps, 1] or does not start at
        a multiple of its size, or the steps do not sum to 1.
    """
    fault = _schedule_fault(schedule, base_steps)
    if fault:
        raise ValueError(f'schedule {list(schedule)} {fault}')


def _schedule_fault(schedule, base_steps) -> str:
    """The fault of a schedule in words; '' if it is valid."""
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


def times_and_sizes(
    schedule: Sequence[float], base_steps: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """Start times and sizes of the steps of a schedule, each [N] float32.

    Raises:
      ValueError: see `check_schedule`.
    """
    check_schedule(schedule, base_steps)
    d = np.asarray(schedule, np.float32)
    t = np.concatenate([[0.0], np.cumsum(schedule)[:-1]]).astype(np.float32)
    return t, d


def embedded_step(d, base_steps: int):
    """The step size that the network is conditioned on: 0 for the finest, else `d`."""
    return d * (d > 1.5 / base_steps)
