"""The converted DiT against the official code."""

import numpy as np
from official_tensors import DIT, HEADS, TIMESTEPS, assert_official

from ism_jax.interchange import official_dit


def test_computes_the_same_as_the_official_code_with_time_reversed():
    converted = official_dit.from_tensors(DIT, HEADS)
    assert converted.model['time_scale'] == 1000.0
    assert_official(converted, 'dit', 1 - np.asarray(TIMESTEPS) / 1000, 0.0)
