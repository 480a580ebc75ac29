"""A run keeps its potentials, and resumes with the same bits."""

import jax
import numpy as np
import pytest

from ism_jax import config as config_lib
from ism_jax import diagnose, train
from ism_jax.runtime import files
from ism_jax.training import potentials_file

SETTINGS = {'source': 'three points', 'seed': 0, 'samples_per_point': 8}


def _learn():
    potentials = np.random.default_rng().normal(size=3).astype(np.float32)
    return potentials, {'hit_error': 0.1, 'cost_ratio': 0.8}


def test_potentials_are_learned_once(tmp_path):
    lines = []
    load = lambda settings: potentials_file.load_or_learn(
        tmp_path, settings, _learn, lines.append
    )
    first = load(SETTINGS)
    np.testing.assert_array_equal(load(SETTINGS), first)
    assert len(lines) == 1 and 'vary by 10.0 %' in lines[0]
    assert np.all(load(SETTINGS | {'seed': 1}) != first)


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04 damaged'])
def test_a_damaged_file_is_reported_and_replaced(tmp_path, content):
    path, lines = tmp_path / potentials_file.NAME, []
    path.write_bytes(content)
    found = potentials_file.load_or_learn(tmp_path, SETTINGS, _learn, lines.append)
    assert 'is damaged' in lines[0] and str(path) in lines[0]
    np.testing.assert_array_equal(np.load(path)['potentials'], found)


def _config(**changes):
    config = config_lib.with_argument(config_lib.default(), 'runlocal')
    config.scores.enabled = False
    config.log.grid_every = 0
    config.train.steps = 12
    config.checkpoint.every = 3
    config.data.flip = True
    config.transport.update(method='semidiscrete', samples_per_point=4)
    config.update_from_flattened_dict(changes)
    return config.lock()


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path, monkeypatch):
    whole = train.train(_config(), tmp_path / 'whole')
    train.train(_config(**{'train.steps': 6}), tmp_path / 'part')

    def learn(experiment):
        raise AssertionError('the potentials are learned again')

    with monkeypatch.context() as patch:
        patch.setattr('ism_jax.experiment.Experiment.learn_potentials', learn)
        state = train.train(_config(), tmp_path / 'part')
        subject, _ = diagnose.load_subject(tmp_path / 'part', None, 64)
    assert subject.coupling == 'semidiscrete optimal transport per class'
    assert int(state.step) == 12
    trees = [
        jax.tree.map(np.asarray, (s.params, s.opt_state, s.target, s.infer))
        for s in (state, whole)
    ]
    jax.tree.map(np.testing.assert_array_equal, *trees)

    # With other potentials it would be another run.
    path = tmp_path / 'part' / potentials_file.NAME
    with np.load(path) as content:
        arrays = dict(content)
    arrays['potentials'][:100] += 1
    files.write_npz(path, **arrays)
    with pytest.raises(ValueError, match=r'pairing: .*sha256.*--workdir'):
        train.train(_config(**{'train.steps': 14}), tmp_path / 'part')
