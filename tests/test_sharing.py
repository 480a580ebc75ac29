"""Networks written for others: PyTorch weights and serialized samplers."""

import functools
import importlib.util
from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import official_tensors
import pytest
from random_network import SHAPE
import safetensors.numpy

from ism_jax import config as config_lib
from ism_jax import experiment, sharing, trained_network
from ism_jax.interchange import exported_network, official_sit, torch_network
from ism_jax.models import conditions, sit

ROOT = Path(__file__).parent.parent
MODULE = ROOT / 'ism_jax' / 'interchange' / torch_network.MODULE
LABELS = (0, 4, 5, 2)  # 5 is the null label.


def _network(folder, method, backbone='sit', **options):
    """Writes a small network with random weights, as an exported folder."""
    config = config_lib.default()
    side, _, channels = SHAPE
    config.data.update(source='', image_size=side, channels=channels)
    sizes = dict(hidden_size=32, depth=3, num_heads=2, patch_size=2)
    config.model.update(sizes, backbone=backbone)
    config_lib.use_objective(config, method, **options)
    model = experiment.make_model(config, 5)
    rng = np.random.default_rng(0)
    network = exported_network.ExportedNetwork(
        config=config_lib.to_dict(config),
        params=jax.tree.map(
            lambda leaf: rng.normal(size=leaf.shape, scale=0.2).astype(np.float32),
            conditions.abstract_params(model, SHAPE),
        ),
        step=0,
        class_names=tuple('abcde'),
        image_shape=SHAPE,
        origin='random',
    )
    exported_network.write(folder, network, model)
    return folder


class Reference:
    """A network of a method and its JAX sampler, which compiles once."""

    def __init__(self, folder, method, options):
        self.folder = _network(folder, method, **options)
        self.run = trained_network.load(self.folder)
        experiment_ = self.run.experiment()
        self.objective = experiment_.objective
        self._sampler = experiment_.make_sampler(len(LABELS))

    def samples(self, steps, guidance, interval=None):
        options = dict(guidance=guidance, schedule=steps, interval=interval)
        final = self._sampler.final(self.run.params, _noise(), LABELS, **options)
        return np.asarray(final)


METHODS = {
    'ism': ('ism', {}),
    'ism_any_step': ('ism', dict(step_draw='uniform', interval='input')),
    'imf': ('imf', {}),  # With a velocity head, which is dropped.
    'meanflow': ('meanflow', {}),
    'shortcut': ('shortcut', {}),
}


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    @functools.cache
    def make(name):
        return Reference(tmp_path_factory.mktemp(name), *METHODS[name])

    return make


def _noise():
    shape = len(LABELS), *SHAPE
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def _ism_torch(path=MODULE):
    torch = pytest.importorskip('torch')
    torch.set_num_threads(1)  # More threads of a small network wait for each other.
    spec = importlib.util.spec_from_file_location('ism_torch', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    'name, steps, guidance',
    [
        ('ism', 4, 1.5),
        ('ism', 128, 0.5),  # The network gets d = 0 in the finest step.
        ('ism_any_step', 3, 2.0),
        ('imf', 3, 1.0),
        ('shortcut', 4, 0.5),
    ],
)
def test_an_official_sit_computes_the_same_samples(
    tmp_path, reference, name, steps, guidance
):
    """Read back by `from_tensors`, which is tested against the official code."""
    ours, out = reference(name), tmp_path / 'sit.safetensors'
    lines = sharing.write_torch(ours.folder, out, steps=steps, guidance=guidance)
    read = official_sit.from_tensors(safetensors.numpy.load_file(out), num_heads=2)
    official = sit.SiT(num_classes=5, **read.model)
    fresh = conditions.abstract_params(official, SHAPE)
    params = {n: jax.tree.map(jnp.zeros_like, fresh[n]) for n in read.fresh}
    params |= read.params
    zeros, labels = np.zeros(len(LABELS), np.float32), np.asarray(LABELS)
    apply = jax.jit(official.apply)
    scale = ours.run.model.time_scale
    assert f'{"1000 * " if scale == 1000 else ""}i / {steps})' in lines[-2]
    x = _noise()
    for i in range(steps):
        t = np.full(len(x), scale * i / steps, np.float32)
        x = x + apply({'params': params}, x, t, zeros, zeros, labels) / steps
    expected = ours.samples(steps, guidance)
    error = np.abs(x - expected).max() / np.abs(expected).max()
    print(f'{name}, {steps} steps: largest error {error:.1e} of the largest value')
    assert error < 1e-5


def test_a_converted_official_sit_is_written_back_bit_for_bit():
    shapes = official_tensors.torch_shapes(outputs=official_tensors.CHANNELS)
    tensors = official_tensors.random_tensors(shapes, 5)
    read = official_sit.from_tensors(tensors, official_tensors.HEADS)
    patch = read.model['patch_size']
    written = official_sit.to_tensors(read.params, patch, read.image_shape)
    assert written.keys() == tensors.keys()
    jax.tree.map(np.testing.assert_array_equal, written, tensors)


def test_a_pt_file_is_a_state_dict(tmp_path):
    torch = pytest.importorskip('torch')
    folder = _network(tmp_path / 'net', 'ism')
    for name in ('sit.pt', 'sit.safetensors'):
        sharing.write_torch(folder, tmp_path / 'new' / name, steps=1)
    state = torch.load(tmp_path / 'new' / 'sit.pt', weights_only=True)
    other = safetensors.numpy.load_file(tmp_path / 'new' / 'sit.safetensors')
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(tensor.numpy(), other[name])


def test_the_torch_module_computes_the_same_as_the_official_code():
    module = _ism_torch()
    import torch

    shapes = official_tensors.torch_shapes()
    channels = official_tensors.CHANNELS
    sizes = dict(
        hidden_size=official_tensors.WIDTH, depth=official_tensors.DEPTH,
        num_heads=official_tensors.HEADS, patch_size=official_tensors.PATCH,
        mlp_ratio=4, num_classes=official_tensors.CLASSES, interval_input=False,
        image_shape=[official_tensors.SIDE, official_tensors.SIDE, channels],
        step_embedding='size', guidance_embedding='scale', time_scale=1.0,
    )  # fmt: skip
    model = module.Network(sizes)
    tensors = {n: torch.from_numpy(official_tensors.SIT[n]) for n in shapes}
    for leaf in ('weight', 'bias'):  # The second half is the variance.
        name = f'final_layer.linear.{leaf}'
        array = tensors[name].reshape(-1, 2 * channels, *tensors[name].shape[1:])
        tensors[name] = array[:, :channels].flatten(0, 1)
    unused = model.load_state_dict(tensors, strict=False)
    assert not unused.unexpected_keys
    assert all('step_' in n or 'guidance_' in n for n in unused.missing_keys)
    x = torch.from_numpy(official_tensors.fixture_images()).permute(0, 3, 1, 2)
    zeros, label = torch.zeros(4), torch.tensor(official_tensors.LABELS)
    times = torch.tensor(official_tensors.TIMES)
    with torch.no_grad():
        ours = model(x, times, zeros, zeros, label, torch.zeros(4, 2))
    theirs = official_tensors.official_output('sit')
    error = np.abs(ours.permute(0, 2, 3, 1).numpy() - theirs).max()
    assert error < 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize('name', METHODS)
def test_the_torch_module_samples_the_same(tmp_path, reference, name):
    ours, out = reference(name), tmp_path / 'torch'
    module = _ism_torch()
    sharing.write_torch(ours.folder, out)
    assert (out / torch_network.MODULE).read_text() == MODULE.read_text()
    import torch

    model = module.load(out / torch_network.WEIGHTS)
    low, high = ours.objective.guidance_range
    noise = torch.from_numpy(_noise()).permute(0, 3, 1, 2)
    interval = (0.25, 0.75) if ours.objective.conditions_on_interval else None
    for steps, w in ((1, low), (3, high), (model.options['max_steps'], low)):
        theirs = module.sample(model, torch.tensor(LABELS), steps, w, interval, noise)
        expected = ours.samples(steps, w, interval)
        error = np.abs(theirs.permute(0, 2, 3, 1).numpy() - expected).max()
        error /= np.abs(expected).max()
        print(f'{name}, {steps} steps: largest error {error:.1e} of the largest value')
        assert error < 1e-5
    with pytest.raises(ValueError, match=f'guidance = {high + 1}.*steps = 1 in 1'):
        module.sample(model, torch.tensor(LABELS), 1, high + 1)
    shape = 2, SHAPE[2], *SHAPE[:2]
    assert module.sample(model, torch.tensor([0, 5]), 1).shape == shape


@pytest.mark.parametrize(
    'method, given, message',
    [
        ('imm', {}, "'imm' cannot be written for PyTorch: a step of its sampler"),
        ('consistency', {}, "'consistency' cannot be written"),
        ('flow_matching', {}, "'flow_matching' cannot be written"),
        ('flow_matching', dict(steps=2, guidance=1.0), 'in 2 steps at guidance 1: '),
        ('shortcut', dict(steps=128, guidance=0.5), 'in 128 steps at guidance 0.5'),
        ('ism', dict(guidance=1.0), 'also needs --steps'),
        ('ism', dict(steps=3), '--steps 3 are not of one size; .*1, 2, 4'),
        ('ism', dict(steps=2, guidance=9.0), 'guidance.*9.0'),
        ('ism', dict(steps=2, interval=(0.0, 1.0)), 'interval'),
    ],
)  # fmt: skip
def test_what_cannot_be_written_for_pytorch(tmp_path, method, given, message):
    folder = _network(tmp_path / 'net', method)
    with pytest.raises(ValueError, match=message):
        sharing.write_torch(folder, tmp_path / 'out.safetensors', **given)
    assert not (tmp_path / 'out.safetensors').exists()


def test_another_network_or_file_cannot_be_written(tmp_path):
    folder = _network(tmp_path / 'net', 'imf', 'in_context')
    with pytest.raises(ValueError, match="model.backbone = 'in_context' cannot"):
        sharing.write_torch(folder, tmp_path / 'out')
    folder = _network(tmp_path / 'sit', 'ism')
    with pytest.raises(ValueError, match=r'must end in .safetensors or .pt'):
        sharing.write_torch(folder, tmp_path / 'sit.bin', steps=1)


CODE = """
import sys
sys.modules['ism_jax'] = None  # So that it cannot be imported.
import numpy as np
from jax import export
noise, out = np.load(sys.argv[2]), []
sampler = export.deserialize(open(sys.argv[1], 'rb').read())
assert sampler.platforms == ('cpu', 'cuda', 'tpu'), sampler.platforms
labels = np.array([0, 4, 5, 2], np.int32)
for size in (4, 1):
    out.append(sampler.call(noise[:size], labels[:size], np.float32(sys.argv[3])))
np.savez(sys.argv[4], *out)
"""


def test_a_serialized_sampler_runs_alone(tmp_path, reference):
    pytest.importorskip('flatbuffers')
    ours, steps, w = reference('ism'), 4, 1.5
    out = tmp_path / 'sampler.bin'
    lines = sharing.write_stablehlo(ours.folder, out, steps=steps)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(ours.run.params))
    size = out.stat().st_size
    print(f'{(size - weights) / 1e3:.0f} kB besides {weights / 1e6:.2f} MB of weights')
    assert weights < size < weights + 5e5
    assert f'{size / 1e6:.2f} MB' in lines[0]
    np.save(tmp_path / 'noise.npy', _noise())
    paths = map(str, (out, tmp_path / 'noise.npy', w, tmp_path / 'images.npz'))
    done = subprocess.run(
        [sys.executable, '-c', CODE, *paths],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = ours.samples(steps, w)
    with np.load(tmp_path / 'images.npz') as images:
        scale = np.abs(expected).max()
        assert np.abs(images['arr_0'] - expected).max() < 1e-6 * scale
        assert np.abs(images['arr_1'] - expected[:1]).max() < 1e-6 * scale


def test_a_sampler_that_draws_noise_is_not_serialized(tmp_path):
    folder = _network(tmp_path / 'net', 'consistency')
    with pytest.raises(ValueError, match="'consistency' adds noise between steps"):
        sharing.write_stablehlo(folder, tmp_path / 'sampler.bin')
