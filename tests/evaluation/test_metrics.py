"""Metrics by name, and a metric set."""

import dataclasses

import numpy as np
import pytest

from ism_jax.evaluation import metrics, reference_statistics


def _images(count=20):
    random = np.random.default_rng(0)
    return random.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)


def test_only_the_published_network_scores_fid(tiny_metrics):
    metric_set = tiny_metrics(distance='FD-mine')
    scores = metric_set.compute(metric_set.extract(_images()))
    assert list(scores) == [
        'FD-mine', 'sFD-mine', 'IS (mine)', 'IS (mine) deviation', 'Precision (mine)',
        'Recall (mine)', 'KID (mine)', 'KID (mine) deviation',
    ]  # fmt: skip


def test_only_the_outputs_of_the_metrics_are_extracted(tiny_metrics):
    assert list(tiny_metrics(['is']).extract(_images())) == [
        'inception/unbiased_logits'
    ]
    features = tiny_metrics(['pr', 'sfid', 'fid']).extract(_images())
    assert list(features) == ['inception/features', 'inception/spatial']
    assert features['inception/spatial'].shape == (20, 3)


def test_each_network_is_needed_once():
    names = ['fid', 'fd_dinov2', 'is', 'fd_efficientnet']
    assert metrics.networks(names) == ['inception', 'dinov2', 'efficientnet']


def test_unknown_metrics_are_refused():
    with pytest.raises(ValueError, match="'fdd' is unknown; choose among fid, sfid"):
        metrics.networks(['fid', 'fdd'])
    with pytest.raises(ValueError, match='no metrics; choose among fid'):
        metrics.networks([])


def test_what_cannot_be_scored_is_refused(tiny_metrics):
    whole = tiny_metrics()
    whole.check(10)
    with pytest.raises(ValueError, match='5 samples are too few for is, .* least 10'):
        whole.check(5)
    reference = whole.references['inception']
    statistics = reference_statistics.Reference(
        {'features': reference.moments['features']}, None, None, 'key',
        'statistics of a.npz',
    )  # fmt: skip
    few = dataclasses.replace(reference, features=reference.features[:3])
    cases = [
        (
            'sfid',
            statistics,
            r"sfid needs statistics of 'spatial', .* of a.npz\) lacks",
        ),
        ('pr', statistics, r'pr needs images, .*statistics of a.npz\) lacks'),
        ('pr', few, '3 real images are too few for pr, which needs at least 4'),
    ]
    for name, lacking, message in cases:
        metric_set = metrics.MetricSet((name,), whole.networks, {'inception': lacking})
        with pytest.raises(ValueError, match=message):
            metric_set.check(100)
