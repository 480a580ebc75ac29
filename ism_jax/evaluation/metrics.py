"""The metrics by name: what each needs, and its scores.

    fid               Frechet distance of Inception's features
    sfid              Frechet distance of Inception's spatial features
    is                Inception score
    pr                precision and recall of Inception's features
    kid               kernel distance of Inception's features
    fd_dinov2         Frechet distance of DINOv2's features
    fd_efficientnet   Frechet distance of EfficientNet-Lite0's features

A score is recorded under the name of its network. 'FID' means only the published
Inception weights; with other weights it is 'FD-<name>', and the other scores get that
name too.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from ism_jax.evaluation import (
    feature_network,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    reference_statistics,
)


class Metric(NamedTuple):
    """What a metric needs.

    Attributes:
      network: 'inception', 'dinov2' or 'efficientnet'.
      output: the network output that it compares.
      needs_moments: whether it needs the reference's mean and covariance.
      needs_features: whether it needs features of individual reference images.
      min_samples: smallest number of samples, and of reference images if it needs their
        features.
    """

    network: str
    output: str = 'features'
    needs_moments: bool = False
    needs_features: bool = False
    min_samples: int = 2


METRICS = {
    'fid': Metric('inception', needs_moments=True),
    'sfid': Metric('inception', 'spatial', needs_moments=True),
    'is': Metric('inception', 'unbiased_logits', min_samples=10),
    'pr': Metric(
        'inception', needs_features=True, min_samples=precision_recall.NEIGHBOURS + 1
    ),
    'kid': Metric('inception', needs_features=True),
    'fd_dinov2': Metric('dinov2', needs_moments=True),
    'fd_efficientnet': Metric('efficientnet', needs_moments=True),
}
KID_SUBSET = 1000  # Fewer if there are fewer samples or real images.


def networks(names: Sequence[str]) -> list[str]:
    """Names of the networks that the metrics need, each once.

    Raises:
      ValueError: an unknown metric, or no metric.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        problem = f'metric {unknown[0]!r} is unknown' if unknown else 'no metrics'
        raise ValueError(f'{problem}; choose among {", ".join(METRICS)}')
    return list(dict.fromkeys(METRICS[name].network for name in names))


@dataclasses.dataclass(frozen=True)
class MetricSet:
    """Metrics, with the networks and the real images that they need.

    Attributes:
      names: names of the metrics, keys of `METRICS`.
      networks: the networks by name.
      references: statistics of the real images, for each network.
    """

    names: tuple[str, ...]
    networks: Mapping[str, feature_network.FeatureNetwork]
    references: Mapping[str, reference_statistics.Reference]

    def check(self, num_samples: int) -> None:
        """Checks, before any sampling, that the samples can be scored.

        Raises:
          ValueError: there are too few samples or real images, or the reference lacks
            what a metric needs.
        """
        for name in self.names:
            metric = METRICS[name]
            reference = self.references[metric.network]
            counts, lacks = {'samples': num_samples}, ''
            if metric.needs_moments and metric.output not in reference.moments:
                lacks = f'statistics of {metric.output!r}'
            if metric.needs_features and reference.features is None:
                lacks = 'images'
            elif metric.needs_features:
                counts['real images'] = len(reference.features)
            if lacks:
                raise ValueError(
                    f'{name} needs {lacks}, which the reference '
                    f'({reference.description}) lacks; give images, or omit {name}'
                )
            for kind, count in counts.items():
                if count < metric.min_samples:
                    raise ValueError(
                        f'{count} {kind} are too few for {name}, which needs at least '
                        f'{metric.min_samples}'
                    )

    def extract(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The features that the metrics need, 'network/output' to [N, F]."""
        features = {}
        for name, network in self.networks.items():
            out = network(images)
            chosen = [METRICS[metric] for metric in self.names]
            for output in dict.fromkeys(m.output for m in chosen if m.network == name):
                features[f'{name}/{output}'] = out[output]
        return features

    def compute(self, features: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The scores of samples.

        Args:
          features: features of all samples, as from `extract`.

        Returns:
          Scores by the names under which they are recorded. 'is' and 'kid' also give
          the deviation over splits or subsets; 'pr' gives two scores.
        """
        scores = {}
        for name in self.names:
            metric = METRICS[name]
            scores |= _scores(
                name,
                features[f'{metric.network}/{metric.output}'],
                self.references[metric.network],
                self.networks[metric.network].distance,
            )
        return scores

    def description(self) -> dict[str, Any]:
        """Networks and real images, for the record."""
        return {
            name: network.identity
            | {
                'reference': self.references[name].description,
                'reference_key': self.references[name].key,
                'reference_images': self.references[name].count,
            }
            for name, network in self.networks.items()
        }


def _scores(name, features, reference, distance) -> dict[str, float]:
    """The scores of one metric, from the features [N, F] of its network output."""
    suffix = '' if distance == 'FID' else f' ({distance.removeprefix("FD-")})'
    if name == 'is':
        mean, deviation = inception_score.inception_score(features)
        return {f'IS{suffix}': mean, f'IS{suffix} deviation': deviation}
    if name == 'kid':
        size = min(KID_SUBSET, len(features), len(reference.features))
        mean, deviation = kernel_distance.kernel_distance(
            features, reference.features, subset_size=size
        )
        return {f'KID{suffix}': mean, f'KID{suffix} deviation': deviation}
    if name == 'pr':
        pair = precision_recall.precision_recall(features, reference.features)
        return {f'Precision{suffix}': pair.precision, f'Recall{suffix}': pair.recall}
    statistics = frechet_distance.FeatureStatistics(features.shape[1])
    for start in range(0, len(features), 4096):  # One part at a time in float64.
        statistics.update(features[start : start + 4096])
    label = f's{distance}' if name == 'sfid' else distance
    return {label: reference.distance(statistics, METRICS[name].output)}
