"""The converted shortcut model against the official code."""

import numpy as np
from official_tensors import (
    BASE_STEPS,
    HEADS,
    LEVELS,
    SHORTCUT,
    SIDE,
    SIT,
    TIMES,
    assert_official,
)
import pytest

from ism_jax.interchange import official_shortcut

OPTIONS = dict(image_size=SIDE, base_steps=BASE_STEPS, num_heads=HEADS)


def test_computes_the_same_as_the_official_code_at_every_step_size():
    converted = official_shortcut.from_tensors(SHORTCUT, **OPTIONS)
    assert converted.fresh == ('guidance_embedding',)
    sizes = 0.5 ** np.asarray(LEVELS, np.float32)
    assert_official(converted, 'shortcut', TIMES, sizes)
    assert sizes[0] == 1 / BASE_STEPS  # The finest, which is also the velocity.
    sizes[0] = 0
    assert_official(converted, 'shortcut', TIMES, sizes)


@pytest.mark.parametrize('name', ['pos_embed', 'DiTBlock_0/LayerNorm_0/scale'])
def test_the_message_names_an_unknown_tensor(name):
    tensors = SHORTCUT | {name: np.ones((9, 48), 'f')}
    with pytest.raises(ValueError, match=f'1 unknown: {name}'):
        official_shortcut.from_tensors(tensors, **OPTIONS)


def test_another_network_is_rejected():
    with pytest.raises(ValueError, match='no tensor PatchEmbed_0/Conv_0/kernel'):
        official_shortcut.from_tensors(SIT, **OPTIONS)
