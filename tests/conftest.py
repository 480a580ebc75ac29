"""Settings of all tests, and a package that several compare with."""

import importlib
import importlib.util
import os
import sys
import tempfile
import types

# Eight devices, so that meshes are real; set before JAX starts.
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Many tests compile the same program; most of the time would go there. New for each
# session, and shared with the processes that tests start.
_CACHE = tempfile.TemporaryDirectory(prefix='ism-jax-tests-')
os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE.name
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture
def torch_fidelity(monkeypatch):
    """The package torch_fidelity; without it, the test is skipped.

    It imports torchvision, of which nothing that we compare with needs anything, and of
    which no one build goes with every build of PyTorch: an empty one is enough.
    """
    for name in ('torch', 'torch_fidelity'):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f'{name}, the other side of the comparison, is not installed')
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
