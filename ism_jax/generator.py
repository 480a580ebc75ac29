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

from ism_jax import config as config_lib
from ism_jax import experiment, trained_network
from ism_jax.data import pixels
from ism_jax.interchange import exported_network, hub
from ism_jax.method import time_grid

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
        names = (exported_network.TENSORS, exported_network.CONFIG)
        place = hub.folder(path, names, 'runs/quickstart, organisation/network')
    return Generator(trained_network.load(place, step))


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

    def __init__(self, run: trained_network.TrainedNetwork):
        self._run = run
        self._objective = config_lib.make_objective(run.config, len(run.class_names))
        self._sampler = experiment.make_sampler(
            run.config, self._objective, run.apply, run.image_shape,
            batch_size=MAX_BATCH,
        )  # fmt: skip
        self.class_names = run.class_names
        self.base_steps = self._objective.base_steps
        self.guidance_range = self._objective.guidance_range
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
        schedule = self._schedule(steps, schedule, guidance)
        batches = self._sampler.batches(
            self._run.params, jax.random.key(seed), numbers, guidance=guidance,
            schedule=schedule,
            # Powers of two, so that few sizes are compiled.
            batch_size=min(1 << (len(numbers) - 1).bit_length(), MAX_BATCH),
        )  # fmt: skip
        return np.concatenate([pixels.to_uint8(images) for images, _ in batches])

    def path(
        self,
        label: int | str | None,
        steps: int = 8,
        guidance: float = 1.5,
        seed: int = 0,
        *,
        schedule: Sequence[float] | None = None,
    ) -> np.ndarray:
        """The way of one image: its noise, then what is there after each step.

        Args:
          label, steps, guidance, seed, schedule: see `sample`; image number 0.

        Returns:
          uint8 [steps + 1, H, W, C].

        Raises:
          ValueError: see `sample`; or the method adds noise between steps.
        """
        states = self._sampler.states(
            self._run.params, self._noise(seed), [self._label(label)],
            guidance=guidance, schedule=self._schedule(steps, schedule, guidance),
        )  # fmt: skip
        return np.concatenate([pixels.to_uint8(state) for state in states])

    def between(
        self,
        label: int | str | None,
        seeds: tuple[int, int],
        count: int = 8,
        steps: int = 4,
        guidance: float = 1.5,
        *,
        schedule: Sequence[float] | None = None,
    ) -> np.ndarray:
        """Images of noises between those of two seeds, on the sphere.

        Args:
          label, steps, guidance, schedule: see `sample`.
          seeds: of the first and of the last image, image number 0 of each.
          count: of images, at least 2.

        Returns:
          uint8 [count, H, W, C].

        Raises:
          ValueError: see `path`; or fewer than 2 images.
        """
        if count < 2:
            raise ValueError(f'count = {count} must be at least 2: both ends')
        ends = [np.asarray(self._noise(seed)) for seed in seeds]
        noise = slerp(*ends, np.linspace(0, 1, count, dtype=np.float32))
        schedule = self._schedule(steps, schedule, guidance)
        images = self._sampler.ends(
            self._run.params, noise, [self._label(label)] * count, guidance=guidance,
            schedule=schedule,
        )  # fmt: skip
        return pixels.to_uint8(images)

    @property
    def has_paths(self) -> bool:
        """Whether `path` and `between` work: the method adds no noise between steps."""
        return self._sampler.deterministic

    def _noise(self, seed: int) -> jax.Array:
        return self._sampler.noise(jax.random.key(seed), [0])

    def _schedule(self, steps, schedule, guidance) -> tuple[float, ...]:
        """Step sizes; refuses a guidance that the method does not offer."""
        config_lib.check_guidance(self._objective, (guidance,))
        if schedule is None:
            return time_grid.dyadic_schedule(steps, self.base_steps)
        time_grid.check_schedule(schedule, self.base_steps)
        return tuple(schedule)

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


def slerp(a: np.ndarray, b: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Points on the great circle from a to b, whose length goes evenly as well.

    Straight lines between normal noises pass through shorter ones, of which a network
    has seen none (White 2016, arXiv 1609.04468).

    Args:
      a, b: [1, ...].
      parts: [N], 0 for a and 1 for b.

    Returns:
      [N, ...].
    """
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    cosine = np.clip(np.sum(a * b) / np.prod(lengths), -1, 1)
    angle = np.arccos(cosine)
    parts = parts.reshape(-1, *[1] * (a.ndim - 1))
    if angle < 1e-4:
        return ((1 - parts) * a + parts * b).astype(a.dtype)
    first = np.sin((1 - parts) * angle) * a / lengths[0]
    last = np.sin(parts * angle) * b / lengths[1]
    length = (1 - parts) * lengths[0] + parts * lengths[1]
    return ((first + last) / np.sin(angle) * length).astype(a.dtype)
