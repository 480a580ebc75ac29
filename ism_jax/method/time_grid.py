"""Times and step sizes: the dyadic grid on which shortcut models are trained.

Steps are powers of two, 1, 1/2, ..., 1/base_steps; a step of size `d` starts at a
multiple of `d`. The finest step, 1/base_steps, is the instantaneous velocity and is
shown to the network as `d = 0` (Shortcut Models, arXiv 2410.12557, section 3; iSM,
arXiv 2510.21250, section 3).
"""

from collections.abc import Sequence
import math

import numpy as np


def check_base_steps(base_steps: int, field: str = 'base_steps') -> None:
    """Raises ValueError unless `base_steps` is a power of two of at least 2."""
    if base_steps < 2 or base_steps & (base_steps - 1):
        below = 2 ** max(1, int(math.log2(max(base_steps, 2))))
        raise ValueError(
            f'{field} = {base_steps} must be a power of two of at least 2, such as '
            f'{below} or {2 * below}: steps are halved down to 1/{field}'
        )


def num_levels(base_steps: int) -> int:
    """How many step sizes self-consistency trains: 1, 1/2, ..., 2/base_steps."""
    check_base_steps(base_steps)
    return int(math.log2(base_steps))


def dyadic_schedule(num_steps: int, base_steps: int = 128) -> tuple[float, ...]:
    """Step sizes from noise to data, summing to 1, each a power of two.

    A power of two gives equal steps. Any other number starts from the power of two
    below it and halves steps from the data end on: 3 steps are 1/2, 1/4, 1/4, and 5
    are 1/4, 1/4, 1/4, 1/8, 1/8. Large steps thus come first, where the flow is
    straightest, and every step starts at a multiple of its own size, as in training.

    Raises:
      ValueError: fewer than 1 or more than `base_steps` steps.
    """
    check_base_steps(base_steps)
    if not 1 <= num_steps <= base_steps:
        raise ValueError(
            f'steps = {num_steps} must lie in 1 .. {base_steps} (the base steps that '
            'the model was trained with)'
        )
    coarse = 2 ** int(math.log2(num_steps))
    halved = num_steps - coarse
    return (1 / coarse,) * (coarse - halved) + (0.5 / coarse,) * (2 * halved)


def check_schedule(schedule: Sequence[float], base_steps: int = 128) -> None:
    """Refuses a schedule that the network was not trained for.

    Raises:
      ValueError: a step is no power of two in [1/base_steps, 1], a step does not
        start at a multiple of its size, or the steps do not sum to 1.
    """
    check_base_steps(base_steps)
    t = 0.0  # Sums of powers of two are exact in floating point.
    for number, d in enumerate(schedule):
        if not 1 / base_steps <= d <= 1 or math.frexp(d)[0] != 0.5:
            raise ValueError(
                f'schedule {list(schedule)}: step {number} of size {d} is not one of '
                f'1, 1/2, ..., 1/{base_steps}, the sizes that the model knows'
            )
        if t % d:
            raise ValueError(
                f'schedule {list(schedule)}: step {number} of size {d} starts at '
                f't = {t}, which is not a multiple of {d}; put larger steps first or '
                'in aligned places'
            )
        t += d
    if t != 1:
        raise ValueError(
            f'schedule {list(schedule)} ends at t = {t}; the steps must sum to 1'
        )


def times_and_sizes(
    schedule: Sequence[float], base_steps: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """Start times and step sizes, each [N] float32.

    Raises:
      ValueError: see `check_schedule`.
    """
    check_schedule(schedule, base_steps)
    d = np.asarray(schedule, np.float32)
    t = np.concatenate([[0.0], np.cumsum(schedule)[:-1]]).astype(np.float32)
    return t, d


def embedded_step(d, base_steps: int):
    """The step size that the network is told: 0 for the finest, else `d` itself."""
    return d * (d > 1.5 / base_steps)
