"""The public Python API: a trained network that maps labels to images.

import ism_jax
model = ism_jax.load('runs/quickstart')
images = model.sample(labels=[0, 1, 2], steps=4, guidance=1.5, seed=0)
"""

from collections.abc import Sequence
import difflib
import operator
import os

import jax
import numpy as np

from ism_jax import config_check, trained_network
from ism_jax.data import pixels
from ism_jax.interchange import exported_network, hub
from ism_jax.runtime import paths

# Largest batch; more samples are drawn in several batches.
MAX_BATCH = 64

Label = int | str | None


def load(path: str | os.PathLike, step: int | None = None) -> 'Generator':
    """Loads a trained network.

    Args:
      path: folder of a run (`ism_jax.train --workdir`) or of a network that
        `ism_jax.convert` wrote, local or in a bucket, or the id of such a network on
        the Hugging Face hub.
      step: checkpoint of a run; None for the latest.

    Raises:
      ValueError: nothing is at `path`, or it is damaged or not a generator.
    """
    names = (exported_network.TENSORS, exported_network.CONFIG)
    example = 'runs/quickstart, organisation/network'
    folder = hub.folder(paths.from_user(path, 'path'), names, example)
    return Generator(trained_network.load(folder, step))


class Generator:
    """Images from a trained network.

    Args:
      run: from `trained_network.load`.

    Attributes:
      class_names: names of the labels.
      image_shape: (H, W, C) of the images.
      base_steps: the largest number of sampling steps.
      guidance_range: (lowest, highest) guidance scale w.
      default_interval: start and end time of guidance; None if the network is not
        conditioned on them.
      trained_steps: number of training steps.
    """

    def __init__(self, run: trained_network.TrainedNetwork):
        self._run = run
        experiment = run.experiment()
        self._objective = experiment.objective
        self._sampler = experiment.make_sampler(MAX_BATCH)
        self.class_names = run.class_names
        self.base_steps = self._objective.base_steps
        self.guidance_range = self._objective.guidance_range
        self.default_interval = None
        if self._objective.conditions_on_interval:
            self.default_interval = self._objective.default_interval
        self.trained_steps = run.step
        self.image_shape = self._sampler.output_shape()

    def sample(
        self,
        labels: Label | Sequence[Label],
        steps: int = 4,
        guidance: float = 1.5,
        seed: int = 0,
        *,
        schedule: Sequence[float] | None = None,
        interval: tuple[float, float] | None = None,
    ) -> np.ndarray:
        """One image for each label.

        Image i starts from noise i of the seed, for any steps, guidance scale and
        number of images. A call compiles if the number of images, rounded up to a
        power of two, is new.

        Args:
          labels: indices or names of classes; None for the null label. A single label
            is a batch of one.
          steps: network calls, 1 .. `base_steps`.
          guidance: guidance scale w, in `guidance_range`.
          seed: seed of the noise.
          schedule: step sizes that sum to 1, instead of `steps`.
          interval: start and end time of guidance, for a network that is conditioned
            on them; None for the method's default.

        Returns:
          uint8 [N, H, W, C].

        Raises:
          ValueError: a label, number of steps, schedule, guidance scale or interval
            that the network was not trained for.
        """
        if np.ndim(labels) == 0:
            labels = [labels]
        indices = [self._label(label) for label in labels]
        if not indices:
            raise ValueError('labels = [] is empty; give one label for each image')
        batches = self._sampler.batches(
            self._run.params,
            jax.random.key(seed),
            indices,
            **self._settings(steps, schedule, guidance, interval),
            # Powers of two, so that few sizes are compiled.
            batch_size=min(1 << (len(indices) - 1).bit_length(), MAX_BATCH),
        )
        return np.concatenate([pixels.to_uint8(images) for images, _ in batches])

    def path(
        self,
        label: Label,
        steps: int = 8,
        guidance: float = 1.5,
        seed: int = 0,
        *,
        schedule: Sequence[float] | None = None,
        interval: tuple[float, float] | None = None,
    ) -> np.ndarray:
        """The sampling path of one image: its noise, then the state after each step.

        Args:
          label, steps, guidance, seed, schedule, interval: see `sample`; the path is
            that of image 0.

        Returns:
          uint8 [steps + 1, H, W, C].

        Raises:
          ValueError: see `sample`; or `has_paths` is False.
        """
        self._check_paths()
        states = self._sampler.trajectory(
            self._run.params,
            self._noise(seed),
            [self._label(label)],
            **self._settings(steps, schedule, guidance, interval),
        )
        return np.concatenate([pixels.to_uint8(state) for state in states])

    def between(
        self,
        label: Label,
        seeds: tuple[int, int],
        count: int = 8,
        steps: int = 4,
        guidance: float = 1.5,
        *,
        schedule: Sequence[float] | None = None,
        interval: tuple[float, float] | None = None,
    ) -> np.ndarray:
        """Images from noise that is interpolated spherically between two seeds.

        Args:
          label, steps, guidance, schedule, interval: see `sample`.
          seeds: seeds of the first and the last image; each is image 0 of its seed.
          count: number of images, at least 2.

        Returns:
          uint8 [count, H, W, C].

        Raises:
          ValueError: see `path`; or `count` is less than 2.
        """
        self._check_paths()
        if count < 2:
            raise ValueError(f'count = {count} must be at least 2, for both ends')
        ends = [np.asarray(self._noise(seed)) for seed in seeds]
        images = self._sampler.final(
            self._run.params,
            slerp(*ends, np.linspace(0, 1, count, dtype=np.float32)),
            [self._label(label)] * count,
            **self._settings(steps, schedule, guidance, interval),
        )
        return pixels.to_uint8(images)

    @property
    def has_paths(self) -> bool:
        """Whether `path` and `between` work: sampling adds no noise between steps."""
        return self._objective.deterministic

    def _check_paths(self) -> None:
        if not self.has_paths:
            raise ValueError(
                "this method's sampler adds noise between steps, so the initial noise "
                'does not determine an image; use sample'
            )

    def _noise(self, seed: int) -> jax.Array:
        return self._sampler.noise(jax.random.key(seed), [0])

    def schedule(self, steps: int | Sequence[float]) -> tuple[float, ...]:
        """Step sizes of a number of steps, or checked step sizes.

        Raises:
          ValueError: the network was not trained for these steps.
        """
        return self._objective.schedule(steps)

    def _settings(self, steps, schedule, guidance, interval) -> dict:
        """Checked options of the sampler."""
        config_check.check_guidance(self._objective, (guidance,))
        config_check.check_interval(self._objective, interval)
        given = operator.index(steps) if schedule is None else schedule
        return dict(guidance=guidance, schedule=self.schedule(given), interval=interval)

    def _label(self, label: Label) -> int:
        """The index of a label."""
        names, hint = self.class_names, ''
        if label is None:
            return len(names)
        if isinstance(label, str):
            if label in names:
                return names.index(label)
            close = difflib.get_close_matches(label, names, n=1)
            hint = f'; did you mean {close[0]!r}?' if close else ''
        elif not isinstance(label, bool) and label in range(len(names)):
            return int(label)
        raise ValueError(
            f'label {label!r} must be in 0 .. {len(names) - 1}, a name in class_names, '
            f'or None for the null label{hint}'
        )

    def __repr__(self):
        model = self._run.model
        return (
            f'Generator({type(model).__name__}, {model.sizes()}, '
            f'{len(self.class_names)} classes, images {self.image_shape}, trained '
            f'{self.trained_steps} steps)'
        )


def slerp(a: np.ndarray, b: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Spherical interpolation from a to b; the norm is interpolated linearly.

    Linear interpolation of normal noise has a smaller norm than any noise that the
    network was trained on (White 2016, arXiv 1609.04468).

    a and b are [1, ...]; `fractions` [N] are 0 for a and 1 for b; the result is
    [N, ...].
    """
    norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
    angle = np.arccos(np.clip(np.sum(a * b) / (norm_a * norm_b), -1, 1))
    fractions = fractions.reshape(-1, *[1] * (a.ndim - 1))
    if angle < 1e-4:
        return ((1 - fractions) * a + fractions * b).astype(a.dtype)
    first = np.sin((1 - fractions) * angle) * a / norm_a
    last = np.sin(fractions * angle) * b / norm_b
    norm = (1 - fractions) * norm_a + fractions * norm_b
    return ((first + last) / np.sin(angle) * norm).astype(a.dtype)
