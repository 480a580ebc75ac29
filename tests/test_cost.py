"""Plans and counts, compared with XLA's and with counts by hand."""

import dataclasses
import functools
import importlib.util
from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from ism_jax import config as config_lib
from ism_jax import cost, experiment
from ism_jax.models import conditions
from ism_jax.runtime import chips, traced_flops

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(p.stem for p in (ROOT / 'configs').glob('imagenet*_xl2.py'))


def _get_config(name, *args):
    path = ROOT / 'configs' / f'{name}.py'
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*args)


def test_products_are_counted_where_they_stand():
    a, b = jnp.zeros((3, 4)), jnp.zeros((4, 5))
    assert traced_flops.count_flops(jnp.matmul, a, b) == 2 * 3 * 4 * 5
    batched = jnp.zeros((7, 3, 4)), jnp.zeros((7, 4, 5))
    assert traced_flops.count_flops(jax.jit(jnp.matmul), *batched) == 7 * 2 * 3 * 4 * 5

    def repeated(x):
        return jax.lax.scan(lambda c, _: (c @ x, None), x, length=6)[0]

    square = jnp.zeros((4, 4))
    assert traced_flops.count_flops(repeated, square) == 6 * 2 * 4**3
    # The backward pass has two products for each.
    gradient = jax.grad(lambda x: repeated(x).sum())
    assert traced_flops.count_flops(gradient, square) == 18 * 2 * 4**3
    remat = jax.checkpoint(lambda x: jnp.sin(x @ x))
    assert traced_flops.count_flops(remat, square) == 2 * 4**3
    image, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))
    convolve = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding='SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )  # fmt: skip
    assert traced_flops.count_flops(convolve, image, kernel) == 2 * (2 * 8 * 8 * 5) * 27
    with pytest.raises(ValueError, match='a while loop'):
        traced_flops.count_flops(
            lambda x: jax.lax.while_loop(lambda y: y.sum() < 3, lambda y: y @ y, x),
            square,
        )


def test_sit_costs_what_its_authors_say():
    """118.6 billion multiplications for an image of 32x32x4 (SiT, table 1)."""
    model = experiment.make_model(_get_config('imagenet256_ism_xl2'), 1000)
    params = conditions.abstract_params(model, (32, 32, 4))
    x, one = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1)
    found = traced_flops.count_flops(
        model.apply, {'params': params}, x, one, one, one, jnp.zeros(1, jnp.int32)
    )
    assert found / 2e9 == pytest.approx(118.64, rel=0.01)


def test_counts_are_those_of_xla():
    """The layers of the network are not scanned. XLA counts other operations too."""
    config = config_lib.default()
    config.model.update(hidden_size=128, depth=2, num_heads=2, patch_size=4, unroll=2)
    model = experiment.make_model(config, 10)
    shape = (32, 32, 1)
    params = conditions.init_params(model, shape, jax.random.key(0))
    x, t = jnp.zeros((4, *shape)), jnp.zeros(4)
    args = {'params': params}, x, t, t, t, jnp.zeros(4, jnp.int32)
    analysis = jax.jit(model.apply).lower(*args).compile().cost_analysis()
    assert traced_flops.count_flops(model.apply, *args) == pytest.approx(
        analysis['flops'], rel=0.05
    )


@pytest.mark.parametrize(
    'name, passes',
    # Forward passes per sample: 3 for the gradient, plus those of the teachers.
    [('ism', 3 + 2 / 4 + 2 / 4), ('flow_matching', 3), ('shortcut', 3 + 2 * 36 / 256)],
)
def test_steps_cost_the_passes_that_the_method_makes(name, passes):
    config = _get_config('imagenet256_ism_xl2', name)
    found = cost.make_plan(config, 8, 1000).flops_per_step
    assert found == pytest.approx(passes * 256 * 2 * 118.64e9, rel=0.02)


@pytest.mark.parametrize(
    'data, fsdp', [(2, 4), pytest.param(8, 1, marks=pytest.mark.slow)]
)
def test_bytes_of_the_state_are_what_xla_reports(data, fsdp, eight_devices):
    config = _get_config('fashion_mnist', 'runlocal')
    config.model.update(hidden_size=64, depth=3)
    config.mesh.update(data=data, fsdp=fsdp)
    parts = experiment.Experiment(config)
    state, shardings = parts.init_state()
    loader = parts.make_loader()
    pool, _ = parts.next_pool(loader)
    loader.close()
    step, key = parts.compile_train_step(shardings), parts.seed_key
    memory = step.lower(state, pool, key).compile().memory_analysis()
    made = cost.make_plan(config, 8, 10)
    sizes = made.bytes_per_device
    held = ('parameters', 'optimizer', 'target EMA', 'inference EMA', 'pool')
    predicted = sum(sizes[name] for name in held)
    assert memory.argument_size_in_bytes == pytest.approx(predicted, rel=0.01)
    # A gradient and what is kept are most of what XLA needs.
    least = sizes['gradient'] + sizes['kept for the backward pass']
    assert 0.5 * least < memory.temp_size_in_bytes < 4 * least
    if fsdp > 1:
        whole = cost.make_plan(_replicated(config), 8, 10).bytes_per_device
        assert sizes['parameters'] < 1.3 * whole['parameters'] / fsdp


def _replicated(config):
    config = config.copy_and_resolve_references()
    config.mesh.update(data=8, fsdp=1)
    return config


@pytest.mark.parametrize('name', CONFIGS)
def test_command_line_prints_the_plan(name):
    config, chip = _get_config(name), chips.CHIPS['v5e']
    made = cost.make_plan(config, 16, 1000, chip)
    text = cost.format_plan(made, chip, 98.5)
    assert '16 x v5e' in text and 'of 15.75 that a program can use' in text
    assert f'{made.hours(98.5):.1f} hours if a chip sustains 98 TFLOP/s (50% of' in text
    assert '(40% of its peak)' in cost.format_plan(made, chip)


@pytest.mark.parametrize(
    'name, chip, devices, fsdp, compiled',
    # Peak GiB per chip of the compiled train step, see docs/performance.md.
    [
        ('imagenet256_ism_xl2', 'v5p', 16, 1, 19.36),
        ('imagenet256_ism_xl2', 'v5e', 16, 4, 7.09),
        ('imagenet256_ism_xl2', 'v5p', 64, 8, 2.87),
    ],
)
def test_predicted_memory_is_that_of_compiled_programs(
    name, chip, devices, fsdp, compiled
):
    config = _get_config(name)
    config.mesh.fsdp = fsdp
    made = cost.make_plan(config, devices, 1000, chips.CHIPS[chip])
    assert made.peak_bytes / 2**30 == pytest.approx(compiled, rel=cost.PREDICTION_ERROR)


def test_a_run_that_does_not_fit_gets_a_field_to_change():
    config, chip = _get_config('imagenet256_ism_xl2'), chips.CHIPS['v5e']
    assert 'it does not fit' not in cost.report(config, 16, chip, 1000, None)
    config.mesh.fsdp = 1
    text = cost.report(config, 16, chip, 1000, None)
    assert 'it does not fit: set mesh.data = -1 and mesh.fsdp = 2: predicted' in text
    config.mesh.fsdp = 2
    assert 'it does not fit' not in cost.report(config, 16, chip, 1000, None)
    # A state that fits no single chip.
    config.mesh.fsdp = 1
    few = cost.advice(config, 1, 1000, dataclasses.replace(chip, memory=2**30))
    assert few.startswith('no mesh of this many chips fits it')


def test_plan_needs_no_data_and_no_devices(tmp_path):
    command = (
        sys.executable, '-m', 'ism_jax.train', '--plan', '--plan_devices=64',
        '--config=configs/imagenet256_ism_xl2.py', '--config.mesh.fsdp=16',
        f'--workdir={tmp_path / "run"}',
    )  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and '676,459,024 parameters' in done.stdout, done.stderr
    assert not (tmp_path / 'run').exists()
    done = subprocess.run(
        [*command, '--config.mesh.fsdp=5'], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert 'mesh.fsdp = 5 does not divide the 64 devices' in done.stderr


def test_remat_keeps_less():
    config = _get_config('imagenet256_ism_xl2')
    kept = {}
    for remat in ('none', 'dots', 'full'):
        config.model.remat = remat
        sizes = cost.make_plan(config, 8, 1000).bytes_per_device
        kept[remat] = sizes['kept for the backward pass']
    assert kept['full'] < 0.5 * kept['dots'] < 0.25 * kept['none']


def test_points_that_exceed_the_memory_are_refused(monkeypatch):
    config = _get_config('fashion_mnist', 'runlocal')
    config.model.update(hidden_size=8, num_heads=2)
    parts = experiment.Experiment(config)
    needed = 2 * len(parts.source) * 32 * 32
    monkeypatch.setattr(cost, '_machine_bytes', lambda: needed - 1)
    cost.check_memory(parts)
    config.transport.method = 'semidiscrete'
    with pytest.raises(ValueError, match="'semidiscrete' keeps the data in memory"):
        cost.check_memory(parts)
