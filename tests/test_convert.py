"""Official checkpoints against their own code, and networks in portable folders.

`fixtures/official_networks.json` holds what the official networks answered (see its
`about`); their weights are made here, from a seed.
"""

import argparse
import contextlib
import io
import json
import os
from pathlib import Path
import pickle
import shutil
import subprocess
import sys

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from ism_jax import config as config_lib
from ism_jax import convert, diagnose, experiment, sample, train, trained_network
from ism_jax.interchange import exported_network, official, tensor_file
from ism_jax.models import sit
from ism_jax.runtime import sharding
from ism_jax.training import train_state

ROOT = Path(__file__).parent.parent
FIXTURE = Path(__file__).parent / 'fixtures' / 'official_networks.json'

# The small networks of the fixture.
WIDTH, DEPTH, HEADS, PATCH, CLASSES = 48, 2, 3, 2, 5
SIDE, CHANNELS = 6, 3
BASE_STEPS = 128
TIMES = (0.03, 0.4, 0.77, 0.9)
TIMESTEPS = (1, 250, 630, 999)
LEVELS = (7, 0, 3, 10)
LABELS = (0, 4, 5, 2)  # 5 is no class.


def torch_shapes(
    *, width=WIDTH, depth=DEPTH, patch=PATCH, classes=CLASSES, side=SIDE,
    channels=CHANNELS, outputs=2 * CHANNELS, mlp=4 * WIDTH,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Of a SiT's or DiT's state dict, in its order."""
    shapes = {
        'pos_embed': (1, (side // patch) ** 2, width),
        'x_embedder.proj.weight': (width, channels, patch, patch),
        'x_embedder.proj.bias': (width,),
        't_embedder.mlp.0.weight': (width, 256),
        't_embedder.mlp.0.bias': (width,),
        't_embedder.mlp.2.weight': (width, width),
        't_embedder.mlp.2.bias': (width,),
        'y_embedder.embedding_table.weight': (classes + 1, width),
    }
    for i in range(depth):
        for name, to, of in (
            ('attn.qkv', 3 * width, width),
            ('attn.proj', width, width),
            ('mlp.fc1', mlp, width),
            ('mlp.fc2', width, mlp),
            ('adaLN_modulation.1', 6 * width, width),
        ):
            shapes[f'blocks.{i}.{name}.weight'] = (to, of)
            shapes[f'blocks.{i}.{name}.bias'] = (to,)
    return shapes | {
        'final_layer.linear.weight': (patch**2 * outputs, width),
        'final_layer.linear.bias': (patch**2 * outputs,),
        'final_layer.adaLN_modulation.1.weight': (2 * width, width),
        'final_layer.adaLN_modulation.1.bias': (2 * width,),
    }


def flax_shapes() -> dict[str, tuple[int, ...]]:
    """Of the parameters of shortcut-models."""

    def dense(name, of, to):
        return {f'{name}/kernel': (of, to), f'{name}/bias': (to,)}

    shapes = {
        'PatchEmbed_0/Conv_0/kernel': (PATCH, PATCH, CHANNELS, WIDTH),
        'PatchEmbed_0/Conv_0/bias': (WIDTH,),
        'LabelEmbedder_0/Embed_0/embedding': (CLASSES + 1, WIDTH),
        'Embed_0/embedding': (256, 1),
        **dense('TimestepEmbedder_0/Dense_0', 256, WIDTH),
        **dense('TimestepEmbedder_0/Dense_1', WIDTH, WIDTH),
        **dense('TimestepEmbedder_1/Dense_0', 256, WIDTH),
        **dense('TimestepEmbedder_1/Dense_1', WIDTH, WIDTH),
        **dense('FinalLayer_0/Dense_0', WIDTH, 2 * WIDTH),
        **dense('FinalLayer_0/Dense_1', WIDTH, PATCH**2 * CHANNELS),
    }
    for i in range(DEPTH):
        block = f'DiTBlock_{i}'
        shapes |= dense(f'{block}/Dense_0', WIDTH, 6 * WIDTH)
        for part in range(1, 5):
            shapes |= dense(f'{block}/Dense_{part}', WIDTH, WIDTH)
        shapes |= dense(f'{block}/MlpBlock_0/Dense_0', WIDTH, 4 * WIDTH)
        shapes |= dense(f'{block}/MlpBlock_0/Dense_1', 4 * WIDTH, WIDTH)
    return shapes


def random_tensors(shapes, seed: int) -> dict[str, np.ndarray]:
    """Weights of size 1 / sqrt(inputs) and biases that cannot be overlooked."""
    # NumPy promises that these draws stay the same.
    rng = np.random.RandomState(seed)
    tensors = {}
    for name in sorted(shapes):
        shape = shapes[name]
        if name == 'pos_embed':
            side = round(shape[1] ** 0.5)
            tensors[name] = sit.position_embedding(shape[2], side)[None]
            continue
        axes = shape[1:] if name.endswith('.weight') else shape[:-1]
        scale = 0.2 if len(shape) == 1 else 1 / np.sqrt(np.prod(axes))
        if 'embedding' in name:
            scale = 0.5
        tensors[name] = (scale * rng.standard_normal(shape)).astype(np.float32)
    return tensors


def fixture_images() -> np.ndarray:
    """[4, SIDE, SIDE, CHANNELS]."""
    shape = (len(TIMES), SIDE, SIDE, CHANNELS)
    return np.random.RandomState(0).standard_normal(shape).astype(np.float32)


SIT, DIT, SHORTCUT = (
    random_tensors(shapes, seed)
    for seed, shapes in enumerate((torch_shapes(), torch_shapes(), flax_shapes()), 1)
)


def _official_output(kind):
    values = json.loads(FIXTURE.read_text())[kind]
    return np.asarray(values, np.float32).reshape(-1, SIDE, SIDE, CHANNELS)


def _save(path, tensors, metadata=None):
    path.write_bytes(safetensors.numpy.save(tensors, metadata))
    return path


def _output(folder, t, d, w=0.0):
    """Of a converted network, as sampling calls it."""
    network = exported_network.read(folder)
    params = exported_network.initialised(network)
    times, sizes = (np.full(len(LABELS), v, np.float32) for v in (t, d))
    labels, strengths = np.asarray(LABELS), np.full(len(LABELS), w, np.float32)
    return network.model().apply(
        {'params': params}, fixture_images(), times, sizes, strengths, labels
    )


def _assert_close(ours, theirs):
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f'largest error, of the largest value: {error:.2e}')
    assert error < 2e-5


@pytest.mark.parametrize('w', [0.0, 1.5])
def test_sit_is_the_official_one(tmp_path, w):
    path = _save(tmp_path / 'sit.safetensors', SIT)
    network = convert.convert_sit(path, num_heads=HEADS)
    exported_network.write(tmp_path / 'net', network)
    assert network.config.model.time_scale == 1.0
    assert network.class_names == ('0', '1', '2', '3', '4')
    # Step and guidance have no effect before they are learned.
    _assert_close(_output(tmp_path / 'net', TIMES, w / 3, w), _official_output('sit'))


def test_without_variances_sit_is_the_same(tmp_path):
    per_patch = (PATCH**2, 2 * CHANNELS)
    tensors = dict(SIT)
    for leaf in ('weight', 'bias'):
        name = f'final_layer.linear.{leaf}'
        array = SIT[name].reshape(*per_patch, *SIT[name].shape[1:])[:, :CHANNELS]
        tensors[name] = array.reshape(-1, *SIT[name].shape[1:])
    assert {n: t.shape for n, t in tensors.items()} == torch_shapes(outputs=CHANNELS)
    both, one = official.from_sit(SIT, HEADS), official.from_sit(tensors, HEADS)
    jax.tree.map(np.testing.assert_array_equal, both.params, one.params)
    assert both[1:] == one[1:]


def test_dit_is_the_official_one_with_time_turned_round(tmp_path):
    path = _save(tmp_path / 'dit.safetensors', DIT)
    network = convert.convert_dit(path, num_heads=HEADS)
    exported_network.write(tmp_path / 'net', network)
    times = 1 - np.asarray(TIMESTEPS) / 1000
    _assert_close(_output(tmp_path / 'net', times, 0.0), _official_output('dit'))
    with pytest.raises(ValueError, match='predicts noise, not a velocity.*init_from'):
        trained_network.load(tmp_path / 'net')


def test_a_shortcut_model_is_the_official_one_at_every_step_size(tmp_path):
    path = _save(tmp_path / 'shortcut.safetensors', SHORTCUT)
    network = convert.convert_shortcut(path, image_size=SIDE, num_heads=HEADS)
    exported_network.write(tmp_path / 'net', network)
    assert network.config.objective.base_steps == BASE_STEPS
    theirs = _official_output('shortcut')
    sizes = 0.5 ** np.asarray(LEVELS, np.float32)
    _assert_close(_output(tmp_path / 'net', TIMES, sizes), theirs)
    assert sizes[0] == 1 / BASE_STEPS  # The finest, which is also the velocity.
    sizes[0] = 0
    _assert_close(_output(tmp_path / 'net', TIMES, sizes), theirs)
    run = trained_network.load(tmp_path / 'net')
    schedules = [(1.0,), (0.5, 0.5)]
    images = sample.sample_grid(
        run, schedules_=schedules, guidance=[0.5], labels=[0, 3], seed=0
    )
    assert images.shape == (2, 1, 2, SIDE, SIDE, CHANNELS)
    assert np.isfinite(images).all() and np.ptp(images[0] - images[1]) > 1e-2


def test_the_official_xl2_fits_ours():
    """Shapes alone: nothing of the 675 million parameters is allocated."""
    shapes = torch_shapes(
        width=1152, depth=28, classes=1000, side=32, channels=4, outputs=8, mlp=4608
    )
    assert len(shapes) == 292
    assert sum(np.prod(shape) for shape in shapes.values()) == 675_129_632
    tensors = {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in shapes.items()}
    positions = {'pos_embed': sit.position_embedding(1152, 16)[None]}
    del tensors['pos_embed']
    rest = {}

    def convert_it(tensors):
        converted = official.from_sit(tensors | positions)
        rest.update(converted._asdict())
        return converted.params

    params = jax.eval_shape(convert_it, tensors)
    preset = sit.preset('XL/2')
    assert {name: rest['model'][name] for name in preset} == preset
    assert rest['image_shape'] == (32, 32, 4) and rest['num_classes'] == 1000
    expected = sit.abstract_params(sit.SiT(num_classes=1000, **preset), (32, 32, 4))
    for name in rest['fresh']:
        del expected[name]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), expected
    )


@pytest.mark.parametrize(
    'change,message',
    [
        ({'x_embedder.proj.weight': None}, 'no tensor x_embedder.proj.weight'),
        ({'blocks.1.attn.qkv.bias': None}, 'misses blocks.1.attn.qkv.bias; it is of'),
        ({'blocks.0.attn.q_norm.weight': (16,)}, 'besides blocks.0.attn.q_norm.weight'),
        (
            {'blocks.1.mlp.fc2.weight': (48, 100)},
            r'blocks.1.mlp.fc2.weight is \(48, 100\), expected \(48, 192\)',
        ),
        ({'final_layer.linear.bias': (36,)}, '9 channels for patches of 2'),
        ({'pos_embed': (1, 9, 48)}, 'pos_embed differs .* by'),
        ({'pos_embed': (1, 8, 48)}, r'pos_embed is \(1, 8, 48\), expected \(1, 9'),
        ({'x_embedder.proj.weight': (48, 12)}, 'one of 4 axes'),
    ],
)
def test_another_network_is_refused_by_name(tmp_path, change, message):
    tensors = dict(SIT)
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape:
            tensors[name] = np.ones(shape, np.float32)
    path = _save(tmp_path / 'other.safetensors', tensors)
    with pytest.raises(ValueError, match=f'other.safetensors.*{message}'):
        convert.convert_sit(path, num_heads=HEADS)


def test_another_shortcut_model_is_refused_by_name(tmp_path):
    options = dict(image_size=SIDE, num_heads=HEADS)
    for name in ('pos_embed', 'DiTBlock_0/LayerNorm_0/scale'):
        path = _save(
            tmp_path / 'x.safetensors', SHORTCUT | {name: np.ones((9, 48), 'f')}
        )
        with pytest.raises(ValueError, match=f'has besides {name}'):
            convert.convert_shortcut(path, **options)
    path = _save(tmp_path / 'x.safetensors', SIT)
    with pytest.raises(ValueError, match='no tensor PatchEmbed_0/Conv_0/kernel'):
        convert.convert_shortcut(path, **options)
    path = _save(tmp_path / 'x.safetensors', SHORTCUT)
    with pytest.raises(ValueError, match='--base_steps = 100 must be a power of two'):
        convert.convert_shortcut(path, **options, base_steps=100)
    with pytest.raises(ValueError, match='patch_size = 2 does not divide.*7'):
        convert.convert_shortcut(path, image_size=7, num_heads=HEADS)


def test_heads_are_asked_for_where_no_shape_says_them(tmp_path):
    path = _save(tmp_path / 'sit.safetensors', SIT)
    with pytest.raises(ValueError, match='width 48 and depth 2 .* give --num_heads'):
        convert.convert_sit(path)
    with pytest.raises(ValueError, match='num_heads = 5 does not divide'):
        convert.convert_sit(path, num_heads=5)


class Program:
    """What a pickle can carry: a command that runs when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


def test_pickles_are_refused_and_not_run(tmp_path):
    trace = tmp_path / 'it_ran'
    for name in ('checkpoint', 'model.pkl'):
        path = tmp_path / name
        path.write_bytes(pickle.dumps({'train_state': Program(trace)}))
        with pytest.raises(ValueError, match='are pickles.*--help says how'):
            convert.convert_shortcut(path, image_size=SIDE)
        with pytest.raises(ValueError, match='a pickle would run what is in it'):
            convert.convert_sit(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()  # So the files were armed.


def test_the_way_round_a_pickle_that_the_help_shows_works(tmp_path, monkeypatch):
    tree = traverse_util.unflatten_dict(SHORTCUT, sep='/')
    content = {'train_state': {'params_ema': tree}, '_timestamp': 0.0}
    (tmp_path / 'checkpoint').write_bytes(pickle.dumps(content))
    lines = convert.__doc__.split('import pickle')[1].splitlines()
    code = '\n'.join(line.removeprefix('    ') for line in lines)
    monkeypatch.chdir(tmp_path)
    exec(f'import pickle{code}', {})  # noqa: S102
    read, _ = tensor_file.read(tmp_path / 'shortcut.safetensors')
    assert read.keys() == SHORTCUT.keys()
    jax.tree.map(np.testing.assert_array_equal, read, SHORTCUT)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol:UserWarning')
def test_torch_files_are_read_without_their_programs(tmp_path):
    torch = pytest.importorskip(
        'torch', reason='torch reads .pt files; requirements.txt says how to install it'
    )
    path = tmp_path / 'net.pt'
    state = {name: torch.from_numpy(array) for name, array in SIT.items()}
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    command_line = argparse.Namespace(model='SiT-XL/2')
    for content, tree in (
        (state, ''),
        ({'model': other, 'ema': state, 'opt': {}, 'args': command_line}, 'ema'),
        ({'model': {f'module.{n}': t for n, t in state.items()}}, 'model'),
        ({'state_dict': state}, 'state_dict'),
    ):
        torch.save(content, path)
        read, name = tensor_file.read(path)
        assert name == tree
        jax.tree.map(np.testing.assert_array_equal, read, SIT)
    torch.save({n: t.bfloat16() for n, t in state.items()}, path)
    read, _ = tensor_file.read(path)
    np.testing.assert_allclose(read['pos_embed'], SIT['pos_embed'], rtol=2**-7)

    torch.save({n: t for n, t in state.items()}, path)
    whole = path.read_bytes()
    trace = tmp_path / 'it_ran'
    for content, message in (
        ({'ema': Program(trace)}, r'system.*could run any program'),
        ({**state, 'hook': Program(trace)}, 'could run any program'),
        ({**state, 'step': 3}, "'step' is a int where a tensor was expected"),
        ([1, 2], 'a list, not named tensors'),
        ({**state, 'n': torch.arange(3)}, 'n is of int64'),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            tensor_file.read(path)
    path.write_bytes(pickle.dumps({'ema': Program(trace)}))
    with pytest.raises(ValueError, match='net.pt cannot be read with weights_only'):
        tensor_file.read(path)
    for damaged in (whole[: len(whole) // 2], b'', b'not a checkpoint'):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match='net.pt cannot be read .*it is damaged'):
            tensor_file.read(path)
    assert not trace.exists()


def test_torch_must_be_there_and_safe(tmp_path, monkeypatch):
    path = tmp_path / 'net.pt'
    path.write_bytes(b'')
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(ValueError, match='not installed; run pip install torch'):
        tensor_file.read(path)
    for version in ('2.5.1', '1.13.0+cu117'):
        old = argparse.Namespace(__version__=version)
        monkeypatch.setitem(sys.modules, 'torch', old)
        with pytest.raises(ValueError, match='CVE-2025-32434.*2.6 or newer'):
            tensor_file.read(path)


def test_half_precision_is_read_exactly_and_integers_not_at_all(tmp_path):
    bfloat16 = np.asarray(jnp.arange(5, dtype=jnp.bfloat16) / 3)
    half = np.float16([0.1, 2])
    path = _save(tmp_path / 'x.safetensors', {'module.a': bfloat16, 'module.b': half})
    tensors, _ = tensor_file.read(path)
    np.testing.assert_array_equal(tensors['a'], bfloat16.astype(np.float32))
    np.testing.assert_array_equal(tensors['b'], half.astype(np.float32))
    path = _save(tmp_path / 'x.safetensors', {'steps': np.arange(3)})
    with pytest.raises(ValueError, match='steps is of int64'):
        tensor_file.read(path)
    with pytest.raises(ValueError, match='missing.pt is not a file'):
        tensor_file.read(tmp_path / 'missing.pt')


@pytest.fixture(scope='module')
def one_device():
    """Programs for eight devices compile slowly."""
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr(jax, 'devices', lambda: devices)
        yield


def _config(**changes):
    config = config_lib.default()
    config_lib.with_argument(config, 'runlocal')
    config.scores.enabled = False
    config.log.grid_every = 0
    config.train.steps = 2
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope='module')
def small_sit(tmp_path_factory):
    """A SiT for the images and the width of `_config`, converted."""
    shapes = torch_shapes(
        width=32, patch=8, classes=10, side=32, channels=1, outputs=1, mlp=128
    )
    folder = tmp_path_factory.mktemp('sit')
    path = _save(folder / 'sit.safetensors', random_tensors(shapes, 5))
    exported_network.write(folder / 'net', convert.convert_sit(path, num_heads=2))
    return folder / 'net'


@pytest.fixture(scope='module')
def start(small_sit):
    """Changes of `_config`: starts from the SiT and hardly leaves it.

    Adam moves every parameter by the learning rate, however small its gradient.
    """
    folder = small_sit.parent / 'start'
    shutil.copytree(small_sit, folder)
    return {
        'train.init_from': str(folder),
        'model.time_scale': 1.0,
        'optimizer.learning_rate': 1e-9,
    }


@pytest.fixture(scope='module')
def trained(start, tmp_path_factory, one_device):
    """Folder, final state and what was shown of a run of two steps."""
    workdir, shown = tmp_path_factory.mktemp('run'), io.StringIO()
    with contextlib.redirect_stdout(shown):
        state = train.train(_config(**start), workdir)
    return workdir, state, shown.getvalue()


@pytest.fixture(scope='module')
def run(trained):
    return trained[0]


@pytest.fixture(scope='module')
def exported(run):
    folder = run.parent / 'exported'
    exported_network.write(folder, convert.export(run))
    return folder


def _assert_same_bits(a, b):
    def same(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()

    jax.tree.map(same, a, b)


def test_export_and_back_bit_for_bit(run, exported, tmp_path):
    before, after = trained_network.load(run), trained_network.load(exported)
    assert after.step == before.step == 2
    assert after.model == before.model and after.config == before.config
    assert after.class_names == before.class_names
    assert after.image_shape == before.image_shape
    _assert_same_bits(before.params, after.params)
    cells = dict(schedules_=[(1.0,), (0.5, 0.5)], guidance=[0.0, 1.0], labels=[1, 10])
    _assert_same_bits(
        sample.sample_grid(before, **cells, seed=3),
        sample.sample_grid(after, **cells, seed=3),
    )
    exported_network.write(tmp_path / 'again', exported_network.read(exported))
    for folder in (exported, tmp_path / 'again'):
        assert (folder / exported_network.CONFIG).read_bytes() == (
            exported / exported_network.CONFIG
        ).read_bytes()
    tensors, metadata = tensor_file.read_safetensors(
        exported / exported_network.TENSORS
    )
    assert metadata['format'] == 'ism_jax' and metadata['version'] == '1'
    assert tensors['blocks/qkv/kernel'].shape == (2, 32, 96)


def test_what_an_exported_folder_cannot_do_is_said(run, exported):
    with pytest.raises(ValueError, match='no checkpoint 7; .* of step 2'):
        trained_network.load(exported, 7)
    with pytest.raises(ValueError, match='holds one network without the other'):
        diagnose.load_averages(exported, trained_network.load(exported))
    with pytest.raises(ValueError, match='holds a run; give another folder'):
        exported_network.write(run, exported_network.read(exported))
    with pytest.raises(ValueError, match='is portable already'):
        convert.export(exported)


def _damage_tensor(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _edit_heads(path):
    path.write_text(path.read_text().replace('"num_heads": 2', '"num_heads": 4'))


def _edit_metadata(**changes):
    def edit(path):
        tensors, metadata = tensor_file.read_safetensors(path)
        _save(path, tensors, metadata | changes)

    return edit


@pytest.mark.parametrize(
    'name,damage,message',
    [
        (exported_network.TENSORS, lambda p: p.unlink(), 'there is no model.safetensors'),
        (exported_network.CONFIG, lambda p: p.unlink(), 'there is no config.json'),
        (
            exported_network.TENSORS,
            lambda p: p.write_bytes(p.read_bytes()[:-10]),
            'model.safetensors cannot be read .* truncated',
        ),
        (exported_network.TENSORS, _damage_tensor, 'edited or damaged'),
        (
            exported_network.TENSORS,
            lambda p: _save(p, {'a': np.ones(3, 'f')}),
            'not written by ism_jax',
        ),
        (exported_network.TENSORS, _edit_metadata(version='2'), "version '2'"),
        (exported_network.CONFIG, _edit_heads, 'config.json is not the one'),
        (
            exported_network.CONFIG,
            lambda p: p.write_bytes(p.read_bytes()[:-10]),
            'config.json is not the one',
        ),
    ],
)  # fmt: skip
def test_damaged_foreign_and_edited_files_are_refused(
    exported, tmp_path, name, damage, message
):
    folder = tmp_path / 'net'
    shutil.copytree(exported, folder)
    before = (folder / name).read_bytes()
    damage(folder / name)
    assert not (folder / name).exists() or (folder / name).read_bytes() != before
    with pytest.raises(ValueError, match=message):
        trained_network.load(folder)


def test_parameters_that_are_not_the_configs_are_not_written(exported, tmp_path):
    network = exported_network.read(exported)
    kernel = network.params['final']['kernel']
    network.params['final']['kernel'] = kernel[:, :3]
    message = r'final/kernel is \(32, 3\) float32 .* \(32, 64\) float32'
    with pytest.raises(ValueError, match=message):
        exported_network.write(tmp_path / 'net', network)
    assert not (tmp_path / 'net').exists()


def test_training_starts_from_a_converted_sit(trained, start, small_sit, capsys):
    workdir, state, shown = trained
    assert int(state.step) == 2 and int(state.skipped) == 0
    assert 'starting from' in shown and 'SiT of sit.safetensors' in shown
    params = exported_network.read(small_sit).params
    fresh = {'step_embedding', 'guidance_embedding'}
    assert state.params.keys() - params.keys() == fresh
    for tree in (state.params, state.target, state.infer):
        for name in params:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8),
                tree[name], params[name],
            )  # fmt: skip
    # What has no values there is initialised so that it is learned.
    guidance = state.params['guidance_embedding']
    assert np.abs(guidance['hidden']['kernel']).mean() > 1e-3
    assert 0 < np.abs(guidance['out']['kernel']).max() < 1e-8

    shutil.rmtree(start['train.init_from'])  # Not needed again.
    assert int(train.train(_config(**start), workdir).step) == 2
    shown = capsys.readouterr().out
    assert 'resuming at step 2' in shown and 'starting from' not in shown
    with pytest.raises(ValueError, match='train.init_from: .* -> '):
        train.train(_config(**start | {'train.init_from': ''}), workdir)


def test_all_trees_start_where_they_live(small_sit):
    """Over a mesh that splits parameters, in memory of their own."""
    network = exported_network.read(small_sit)
    model = network.model()
    mesh = sharding.make_mesh(2, 4, jax.local_devices())
    state, shardings = train_state.create(
        lambda: sit.init_params(model, (32, 32, 1), jax.random.key(1)),
        optax.adam(1e-3), mesh, twin_ema=True,
    )  # fmt: skip
    fresh = np.asarray(state.params['guidance_embedding']['hidden']['kernel'])
    state = train_state.start_from(state, network.params, shardings)
    trees = state.params, state.target, state.infer
    for tree, places in zip(
        trees, (shardings.params, shardings.target, shardings.infer)
    ):
        assert jax.tree.map(lambda a: a.sharding, tree) == places
        for name, module in network.params.items():
            jax.tree.map(np.testing.assert_array_equal, tree[name], module)
        kept = tree['guidance_embedding']['hidden']['kernel']
        np.testing.assert_array_equal(kept, fresh)
    kernels = [tree['blocks']['mlp_in']['kernel'] for tree in trees]
    assert not kernels[0].is_fully_replicated
    first = {k.addressable_shards[0].data.unsafe_buffer_pointer() for k in kernels}
    assert len(first) == 3


@pytest.mark.parametrize(
    'change,message',
    [
        ({}, r'time_scale = 1000.0, but .*--config.model.time_scale=1.0'),
        ({'model.num_heads': 4}, 'num_heads = 4, but .* has 2'),
        ({'model.depth': 3}, 'depth = 3'),
        ({'model.mlp_ratio': 2.0}, 'mlp_ratio = 2.0'),
        ({'train.init_from': 'nowhere'}, 'nowhere holds no exported network'),
    ],
)  # fmt: skip
def test_a_start_that_does_not_fit_is_refused_by_name(
    small_sit, tmp_path, one_device, change, message
):
    changes = {'train.init_from': str(small_sit)} | change
    if change:
        changes['model.time_scale'] = 1.0
    with pytest.raises(ValueError, match=message):
        train.train(_config(**changes), tmp_path / 'run')
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['lock']


def test_data_of_other_shapes_are_refused_but_not_of_another_side(small_sit):
    network = exported_network.read(small_sit)
    exported_network.check_start(network, network.model(), (64, 64, 1), small_sit)
    model = sit.SiT(num_classes=7, **network.config.model)
    message = r'class_embedding/embedding is \(11, 32\) .* and \(8, 32\)'
    with pytest.raises(ValueError, match=message):
        exported_network.check_start(network, model, (32, 32, 1), small_sit)
    message = r'final/bias is \(64,\) float32 .* and \(192,\) float32'
    with pytest.raises(ValueError, match=message):
        exported_network.check_start(network, network.model(), (32, 32, 3), small_sit)


def test_other_classes_begin_as_no_class(small_sit):
    network = exported_network.read(small_sit)
    assert (
        exported_network.with_classes(network, [str(n) for n in range(10)]) is network
    )
    other = exported_network.with_classes(network, ('cat', 'dog', 'newt'))
    exported_network.check_start(other, other.model(), (32, 32, 1), small_sit)
    assert other.class_names == ('cat', 'dog', 'newt')
    x = jax.random.normal(jax.random.key(0), (3, 32, 32, 1))
    t, zero = jnp.array([0.1, 0.5, 0.9]), jnp.zeros(3)

    def velocity(network, label):
        params = exported_network.initialised(network)
        model = network.model()
        return experiment.apply_model(model, params, x, t, zero, zero, label)

    expected = velocity(network, jnp.full(3, 10))
    for label in (jnp.full(3, 3), jnp.arange(3)):
        np.testing.assert_array_equal(velocity(other, label), expected)
    assert np.abs(velocity(network, jnp.arange(3)) - expected).max() > 1e-3


def test_a_method_may_show_the_step_as_it_needs(small_sit):
    """Where the network has not learned steps; a run's is not replaced."""
    network = exported_network.read(small_sit)
    options = dict(network.config.model) | {'step_embedding': 'size'}
    model = sit.SiT(num_classes=10, **options)
    exported_network.check_start(network, model, (32, 32, 1), small_sit)
    trained = network._replace(params=exported_network.initialised(network), fresh=())
    with pytest.raises(ValueError, match="step_embedding = 'size', but .* has 'level'"):
        exported_network.check_start(trained, model, (32, 32, 1), small_sit)


def test_the_command_line(tmp_path, run):
    def call(*arguments):
        return subprocess.run(
            [sys.executable, '-m', 'ism_jax.convert', *arguments],
            capture_output=True, text=True, cwd=ROOT, timeout=200,
            env=os.environ | {'XLA_FLAGS': ''},
        )  # fmt: skip

    path, out = _save(tmp_path / 'sit.safetensors', SIT), tmp_path / 'net'
    result = call('sit', f'--checkpoint={path}', '--num_heads=3', f'--out={out}')
    assert result.returncode == 0, result.stderr[-3000:]
    assert '--config.model.time_scale=1.0' in result.stdout
    assert exported_network.read(out).origin == 'SiT of sit.safetensors'
    result = call('export', f'--workdir={run}', f'--out={tmp_path / "mine"}')
    assert result.returncode == 0, result.stderr[-3000:]
    _assert_same_bits(
        exported_network.read(tmp_path / 'mine').params,
        trained_network.load(run).params,
    )
    for arguments, message in (
        ((), 'give one of the commands sit, dit, shortcut, export'),
        (('sit', f'--workdir={run}'), '--workdir is no flag of sit'),
        (('export',), 'export needs --workdir'),
    ):
        result = call(*arguments, f'--out={out}')
        assert result.returncode == 2 and message in result.stderr.splitlines()[-1]
