"""Files of tensors: what is read, and what is rejected without being run."""

import argparse
import os
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
from official_tensors import SIT, save
import pytest

from ism_jax.interchange import tensor_file


class Program:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


def test_pickles_are_rejected_and_not_run(tmp_path):
    trace = tmp_path / 'it_ran'
    path = tmp_path / 'model.pkl'
    path.write_bytes(pickle.dumps({'train_state': Program(trace)}))
    with pytest.raises(ValueError, match='a pickle runs any code that is in it'):
        tensor_file.read(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()  # The file does run code when it is unpickled.


@pytest.mark.filterwarnings('ignore:Detected pickle protocol:UserWarning')
def test_torch_files_are_read_without_running_their_code(tmp_path):
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
        ({'ema': Program(trace)}, r'system.*could run arbitrary code'),
        ({**state, 'hook': Program(trace)}, 'could run arbitrary code'),
        ({**state, 'step': 3}, "'step' is of type int instead of a tensor"),
        ([1, 2], 'of type list instead of a tensor'),
        ({**state, 'n': torch.arange(3)}, 'n has the dtype int64'),
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


def test_torch_must_be_installed_and_safe(tmp_path, monkeypatch):
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


def test_half_precision_is_read_exactly_and_integers_are_rejected(tmp_path):
    bfloat16 = np.asarray(jnp.arange(5, dtype=jnp.bfloat16) / 3)
    half = np.float16([0.1, 2])
    path = save(tmp_path / 'x.safetensors', {'module.a': bfloat16, 'module.b': half})
    tensors, _ = tensor_file.read(path)
    np.testing.assert_array_equal(tensors['a'], bfloat16.astype(np.float32))
    np.testing.assert_array_equal(tensors['b'], half.astype(np.float32))
    path = save(tmp_path / 'x.safetensors', {'steps': np.arange(3)})
    with pytest.raises(ValueError, match='steps has the dtype int64'):
        tensor_file.read(path)
    with pytest.raises(ValueError, match='missing.pt is not a file'):
        tensor_file.read(tmp_path / 'missing.pt')
