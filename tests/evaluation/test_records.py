"""Records are strict JSON, and a failed write leaves the old file."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.evaluation import records


def test_records_are_strict_json(tmp_path):
    path = tmp_path / 'new' / 'scores.json'
    record = {
        'steps': np.int64(1),
        'guidance': np.float32(0.5),
        'fd': math.nan,
        'accuracy': jnp.float32(0.25),
        'schedule': (0.5, math.inf),
        'name': 'x',
    }
    records.write_records(path, [record])

    def refuse(value):
        raise AssertionError(f'{value} is no JSON')

    assert json.loads(path.read_text(), parse_constant=refuse) == [
        {
            'steps': 1,
            'guidance': 0.5,
            'fd': None,
            'accuracy': 0.25,
            'schedule': [0.5, None],
            'name': 'x',
        }
    ]
    before = path.read_bytes()
    with pytest.raises(TypeError):
        records.write_records(path, [{'steps': object()}])
    assert path.read_bytes() == before
