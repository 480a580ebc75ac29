"""Which checkpoints are kept, even across a resume."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ism_jax.runtime import sharding
from ism_jax.training import checkpoint, train_state


@pytest.fixture(scope='module')
def state():
    params = {'a': {'kernel': jnp.ones((4, 4))}}
    return train_state.create(
        lambda: params, optax.adam(1e-3), sharding.make_mesh(), twin_ema=True
    )[0]


def _save(folder, state, scores, *, keep_last, keep_best=1):
    """Opens the folder, saves {step: score}, and closes it."""
    with checkpoint.Checkpointer(
        folder, keep_last=keep_last, keep_best=keep_best
    ) as checkpointer:
        for step, score in scores.items():
            checkpointer.save(state.replace(step=np.int32(step)), {}, {}, score)
    return checkpoint.saved_steps(folder)


def test_the_last_and_the_best_are_kept(state, tmp_path):
    scores = {1: 5.0, 2: 1.0, 3: 3.0, 4: 4.0}
    assert _save(tmp_path, state, scores, keep_last=1) == [2, 4]


def test_the_best_survives_a_resume(state, tmp_path):
    """Orbax loses scores unless it is configured to write them."""
    scores = {1: 0.1, 2: 3.0, 3: 2.0, 4: 4.0}
    assert _save(tmp_path, state, scores, keep_last=2) == [1, 3, 4]
    assert _save(tmp_path, state, {5: 5.0, 6: 6.0}, keep_last=2) == [1, 5, 6]
    # A better one takes its place.
    assert _save(tmp_path, state, {7: 0.01, 8: 1.0, 9: 1.0}, keep_last=2) == [7, 8, 9]
    assert _save(tmp_path, state, {10: 1.0, 11: 1.0}, keep_last=2) == [7, 10, 11]


def test_a_score_that_is_not_finite_is_never_the_best(state, tmp_path):
    scores = {1: float('nan'), 2: 7.0, 3: float('inf'), 4: 8.0}
    assert _save(tmp_path, state, scores, keep_last=1) == [2, 4]


def test_keep_best_of_0_keeps_no_best(state, tmp_path):
    scores = {1: 0.1, 2: 3.0, 3: 2.0}
    assert _save(tmp_path, state, scores, keep_last=1, keep_best=0) == [3]
