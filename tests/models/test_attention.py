"""Which kernel attention uses."""

import pytest

from ism_jax import config as config_lib
from ism_jax import experiment
from ism_jax.models import attention


@pytest.mark.parametrize(
    'platform,dtype,head_size,expected',
    [
        ('gpu', 'bfloat16', 72, 'cudnn'),  # XL/2
        ('gpu', 'bfloat16', 64, 'cudnn'),
        ('gpu', 'bfloat16', 68, 'xla'),
        ('gpu', 'bfloat16', 136, 'xla'),
        ('gpu', 'float32', 64, 'xla'),
        ('tpu', 'bfloat16', 64, 'xla'),
        ('cpu', 'bfloat16', 64, 'xla'),
    ],
)
def test_auto_is_cudnn_where_it_works(platform, dtype, head_size, expected):
    choose = attention.implementation
    assert choose('auto', platform, dtype, head_size) == expected
    for name in ('xla', 'cudnn'):
        assert choose(name, platform, dtype, head_size) == name


@pytest.mark.parametrize(
    'name,options,expected',
    [
        ('ism', {}, 'auto'),
        ('ism', {'step_draw': 'ends', 'consistency': 'difference'}, 'auto'),
        ('ism', {'step_draw': 'ends', 'consistency': 'derivative'}, 'xla'),
        ('meanflow', {}, 'xla'),
        ('alpha_flow', {}, 'xla'),
        ('imf', {}, 'xla'),
        ('shortcut', {}, 'auto'),
    ],
)
def test_methods_with_a_jacobian_vector_product_use_xla(name, options, expected):
    """cuDNN's attention has no forward-mode derivative."""
    config = config_lib.default()
    config_lib.use_objective(config, name, **options)
    assert experiment.make_model(config, num_classes=3).attention == expected
