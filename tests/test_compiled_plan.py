"""Compiled plans: their figures on CPUs, and with libtpu for slices of TPUs.

The tests marked `tpu_compile` need libtpu, which compiles without a TPU.
"""

import importlib.util
import math
from pathlib import Path
import re
import shlex

import jax
import pytest
import yaml

from ism_jax import compiled_plan, config_check, cost
from ism_jax import config as config_lib
from ism_jax.experiment import Experiment
from ism_jax.runtime import chips, compiled_program, sharding

ROOT = Path(__file__).parent.parent
GIB = 2**30
has_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed'
)


def _get_config(path, *args):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*args)


def _small(**fields):
    """Flow matching with a tiny network, which compiles quickly."""
    config = _get_config('configs/fashion_mnist.py', 'runlocal,flow_matching')
    config.transport.enabled = config.wavelet.enabled = False
    config.model.update(hidden_size=32, depth=1, num_heads=2, patch_size=8)
    config.sample.steps = (1,)
    for field, value in fields.items():
        config_lib.set_field(config, f'{field.replace("__", ".")}={value}')
    config_check.validate(config)
    return config


@pytest.fixture
def one_cpu(monkeypatch):
    """A chip with little memory, which is a CPU."""
    chip = chips.Chip('v5e', 10**5, 197, 819, 200, 'https://')
    monkeypatch.setattr(chips, 'parse', lambda topology: chip)
    monkeypatch.setattr(chips, 'devices', lambda topology: jax.devices()[:1])
    monkeypatch.setitem(chips.CHIPS, 'v5e', chip)
    return chip


def test_a_plan_is_compiled_and_judged(one_cpu):
    config, logged = _small(), []
    found = compiled_plan.compile_plan(config, 'v5e:1x1', 10, logged.append)
    assert found['programs'].keys() == {'train step', 'sampler'} and len(logged) == 2
    step = found['programs']['train step']
    sizes = found['predicted']
    state = ('parameters', 'optimizer', 'target EMA', 'inference EMA', 'pool')
    held = sum(sizes[name] for name in state)
    assert step['memory']['arguments'] == pytest.approx(held, rel=0.01)
    # The compiled step has more: the loss, the metrics and the noise.
    assert 0.9 < step['flops'] / found['flops_per_step'] < 1.3
    lower = max(step['compute_seconds'], step['memory_seconds'], step['link_seconds'])
    assert step['seconds'] > 0.999 * lower
    assert 0 < step['mfu'] < 1
    text = compiled_plan.format_record(found)
    assert 'train step, peak, GiB' in text and 'not measured' in text
    assert compiled_plan.does_not_fit(found)
    found['chip_memory'] = 10**9
    assert not compiled_plan.does_not_fit(found)


def test_a_roofline_adds_what_each_operation_needs():
    chip = chips.Chip('v5e', 10**9, 1.0, 1.0, 1.0, 'https://')
    operations = [
        compiled_program.Operation('product', '', 1, flops=2 * 10**12, bytes=10**9),
        compiled_program.Operation('copy', '', 1, flops=0, bytes=3 * 10**9),
    ]
    moved = compiled_program.Collective('all-gather', 'parameters', 'f32', 1, 1, 10**9)
    program = compiled_program.Program({}, operations, [moved], 0)
    assert compiled_plan.roofline(program, chip) == {
        'seconds': 5.0,
        'compute_seconds': 2.0,
        'memory_seconds': 4.0,
        'link_seconds': 1.0,
    }


def test_a_program_that_does_not_fit_is_a_figure_too(one_cpu):
    class Refused:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used '
                '18.95G of 15.75G hbm.'
            )

    found = compiled_plan.compile_program(Refused(), None, one_cpu)
    assert found['refused'] == 'Ran out of memory in memory space hbm'


def _compile_step(config, topology, classes=1000):
    """The compiled train step of a config for a topology, and its prediction."""
    config_check.validate(config)
    mesh = sharding.make_mesh(
        config.mesh.data, config.mesh.fsdp, devices=chips.devices(topology)
    )
    side = config.data.image_size
    experiment = Experiment(
        config,
        mesh=mesh,
        num_classes=classes,
        image_shape=(side, side, config.data.channels),
    )
    compiled = experiment.lower_train_step().compile()
    shapes = compiled_program.parameter_shapes(experiment.abstract_state().params)
    program = compiled_program.read(compiled, shapes)
    chip = chips.parse(topology)
    return program, cost.make_plan(config, mesh.size, classes, chip)


@pytest.mark.tpu_compile
@has_libtpu
@pytest.mark.parametrize(
    'topology, data, fsdp',
    [('v5p:2x2x2', 8, 1), ('v5e:2x4', 1, 8), ('v6e:4x4', 4, 4), ('v5p:4x4x4', 16, 4)],
    ids=lambda value: str(value),
)
def test_a_slice_moves_parameters_and_not_activations(topology, data, fsdp):
    """A small network whose state is split as that of a large one."""
    config = _get_config('configs/imagenet256_ism_xl2.py', 'B/2,flow_matching')
    # XLA pads smaller parts, and padded gradients are not told from activations.
    config.model.update(hidden_size=1024, num_heads=16, depth=2)
    config.transport.enabled = config.wavelet.enabled = False
    config.mesh.update(data=data, fsdp=fsdp)
    program, plan = _compile_step(config, topology)
    parameters = 4 * plan.parameters
    # Each gradient is added once, at most in float32.
    gradients = program.collective_bytes(content='gradients')
    assert 0.4 * parameters < gradients < 1.3 * parameters
    gathered = program.collective_bytes('all-gather', 'parameters')
    if fsdp == 1:
        assert gathered == 0
    else:
        # In bfloat16, for the forward and the backward pass.
        assert 0.4 * parameters < gathered < 1.3 * parameters
    moved = program.collective_bytes(content='activations')
    tokens = 2 * 256 * 1024 * config.train.batch_size / plan.devices
    assert moved < tokens, (moved, tokens)  # Each layer has a dozen such arrays.
    assert program.unknown_loops == 0


@pytest.mark.tpu_compile
@has_libtpu
@pytest.mark.parametrize('topology', ['v5e:4x4', 'v6e:4x4', 'v5p:2x2x4', 'v5p:4x4x4'])
def test_eight_chips_that_share_a_state_are_those_of_two_machines(topology):
    mesh = sharding.make_mesh(-1, -1, devices=chips.devices(topology))
    assert mesh.shape['fsdp'] == 8
    for group in mesh.devices:
        assert len({device.process_index for device in group}) == 2


def _gke_command():
    """(topology, config) of launch/gke.yaml."""
    manifest = yaml.safe_load((ROOT / 'launch' / 'gke.yaml').read_text())
    job = manifest['spec']['replicatedJobs'][0]['template']['spec']
    pod = job['template']['spec']
    selector = pod['nodeSelector']
    names = {
        'tpu-v5-lite-podslice': 'v5e',
        'tpu-v5p-slice': 'v5p',
        'tpu-v6e-slice': 'v6e',
    }
    chip = names[selector['cloud.google.com/gke-tpu-accelerator']]
    command = pod['containers'][0]['command']
    return f'{chip}:{selector["cloud.google.com/gke-tpu-topology"]}', command


def _tpu_pod_command():
    """(topology, command) of the example of launch/tpu_pod.sh."""
    text = (ROOT / 'launch' / 'tpu_pod.sh').read_text()
    found = re.search(r'TYPE=(v4-\d+) .*?tpu_pod\.sh (.*?)\n#\n', text, re.DOTALL)
    # The number in the name of a v4 slice is that of its cores.
    shapes = {'v4-32': 'v4:2x2x4'}
    return shapes[found[1]], shlex.split(found[2].replace('\n#', ' '))


def _config_of(command):
    """The config of a train command."""
    flags = ' '.join(command).replace('--config ', '--config=').split()
    (path,) = (f.partition('=')[2] for f in flags if f.startswith('--config='))
    config = _get_config(path)
    for flag in flags:
        if flag.startswith('--config.'):
            config_lib.set_field(config, flag.removeprefix('--config.'))
    return config


@pytest.mark.tpu_compile
@has_libtpu
@pytest.mark.parametrize('read', [_gke_command, _tpu_pod_command])
def test_launch_files_fit_their_slices(read):
    topology, command = read()
    program, plan = _compile_step(_config_of(command), topology)
    chip = chips.parse(topology)
    assert program.memory['peak'] < chip.memory
    assert plan.peak_bytes == pytest.approx(
        program.memory['peak'], rel=cost.PREDICTION_ERROR
    )


@pytest.mark.parametrize('read', [_gke_command, _tpu_pod_command])
def test_launch_files_fit_by_prediction(read):
    topology, command = read()
    chip, config = chips.parse(topology), _config_of(command)
    config_check.validate(config)
    shape = topology.partition(':')[2].split('x')
    plan = cost.make_plan(config, math.prod(map(int, shape)), 1000, chip)
    assert plan.peak_bytes < (1 - cost.PREDICTION_ERROR) * chip.memory


def test_every_named_slice_is_compiled_for():
    """Docs and launch files name no slice that the tests above do not compile."""
    compiled = {_gke_command()[0], _tpu_pod_command()[0]}
    named = set()
    for path in (*ROOT.glob('launch/*'), *ROOT.glob('docs/*.md'), ROOT / 'README.md'):
        if path.suffix in ('.md', '.sh', '.yaml', '.sbatch'):
            text = path.read_text()
            named |= set(re.findall(r'ism_jax\.train[^`]*?--topology[ =](\S+)', text))
    assert named <= compiled, named - compiled
