"""The files of latents."""

import numpy as np
import pytest

from ism_jax.data import latents

SHAPE = (2, 2, 3)


def test_values_that_are_not_finite_are_refused_by_pack():
    record = latents.Record(0, np.full((2, *SHAPE), 1e5), np.zeros((2, *SHAPE)))
    with pytest.raises(ValueError, match='mean .* not finite in float16.*float32'):
        latents.pack(record, 'float16')
    back = latents.unpack(latents.pack(record, 'float32'), SHAPE, 'float32')
    np.testing.assert_array_equal(back.mean, record.mean.astype(np.float32))
    with pytest.raises(ValueError):
        latents.unpack(latents.pack(record, 'float32'), SHAPE, 'float16')
