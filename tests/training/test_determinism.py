"""The same seed gives the same losses everywhere, similar ones in bfloat16."""

import re

import numpy as np
import pytest

from ism_jax import config as config_lib
from ism_jax import train

# Losses of the first steps of `configs/quickstart.py:runlocal`, on one device. They
# depend on the method, not on the version of Python or JAX or on the machine.
LOSSES = (
    2.5976, 2.5675, 2.553, 2.5529, 2.5763, 2.5899,
    2.4786, 2.5087, 2.4751, 2.5056, 2.4665, 2.4426,
)  # fmt: skip


@pytest.fixture(scope='module')
def losses(tmp_path_factory):
    """Losses of every step, by dtype."""
    return {
        dtype: _losses(dtype, tmp_path_factory.mktemp(dtype))
        for dtype in ('float32', 'bfloat16')
    }


def _losses(dtype, workdir):
    config = config_lib.with_argument(config_lib.default(), 'runlocal')
    config.scores.enabled = False
    config.model.dtype = dtype
    config.optimizer.learning_rate = 1e-3
    config.train.steps = 60
    config.log.update(grid_every=0, every=1)
    config.checkpoint.every = 100
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr('builtins.print', lambda text, **options: seen.append(text))
        train.train(config.lock(), workdir)
    return np.array([float(re.match(r'step .* loss ([\d.]+)', t)[1]) for t in seen])


def test_losses_are_those_of_every_version(losses):
    np.testing.assert_allclose(losses['float32'][: len(LOSSES)], LOSSES, rtol=3e-4)


def test_bfloat16_follows_float32(losses):
    fine, coarse = losses['float32'], losses['bfloat16']
    assert len(fine) == len(coarse) == 60
    difference = np.abs(coarse / fine - 1)
    print(
        f'losses of bfloat16 against float32 over {len(fine)} steps: mean difference '
        f'{difference.mean():.2e}, largest {difference.max():.2e}; float32 falls from '
        f'{fine[:5].mean():.3f} to {fine[-5:].mean():.3f}'
    )
    assert fine[-5:].mean() < 0.8 * fine[:5].mean()  # The loss falls.
    assert difference.max() < 0.005 and difference.mean() < 0.001
