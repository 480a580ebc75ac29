"""The comparison of tensor names and shapes."""

import numpy as np
import pytest

from ism_jax.interchange import tensor_shapes


def test_every_difference_is_listed():
    expected = {name: (2,) for name in 'abcdefg'}
    given = {'a': (2,), 'b': (3,), 'x': (1,)}
    message = (
        r'net.pt does not fit a SiT \(5 missing: c, d, e and 2 more; 1 unknown: x; '
        r'1 of the wrong shape: b is \(3,\), expected \(2,\)\); download it again'
    )
    with pytest.raises(ValueError, match=message):
        tensor_shapes.check(
            given,
            expected,
            network='a SiT',
            source='net.pt',
            advice='download it again',
        )
    tensor_shapes.check(expected, dict(expected), network='a SiT')


def test_a_required_tensor_has_its_rank():
    tensors = {'a': np.zeros((2, 3))}
    assert tensor_shapes.require(tensors, 'a', 2, 'a SiT') is tensors['a']
    for name, message in (
        ('a', r'a has the shape \(2, 3\), not 3'),
        ('b', 'no tensor b'),
    ):
        with pytest.raises(ValueError, match=f'{message}.*weights of a SiT'):
            tensor_shapes.require(tensors, name, 3, 'a SiT')


def test_layers_are_counted_by_prefix_and_suffix():
    names = ('blocks.0.fc1.weight', 'blocks.1.fc1.weight', 'blocks.0.fc1.bias', 'fc1')
    assert tensor_shapes.count(names, 'blocks.', '.fc1.weight') == 2
