"""Feature networks: their inputs, their identity, and downloaded weights."""

import hashlib

import numpy as np
import pytest

from ism_jax.evaluation import feature_network
from ism_jax.interchange import inception_weights


def test_features_that_are_not_finite_are_refused(tiny_network):
    images = np.full((3, 8, 8, 3), 255, np.uint8)
    tiny_network()(images)
    with pytest.raises(ValueError, match='tiny returned features that are not finite'):
        tiny_network(scale=np.inf)(images)


def test_scores_and_statistics_record_the_identity(tiny_network):
    identity = tiny_network(checksum='abc').identity
    assert identity == {'network': 'tiny', 'weights': 'abc', 'preprocessing': 'x / 255'}
    assert feature_network.identity_key(identity) != feature_network.identity_key(
        tiny_network(checksum='abd').identity
    )


def test_weights_of_inception_are_fetched_once_and_checked(tmp_path, monkeypatch):
    published = tmp_path / 'pt_inception-2015-12-05-6726825d.pth'
    published.write_bytes(b'weights')
    monkeypatch.setattr(inception_weights, 'PUBLISHED_URL', published.as_uri())
    with pytest.raises(ValueError, match='is not the published file: its SHA-256'):
        feature_network.fetch_inception(tmp_path / 'cache')
    assert not (tmp_path / 'cache').exists()
    digest = hashlib.sha256(b'weights').hexdigest()
    monkeypatch.setattr(inception_weights, 'PUBLISHED_SHA256', digest)
    path = feature_network.fetch_inception(tmp_path / 'cache')
    assert path.name == published.name
    published.unlink()
    assert feature_network.fetch_inception(tmp_path / 'cache') == path
    with pytest.raises(ValueError, match='cannot be downloaded .* put the file at'):
        feature_network.fetch_inception(tmp_path / 'other')
