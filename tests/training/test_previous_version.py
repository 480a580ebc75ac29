"""Files of version 0.1.0: a run resumes, an export loads.

`tests/fixtures/run_of_version_0.1.0.tar.xz` holds a run of eight steps that was cut
off after its checkpoint at step 4 (in the middle of a pool), the network that
`ism_jax.convert export` made from the whole run, and the losses of all eight steps.
"""

import json
from pathlib import Path
import tarfile

import jax
import numpy as np
import pytest

from ism_jax import config as config_lib
from ism_jax import generator, train, trained_network
from ism_jax.training import checkpoint
from ism_jax.training.progress import Progress

FIXTURE = Path(__file__).parents[1] / 'fixtures' / 'run_of_version_0.1.0.tar.xz'


@pytest.fixture
def old(tmp_path):
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter='data')
    return tmp_path


def test_the_fixture_is_small():
    assert FIXTURE.stat().st_size < 200 * 1024


def test_a_run_resumes_with_the_recorded_losses(old, monkeypatch):
    losses, log = {}, Progress.log

    def recorded(self, step, extra):
        log(self, step, extra)
        losses[step] = self.loss

    monkeypatch.setattr(Progress, 'log', recorded)
    assert checkpoint.saved_steps(old / 'run') == [4]
    config = config_lib.from_dict(checkpoint.read_run(old / 'run')['config'])
    state = train.train(config, old / 'run')
    assert int(state.step) == 8
    expected = json.loads((old / 'losses.json').read_text())
    assert sorted(losses) == [5, 6, 7, 8]
    for step, loss in losses.items():
        # Recorded on one device, not eight, and with another version of JAX.
        assert loss == pytest.approx(expected[str(step)], rel=1e-4), step
    exported = trained_network.load(old / 'export').params
    for name, module in exported.items():
        for leaf, own in zip(*map(_leaves, (module, state.infer[name])), strict=True):
            np.testing.assert_allclose(own, leaf, atol=2e-5)


def _leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_an_export_and_a_run_make_samples(old):
    for folder in ('export', 'run'):
        images = generator.load(old / folder).sample([0, '7', None], steps=2)
        assert images.shape == (3, 14, 14, 1)
