"""A trained network to call: labels in, images out.

import ism_jax
model = ism_jax.load('runs/quickstart')
images = model.sample(labels=[0, 1, 2], steps=4, guidance=1.5, seed=0)
"""

from collections.abc import Sequence
import difflib
import os
from pathlib import Path

import jax
import numpy as np

from ism_jax import build
from ism_jax import checkpoint
from ism_jax import config as config_lib
from ism_jax import hub
from ism_jax import images as pictures
from ism_jax import portable
from ism_jax import schedule as schedules

# Most samples that are made at once; more come in several batches.
MAX_BATCH = 64


def load(path: str | os.PathLike, step: int | None = None) -> 'Generator':
    """Loads a network from anywhere.

    Args:
      path: of a run (`ism_jax.train --workdir`), of a network that `ism_jax.convert`
        wrote, or the id of such a network on the Hugging Face hub.
      step: which checkpoint of a run; None for the latest.

    Raises:
      ValueError: there is none, it is damaged, or it is no generator.
    """
    place = Path(path).expanduser()
    if not place.exists():
        names = (portable.TENSORS, portable.CONFIG)
        place = hub.folder(path, names, 'runs/quickstart, organisation/network')
    return Generator(checkpoint.load_run(place, step))


class Generator:
    """Makes images with a trained network.

    Args:
      run: of `checkpoint.load_run`.

    Attributes:
      class_names: of the labels.
      image_shape: (H, W, C) of the images.
      base_steps: most steps.
      guidance_range: (least, most) strength of guidance.
      trained_steps: how long it was trained.
    """

    def __init__(self, run: checkpoint.Run):
        self._run = run
        self._objective = config_lib.make_objective(run.config, len(run.class_names))
        self._sampler = build.make_sampler(
            run.config, self._objective, run.apply, run.image_shape,
            batch_size=MAX_BATCH,
        )  # fmt: skip
        self.class_names = run.class_names
        self.base_steps = self._objective.finest_steps()
        self.guidance_range = self._objective.guidance_range()
        self.trained_steps = run.step
        self.image_shape = self._sampler.shown_shape()

    def sample(
        self,
        labels: int | str | None | Sequence[int | str | None],
        steps: int = 4,
        guidance: float = 1.5,
        seed: int = 0,
        *,
        schedule: Sequence[float] | None = None,
    ) -> np.ndarray:
        """Makes an image for each label.

        Image number i is made of noise number i of the seed, whatever the steps, the
        guidance, and however many there are. The first call of a number of steps
        compiles, for numbers of images up to the next power of two.

        Args:
          labels: numbers or names of classes; None for no class. One is a batch of one.
          steps: network calls, 1 .. `base_steps`.
          guidance: strength w, in `guidance_range`; for a network without guidance 0.
          seed: of the noise.
          schedule: step sizes that sum to 1, in place of `steps`.

        Returns:
          uint8 [N, H, W, C].

        Raises:
          ValueError: a label, a number of steps, a schedule or a strength that the
            network does not know.
        """
        if np.ndim(labels) == 0:
            labels = [labels]
        numbers = [self._label(label) for label in labels]
        if not numbers:
            raise ValueError('labels = [] asks for no image; give a label for each')
        config_lib.check_guidance(self._objective, (guidance,))
        if schedule is None:
            schedule = schedules.dyadic_schedule(steps, self.base_steps)
        batches = self._sampler.batches(
            self._run.params, jax.random.key(seed), numbers, guidance=guidance,
            schedule=tuple(schedule),
            # Powers of two, so that few sizes are compiled.
            batch_size=min(1 << (len(numbers) - 1).bit_length(), MAX_BATCH),
        )  # fmt: skip
        return np.concatenate([pictures.to_uint8(images) for images, _ in batches])

    def _label(self, label) -> int:
        classes = len(self.class_names)
        if label is None:
            return classes
        if isinstance(label, str):
            if label in self.class_names:
                return self.class_names.index(label)
            close = difflib.get_close_matches(label, self.class_names, n=1)
            hint = f' (did you mean {close[0]!r}?)' if close else ''
            raise ValueError(
                f'label {label!r} is no class of this network{hint}; its classes are '
                'in class_names'
            )
        if isinstance(label, bool) or not 0 <= label < classes or label != int(label):
            raise ValueError(
                f'label {label!r} must be in 0 .. {classes - 1}, a name of '
                'class_names, or None for no class'
            )
        return int(label)

    def __repr__(self):
        return (
            f'Generator({self._run.model.depth} layers of '
            f'{self._run.model.hidden_size}, {len(self.class_names)} classes, images '
            f'{self.image_shape}, trained {self.trained_steps} steps)'
        )
