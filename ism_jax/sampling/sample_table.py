"""A table of samples: numbers of steps by guidance scales, from the same noise."""

from collections.abc import Sequence

import jax
import numpy as np

from ism_jax.sampling import image_grid
from ism_jax.sampling.sampler import Sampler


def draw(
    sampler: Sampler,
    params,
    key: jax.Array,
    labels: Sequence[int],
    *,
    schedules: Sequence[int | Sequence[float]],
    guidance: Sequence[float],
    interval: tuple[float, float] | None = None,
) -> np.ndarray:
    """Samples for every schedule and guidance scale.

    Args:
      sampler: draws the samples.
      params: inference EMA parameters.
      key: key of the noise, which is the same in every cell.
      labels: one for each sample of a cell.
      schedules: number of steps, or step sizes, of each row.
      guidance: guidance scale w of each column.
      interval: start and end time of guidance; None for the method's default.

    Returns:
      [schedules, guidance, labels, H, W, C] float32, not clipped.

    Raises:
      ValueError: the network was not trained for a schedule.
    """

    def cell(schedule, w):
        batches = sampler.batches(
            params,
            key,
            labels,
            guidance=w,
            schedule=schedule,
            interval=interval,
            batch_size=min(sampler.batch_size, len(labels)),
        )
        return np.concatenate([np.asarray(images) for images, _ in batches])

    return np.stack([[cell(s, w) for w in guidance] for s in schedules])


def picture(
    images: np.ndarray, steps: Sequence[int], guidance: Sequence[float]
) -> np.ndarray:
    """The figure of a table of images with 1 or 3 channels, for `write_png`.

    Args:
      images: from `draw`, floating in [-1, 1] or uint8.
      steps: number of steps of each row.
      guidance: guidance scale w of each column.

    Returns:
      uint8 [H', W', 3].
    """
    return image_grid.steps_by_guidance_figure(
        images,
        steps,
        guidance,
        columns=min(5, images.shape[2]),
        scale=image_grid.readable_scale(images.shape[3]),
    )
