"""Settings and fixtures that tests share."""

import importlib
import importlib.util
import os
from pathlib import Path
import secrets
import sys
import time
import types

# Tests compile many small programs and run each of them a few times. Without LLVM's
# optimizations that takes 40 % less time; child processes inherit the flags.
os.environ['XLA_FLAGS'] = (
    '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Threads of XLA's CPU client, by default one per device. A device may wait in two
# independent collectives at once; when all threads wait, the program never ends.
os.environ.setdefault('NPROC', '32')
# Compiling takes more time than anything else, so workers, child processes and later
# sessions share their programs.
CACHE = Path(os.environ.get('XDG_CACHE_HOME', Path.home() / '.cache'), 'ism_jax/tests')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(CACHE))
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import fsspec  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import storage_emulator  # noqa: E402

from ism_jax import config as config_lib  # noqa: E402
from ism_jax import train  # noqa: E402
from ism_jax.interchange import named_tensors  # noqa: E402
from ism_jax.models import inception  # noqa: E402
from ism_jax.runtime import paths  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_num_cpu_devices', 8)
DEVICES = jax.devices()
TESTS = Path(__file__).parent


# Files that train networks, start processes or compile many programs, which
# `launch/test.sh --fast` leaves out. They run first and in this order: no worker
# should begin the longest when the others have finished.
LONG = (
    'training/test_resume.py',
    'test_pod_job.py',
    'test_notebook.py',
    'test_rehearsal.py',
    'training/test_reliability.py',
    'training/test_train_step.py',
    'evaluation/test_classifier.py',
    'evaluation/test_precision_recall.py',
    'evaluation/test_protocol.py',
    'interchange/test_autoencoder_weights.py',
    'interchange/test_exported_network.py',
    'interchange/test_inception_weights.py',
    'interchange/test_official_dit.py',
    'interchange/test_official_sit.py',
    'models/test_dinov2.py',
    'models/test_efficientnet_lite.py',
    'models/test_in_context.py',
    'models/test_inception.py',
    'models/test_sit.py',
    'models/test_unet.py',
    'models/test_vae.py',
    'objectives/test_objectives.py',
    'objectives/test_training.py',
    'runtime/test_distributed.py',
    'runtime/test_lease.py',
    'runtime/test_sharding.py',
    'test_ablation.py',
    'test_benchmark.py',
    'test_buckets.py',
    'test_compiled_plan.py',
    'test_config.py',
    'test_convert.py',
    'test_cost.py',
    'test_demo.py',
    'test_diagnose.py',
    'test_docs.py',
    'test_evaluate.py',
    'test_generator.py',
    'test_launch.py',
    'test_prepare_data.py',
    'test_properties.py',
    'test_push.py',
    'test_recipe_search.py',
    'test_sample.py',
    'test_sharing.py',
    'test_wheel.py',
    'training/test_determinism.py',
    'training/test_event_file.py',
    'training/test_init_from.py',
    'training/test_potentials_file.py',
    'training/test_previous_version.py',
    'training/test_profiler.py',
    'training/test_writers.py',
    'transport/test_coupling.py',
    'transport/test_semidiscrete.py',
)


def pytest_collection_modifyitems(items):
    """Marks the tests of `LONG` files and moves them to the front."""
    rank = {TESTS / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path, len(LONG)))
    for item in items:
        if item.path in rank:
            item.add_marker(pytest.mark.long)


def pytest_sessionfinish(session):
    """Deletes the compiled programs that no test has used for a week."""
    if hasattr(session.config, 'workerinput'):  # A worker; others may be compiling.
        return
    week_ago = time.time() - 7 * 24 * 3600
    for program in CACHE.glob('*-cache'):
        if program.stat().st_atime < week_ago:
            program.unlink(missing_ok=True)


@pytest.fixture(scope='session', autouse=True)
def one_device():
    """One device, unless a test asks for `eight_devices`: those compile slowly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, 'devices', lambda: DEVICES[:1])
        yield


@pytest.fixture
def eight_devices(monkeypatch):
    """Eight devices of the CPU, for meshes."""
    monkeypatch.setattr(jax, 'devices', lambda: DEVICES)
    return DEVICES


@pytest.fixture
def torch_fidelity(monkeypatch):
    """The package torch_fidelity; without it, the test is skipped.

    It imports torchvision, which our comparisons do not need and whose builds depend on
    PyTorch's, so an empty module replaces it.
    """
    for name in ('torch', 'torch_fidelity'):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f'{name}, the reference, is not installed')
    if 'torch_fidelity' not in sys.modules:
        for name in ('', '.datasets', '.transforms', '.transforms.functional'):
            module = types.ModuleType(f'torchvision{name}')
            monkeypatch.setitem(sys.modules, module.__name__, module)
            parent, _, child = module.__name__.rpartition('.')
            if parent:
                setattr(sys.modules[parent], child, module)
        for name in ('CIFAR10', 'CIFAR100', 'STL10'):
            setattr(sys.modules['torchvision.datasets'], name, type(name, (), {}))
    return importlib.import_module('torch_fidelity')


@pytest.fixture(scope='session')
def small_run(tmp_path_factory):
    """The folder of a run of six steps with fast EMAs."""
    config = config_lib.with_argument(config_lib.default(), 'runlocal')
    config.scores.enabled = False
    config.train.steps = 6
    config.optimizer.update(learning_rate=1e-2, warmup_steps=0)
    config.ema.infer_decay = 0.5
    config.log.update(grid_every=0, every=6, writer='tensorboard,jsonl')
    config.checkpoint.every = 3
    folder = tmp_path_factory.mktemp('small_run')
    train.train(config.lock(), folder, profile='2:4')
    return folder


@pytest.fixture(scope='session')
def storage():
    """An emulator of Google Cloud Storage, as a `storage_emulator.Proxy`.

    It has a bucket named 'bucket'. Clients of this process and its children use it.
    """
    with storage_emulator.google() as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in storage_emulator.environment(proxy.url).items():
            patch.setenv(name, value)
        from google.cloud import storage

        storage.Client(project=None).create_bucket('bucket')
        yield proxy


@pytest.fixture
def folder(storage, request):
    """The URL of a new folder in the bucket."""
    del storage
    name = request.node.originalname
    return paths.to_path(f'gs://bucket/{name}-{secrets.token_hex(4)}')


@pytest.fixture(scope='session')
def s3_bucket():
    """The URL of a bucket in an emulator of S3."""
    with storage_emulator.s3() as url, pytest.MonkeyPatch.context() as patch:
        for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'):
            patch.setenv(name, 'test')
        patch.setenv('AWS_DEFAULT_REGION', 'us-east-1')
        patch.setenv('AWS_ENDPOINT_URL', url)
        patch.setitem(fsspec.config.conf['s3'], 'endpoint_url', url)
        fsspec.filesystem('s3').mkdir('bucket')
        yield 's3://bucket'


@pytest.fixture(params=['gs', 's3'])
def url(request):
    """A new folder in a bucket of each kind."""
    if request.param == 'gs':
        return str(request.getfixturevalue('folder'))
    return f'{request.getfixturevalue("s3_bucket")}/{request.node.originalname}'


@pytest.fixture(scope='session')
def inception_tensors():
    """Random Inception weights, named as in the published file.

    Activations are near 1.
    """
    expected = named_tensors.abstract_params(inception.Inception())
    rng = np.random.default_rng(0)
    out = {}

    def fill(tree, name):
        if 'conv' not in tree:
            for child in tree:
                fill(tree[child], f'{name}.{child}')
            return
        height, width, ins, outs = tree['conv']['kernel'].shape
        scale = (2 / (height * width * ins)) ** 0.5
        out[f'{name}.conv.weight'] = scale * rng.normal(size=(outs, ins, height, width))
        out[f'{name}.bn.weight'] = rng.uniform(0.7, 1.3, outs)
        out[f'{name}.bn.bias'] = 0.1 * rng.normal(size=outs)
        out[f'{name}.bn.running_mean'] = 0.1 * rng.normal(size=outs)
        out[f'{name}.bn.running_var'] = rng.uniform(0.5, 1.5, outs)

    for layer in expected:
        if layer != 'fc':
            fill(expected[layer], layer)
    out['fc.weight'] = 0.05 * rng.normal(size=(1008, 2048))
    out['fc.bias'] = rng.normal(size=1008)
    return {name: tensor.astype(np.float32) for name, tensor in out.items()}


@pytest.fixture(scope='session')
def inception_file(inception_tensors, tmp_path_factory):
    """A PyTorch file of these weights; without PyTorch, the test is skipped."""
    torch = pytest.importorskip('torch', reason='it writes the file')
    state = {name: torch.from_numpy(t) for name, t in inception_tensors.items()}
    for name in inception_tensors:
        if name.endswith('running_var'):
            counter = name.replace('running_var', 'num_batches_tracked')
            state[counter] = torch.tensor(7)
    path = tmp_path_factory.mktemp('inception') / 'weights.pth'
    torch.save(state, path)
    return path
