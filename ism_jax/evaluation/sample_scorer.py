"""Scores samples by a small classifier that is trained on the real images.

The scores are the Frechet distance of the classifier's features, and its accuracy on
the samples' labels.
"""

from collections.abc import Callable, Iterable, Sequence
import json
import math
from typing import Any
import warnings

import jax
import numpy as np

from ism_jax.data import pixels
from ism_jax.evaluation import classifier, frechet_distance, records, score_table
from ism_jax.runtime import paths
from ism_jax.sampling.sampler import Sampler

# Real images to train on and compare with: enough for 64 features, and they fit in
# memory.
MAX_REAL_IMAGES = 20_000
MIN_REAL_IMAGES = 20  # A tenth is held out, and its covariance needs two.


class SampleScorer:
    """Scores samples against the images of a source.

    Args:
      source: real images, see `ism_jax.data.sources`.
      sampler: draws the samples.
      cache_dir: folder of the classifier's file.
      seed: seed of the samples' noise and of the choice of real images.
      samples: number of samples of a score, and of real images of the floor; FD falls
        with this number, so that only equal numbers can be compared.
      log: called with progress messages.

    Attributes:
      floor: scores of `samples` real images against the same reference: the held-out
        ones, which are fewer in small data sets, and others that are not in it.
      reference: describes the real images.
    """

    def __init__(
        self,
        source,
        sampler: Sampler,
        *,
        cache_dir,
        seed: int,
        samples: int,
        log: Callable[[str], Any] = print,
    ):
        if len(source) < MIN_REAL_IMAGES:
            raise ValueError(
                f'{source!r} has {len(source)} images, but scores need at least '
                f'{MIN_REAL_IMAGES}: add images, or turn scores off'
            )
        # A tenth of the real images is held out; the floor may need more.
        extra = max(0, samples - MAX_REAL_IMAGES // 10)
        order = np.random.default_rng(seed).permutation(len(source))
        examples = [source[int(index)] for index in order[: MAX_REAL_IMAGES + extra]]
        images = np.stack([example['image'] for example in examples])
        labels = np.asarray([example['label'] for example in examples])
        real = slice(MAX_REAL_IMAGES)
        self.num_classes = len(source.class_names)
        self._classifier = classifier.load_or_train(
            images[real],
            labels[real],
            num_classes=self.num_classes,
            cache_dir=cache_dir,
            log=log,
        )
        kept, held_out = classifier.split(len(images[real]))
        self._statistics = feature_statistics(self._classifier, images[kept])
        floor = [*held_out, *range(MAX_REAL_IMAGES, len(images))][:samples]
        self.floor = self.score([(images[floor], labels[floor])])
        self.reference = f'{len(kept):,} real images of {source!r}'
        self._sampler = sampler
        self._seed = seed

    def __call__(
        self,
        params,
        *,
        steps: int,
        guidance: float,
        samples: int,
        interval: tuple[float, float] | None = None,
        noise_seed: int | None = None,
    ) -> dict:
        """The record of one setting; every class is sampled equally often.

        Args:
          params: inference EMA parameters.
          steps: number of sampling steps.
          guidance: guidance scale w.
          samples: number of samples, at least 2.
          interval: start and end time of guidance; None for the method's default.
          noise_seed: seed of the samples' noise; None for the scorer's seed.
        """
        batches = self._sampler.batches(
            params,
            jax.random.key(self._seed if noise_seed is None else noise_seed),
            np.arange(samples) % self.num_classes,
            guidance=guidance,
            schedule=steps,
            interval=interval,
        )
        setting = {'steps': steps, 'guidance': guidance}
        if interval is not None:
            setting['interval'] = list(interval)
        return setting | self.score(batches)

    def score(self, batches: Iterable[tuple]) -> dict[str, float | int]:
        """The scores of all images together, rounded to 8 bits like the real images.

        Args:
          batches: batches of images [b, H, W, C] in [-1, 1] or uint8, and labels [b].

        Returns:
          `fd`, the squared Frechet distance to the reference; `accuracy`, the fraction
          classified as their label; `samples`, their number. An image with NaN counts
          as misclassified, makes `fd` NaN and causes a warning, not an error, so that a
          diverged model does not stop its training.
        """
        statistics = frechet_distance.FeatureStatistics(self._statistics.num_features)
        samples = num_nan = correct = 0
        for images, labels in batches:
            images = np.asarray(images)
            samples += len(images)
            valid = _without_nan(images)
            num_nan += len(images) - int(valid.sum())
            if not valid.any():
                continue
            out = self._classifier(_round(images[valid]))
            statistics.update(out['features'])
            predicted = out['logits'].argmax(axis=1)
            correct += int((predicted == np.asarray(labels)[valid]).sum())
        if num_nan:
            warnings.warn(
                f'{num_nan} of {samples} samples contain NaN, so fd is NaN: the model '
                'or the sampler diverged',
                stacklevel=2,
            )
            fd = math.nan
        else:
            fd = frechet_distance.frechet_distance(statistics, self._statistics)
        return {'fd': fd, 'accuracy': correct / samples, 'samples': samples}


def feature_statistics(
    feature_function, images, *, batch_size: int = 250
) -> frechet_distance.FeatureStatistics:
    """Statistics of the features of real images, rounded to 8 bits.

    Args:
      feature_function: float32 images in [-1, 1] -> a dict with `features`, [b, F].
      images: [N, H, W, C], floating in [-1, 1] or uint8, N >= 1.
      batch_size: images per call.
    """
    statistics = None
    for start in range(0, len(images), batch_size):
        batch = _round(images[start : start + batch_size])
        features = np.asarray(feature_function(batch)['features'])
        if statistics is None:
            statistics = frechet_distance.FeatureStatistics(features.shape[1])
        statistics.update(features)
    return statistics


def score_settings(
    scorer: SampleScorer,
    params,
    *,
    trained_steps: int,
    steps: Sequence[int],
    guidance: Sequence[float],
    interval: tuple[float, float] | None = None,
    samples: int,
    workdir,
    log: Callable[[str], Any] = print,
) -> list[dict]:
    """Scores every pair of steps and guidance, and writes and logs the results.

    The results are added to `scores.json`, where they replace earlier records of the
    same steps, guidance, interval, number of samples and `trained_steps`.

    Args:
      scorer: the run's scorer.
      params: inference EMA parameters.
      trained_steps: training steps of `params`.
      steps: numbers of sampling steps.
      guidance: guidance scales w.
      interval: start and end time of guidance; None for the method's default.
      samples: number of samples of each pair.
      workdir: folder of `scores.json`.
      log: called with the table.

    Returns:
      The new records.
    """
    new = [
        scorer(
            params, steps=number, guidance=float(w), samples=samples, interval=interval
        )
        | {'trained_steps': trained_steps}
        for number in steps
        for w in guidance
    ]
    path = paths.to_path(workdir) / 'scores.json'
    earlier = json.loads(paths.read_bytes(path)) if path.exists() else []
    fields = ('trained_steps', 'samples', 'steps', 'guidance', 'interval')
    setting = lambda record: [record.get(name) for name in fields]
    replaced = [setting(record) for record in new]
    kept = [record for record in earlier if setting(record) not in replaced]
    records.write_records(path, kept + new)
    table = score_table.classifier_table(
        new, floor=scorer.floor, reference=scorer.reference
    )
    log(f'\n{table}\n')
    return new


def _round(images):
    """float32 in [-1, 1], rounded to 8 bits."""
    return pixels.to_float(pixels.to_uint8(images))


def _without_nan(images):
    """Whether each image has no NaN, [B] bool."""
    if images.dtype == np.uint8:
        return np.ones(len(images), bool)
    values = images.astype(np.float32).reshape(len(images), -1)
    return ~np.isnan(values).any(axis=1)
