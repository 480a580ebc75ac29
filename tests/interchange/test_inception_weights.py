"""The published weights of Inception: their names and what is rejected."""

import numpy as np
import pytest

from ism_jax.interchange import inception_weights


def test_the_checksum_agrees_with_the_published_file_name():
    # Both projects name the file after the first digits of its SHA-256.
    assert inception_weights.PUBLISHED_SHA256.startswith('6726825d')
    assert len(inception_weights.PUBLISHED_SHA256) == 64


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda t: t.pop('Mixed_7c.branch_pool.bn.bias'), 'no tensor Mixed_7c.branch_'),
        (lambda t: t.update(head=np.ones(3)), 'Inception .*1 unknown: head'),
        (
            lambda t: t.update({'fc.weight': np.ones((1000, 2048))}),
            r'fc/kernel is \(2048, 1000\), expected \(2048, 1008\)',
        ),
        (
            lambda t: t.update(
                {'Mixed_5b.branch1x1.bn.running_var': np.full(64, -1.0, np.float32)}
            ),
            'negative variance -1',
        ),
    ],
)
def test_tensors_of_another_network_are_rejected(inception_tensors, change, message):
    changed = dict(inception_tensors)
    change(changed)
    with pytest.raises(ValueError, match=message):
        inception_weights.params_from_tensors(changed)
