"""The measures of samples by name: what each needs and how it is computed.

    fid               Frechet distance of Inception's features
    sfid              the same of its spatial features
    is                Inception score
    pr                precision and recall of Inception's features
    kid               kernel distance of Inception's features
    fd_dinov2         Frechet distance of DINOv2's features
    fd_efficientnet   Frechet distance of EfficientNet-Lite0's features

A score is recorded under the name of its network: 'FID' is of the published Inception
network alone; with other weights of that architecture it is 'FD-<name>', and the others
get that name too.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ism_jax.evaluation import (
    feature_network,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    reference_statistics,
)


class Measure(NamedTuple):
    """What a measure needs.

    Attributes:
      network: 'inception', 'dinov2' or 'efficientnet'.
      output: of the network, that the samples are judged by.
      statistics: whether it needs the reference's mean and covariance of that output.
      features: whether it needs features of single images of the reference.
      least: how many samples at least.
    """

    network: str
    output: str = 'features'
    statistics: bool = False
    features: bool = False
    least: int = 2


MEASURES = {
    'fid': Measure('inception', statistics=True),
    'sfid': Measure('inception', 'spatial', statistics=True),
    'is': Measure('inception', 'unbiased_logits', least=10),
    'pr': Measure('inception', features=True, least=precision_recall.NEIGHBOURS + 1),
    'kid': Measure('inception', features=True),
    'fd_dinov2': Measure('dinov2', statistics=True),
    'fd_efficientnet': Measure('efficientnet', statistics=True),
}
KID_SUBSET = 1000  # Of fewer samples or real images, as many as there are.


def networks(names: Sequence[str]) -> list[str]:
    """The networks that the measures need, each once.

    Raises:
      ValueError: an unknown measure, or none.
    """
    for name in names:
        if name not in MEASURES:
            raise ValueError(
                f'metric {name!r} is unknown; choose among {", ".join(MEASURES)}'
            )
    if not names:
        raise ValueError(f'no metrics: choose among {", ".join(MEASURES)}')
    return list(dict.fromkeys(MEASURES[name].network for name in names))


def outputs(names: Sequence[str], network: str) -> list[str]:
    """Outputs of a network that the measures need."""
    chosen = [MEASURES[name] for name in names]
    return list(dict.fromkeys(m.output for m in chosen if m.network == network))


def check(
    names: Sequence[str],
    samples: int,
    given: Mapping[str, reference_statistics.Reference],
) -> None:
    """Refuses, before samples are made, what could not be measured in the end.

    Args:
      names: of measures.
      samples: how many there will be.
      given: the reference of each network.

    Raises:
      ValueError: too few samples, or a reference that lacks something.
    """
    for name in names:
        measure = MEASURES[name]
        if samples < measure.least:
            raise ValueError(
                f'{samples} samples are too few for {name}, which needs at least '
                f'{measure.least}'
            )
        reference = given[measure.network]
        if measure.statistics and measure.output not in reference.moments:
            raise ValueError(
                f'{name} needs statistics of {measure.output!r}, which '
                f'{reference.description} has not; give images, or leave {name} out'
            )
        if measure.features and reference.features is None:
            raise ValueError(
                f'{name} needs real images, but {reference.description} are known '
                f'alone; give images, or leave {name} out'
            )


def compute(
    names: Sequence[str],
    features: Mapping[str, Mapping[str, np.ndarray]],
    network_of: Mapping[str, feature_network.FeatureNetwork],
    given: Mapping[str, reference_statistics.Reference],
) -> dict[str, float]:
    """The scores of samples.

    Args:
      names: of measures.
      features: of each network its outputs for all samples, [N, F] each.
      network_of: the networks by name.
      given: the reference of each network.

    Returns:
      Scores under the names that are to be printed; of 'is' and 'kid' the deviation
      over splits or subsets too, of 'pr' both shares.
    """
    scores = {}
    for name in names:
        measure = MEASURES[name]
        distance = network_of[measure.network].distance
        suffix = '' if distance == 'FID' else f' ({distance.removeprefix("FD-")})'
        reference = given[measure.network]
        values = features[measure.network][measure.output]
        if name == 'is':
            mean, deviation = inception_score.inception_score(values)
            scores |= {f'IS{suffix}': mean, f'IS{suffix} deviation': deviation}
        elif name == 'kid':
            size = min(KID_SUBSET, len(values), len(reference.features))
            mean, deviation = kernel_distance.kernel_distance(
                values, reference.features, subset_size=size
            )
            scores |= {f'KID{suffix}': mean, f'KID{suffix} deviation': deviation}
        elif name == 'pr':
            found = precision_recall.precision_recall(values, reference.features)
            scores |= {f'Precision{suffix}': found.precision}
            scores |= {f'Recall{suffix}': found.recall}
        else:
            statistics = frechet_distance.FeatureStatistics(values.shape[1])
            for start in range(0, len(values), 4096):  # float64 only of a part.
                statistics.update(values[start : start + 4096])
            label = f's{distance}' if name == 'sfid' else distance
            scores[label] = reference.distance(statistics, measure.output)
    return scores
