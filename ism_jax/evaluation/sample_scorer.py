"""Scores samples by a small classifier, against the images of a source."""

from collections.abc import Callable, Sequence
import json
import operator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ism_jax.evaluation import classifier, scores
from ism_jax.method import time_grid
from ism_jax.sampling.sampler import Sampler

# Real images that are looked at: enough for 64 features, and in memory at once.
MAX_REAL_IMAGES = 20_000


class SampleScorer:
    """Scores samples against the images of a source.

    Args:
      source: see `ism_jax.data.sources`.
      sampler: makes the samples.
      cache_dir: where the classifier is kept.
      seed: of the samples' noise and of the choice of real images.
      show: is told in words what is done.

    Attributes:
      floor: scores of held-out real images, against the same reference.
    """

    def __init__(
        self, source, sampler: Sampler, *, cache_dir, seed: int,
        show: Callable[[str], Any] = print,
    ):  # fmt: skip
        order = np.random.default_rng(seed).permutation(len(source))[:MAX_REAL_IMAGES]
        records = [source[int(index)] for index in order]
        images = np.stack([record['image'] for record in records])
        labels = np.asarray([record['label'] for record in records])
        self.num_classes = len(source.class_names)
        features = classifier.load_or_train(
            images,
            labels,
            num_classes=self.num_classes,
            cache_dir=cache_dir,
            report=show,
        )
        reference, held_out = classifier.split(len(images))
        statistics = scores.reference_statistics(features, images[reference])
        self._evaluator = scores.Evaluator(features, statistics)
        self.floor = self._evaluator.evaluate([(images[held_out], labels[held_out])])
        self.reference = f'{len(reference):,} real images of {source!r}'
        self._sampler = sampler
        self._seed = seed

    def __call__(
        self,
        params,
        *,
        steps: int,
        guidance: float,
        samples: int,
        noise_seed: int | None = None,
    ) -> dict:
        """Scores one setting; every class is sampled equally often.

        `noise_seed` is of the samples' noise, where it is not the scorer's seed.
        """
        batches = self._sampler.batches(
            params,
            jax.random.key(self._seed if noise_seed is None else noise_seed),
            np.arange(samples) % self.num_classes,
            guidance=guidance,
            schedule=time_grid.dyadic_schedule(steps, self._sampler.base_steps),
        )
        record = {'steps': steps, 'guidance': guidance}
        return record | self._evaluator.evaluate(batches)


def score_settings(
    scorer: SampleScorer,
    params,
    *,
    trained_steps: int,
    steps: Sequence[int],
    guidance: Sequence[float],
    samples: int,
    workdir,
    show: Callable[[str], Any] = print,
) -> list[dict]:
    """Scores every pair of steps and guidance; shows a table, writes scores.json.

    Records of earlier evaluations stay in the file, but for those of the same cell,
    number of samples and `trained_steps`, the training steps of `params`.
    """
    records = [
        scorer(params, steps=number, guidance=float(w), samples=samples)
        | {'trained_steps': trained_steps}
        for number in steps
        for w in guidance
    ]
    path = Path(workdir) / 'scores.json'
    earlier = json.loads(path.read_text()) if path.exists() else []
    cell = operator.itemgetter('trained_steps', 'samples', 'steps', 'guidance')
    again = {cell(record) for record in records}
    kept = [record for record in earlier if cell(record) not in again]
    scores.write_records(path, kept + records)
    table = scores.format_table(records, floor=scorer.floor, reference=scorer.reference)
    show(f'\n{table}\n')
    return records
