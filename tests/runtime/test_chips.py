"""Chips and topologies, without their compilers."""

import importlib.util

import pytest

from ism_jax.runtime import chips


@pytest.mark.parametrize('name', chips.CHIPS)
def test_a_chip_is_named_in_its_topologies(name):
    chip = chips.parse(f'{name}:2x2x4' if chips.CHIPS[name].is_tpu else f'{name}:8')
    assert chip is chips.CHIPS[name] and chip.source.startswith('https://')
    # More FLOPs than bytes, more bytes than messages, as on all of them.
    assert 1000 * chip.tflops > chip.memory_gbps > chip.link_gbps > 100
    assert 15 < chip.memory / 2**30 < 192


@pytest.mark.parametrize('topology', ['v5p', 'v1:2x2', 'h100:', 'v5e:4y4', '8'])
def test_other_topologies_are_refused(topology):
    with pytest.raises(ValueError, match='is not CHIP:SHAPE, such as v5p:2x2x4'):
        chips.parse(topology)


@pytest.mark.parametrize(
    'topology, package, install',
    [
        ('v5e:4x4', 'libtpu', r'pip install "jax\[tpu\]"'),
        ('h100:8', 'jax_cuda13_plugin', 'pip install "jax-cuda13-plugin==0'),
    ],
)
def test_a_missing_compiler_is_named(topology, package, install, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        'find_spec',
        lambda name: None if name == package else find(name),
    )
    with pytest.raises(ValueError, match=install):
        chips.devices(topology)
