"""Reads files of named tensors without running code that they contain.

A `.safetensors` file holds only numbers. A `.pt` file is a pickle, that is, a program:
it is read with PyTorch's `weights_only`, which builds tensors and rejects everything
else, and only with versions of PyTorch in which this protection cannot be bypassed.
Other pickles are rejected.
"""

import argparse
import json
from pathlib import Path
import re
import zipfile

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
import safetensors
import safetensors.numpy

from ism_jax.runtime import paths

TORCH_SUFFIXES = ('.pt', '.pth', '.ckpt', '.bin')
# Earlier versions ran code of a crafted file despite weights_only (CVE-2025-32434).
SAFE_TORCH = (2, 6)
INSTALL_TORCH = 'pip install torch (the CPU build is enough, see pytorch.org)'
# Keys under which training programs save the tensors; the first one found is read.
NESTINGS = ('ema', 'model', 'state_dict')
PARALLEL_PREFIX = 'module.'  # DistributedDataParallel adds it to every name.
# Number of batches that a batch norm of PyTorch was updated with; not a weight.
BATCH_COUNTER = 'num_batches_tracked'
FLOATS = ('float16', 'bfloat16', 'float32', 'float64')


def read(path) -> tuple[dict[str, np.ndarray], str]:
    """Reads a file of named tensors.

    Args:
      path: ends in `.safetensors` or one of `TORCH_SUFFIXES`.

    Returns:
      {name: float32 array}, without the counters of batch norms, and the key of
      `NESTINGS` under which the tensors were found ('' if they are not nested).

    Raises:
      ValueError: the file is missing, damaged, in another format or holds more than
        floating-point tensors, or PyTorch is missing or unsafe.
    """
    path = paths.local_path(path, 'the checkpoint')
    if not path.is_file():
        raise ValueError(f'{path} is not a file; give the path of a checkpoint')
    if path.suffix == '.safetensors':
        tree, (tensors, _) = '', read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        tree, tensors = _read_torch(path)
    else:
        raise ValueError(
            f'{path} is not a .safetensors or {"/".join(TORCH_SUFFIXES)} file; other '
            'formats are not read, because a pickle runs any code that is in it. The '
            'owner of a trusted file can write its tensors with '
            'safetensors.numpy.save_file'
        )
    if tensors and all(name.startswith(PARALLEL_PREFIX) for name in tensors):
        tensors = {n.removeprefix(PARALLEL_PREFIX): a for n, a in tensors.items()}
    tensors = {n: a for n, a in tensors.items() if n.split('.')[-1] != BATCH_COUNTER}
    for name, array in tensors.items():
        if array.dtype.name not in FLOATS:
            raise ValueError(
                f'{path}: {name} has the dtype {array.dtype}; weights must have one '
                f'of {", ".join(FLOATS)}'
            )
    return {name: array.astype(np.float32) for name, array in tensors.items()}, tree


def read_safetensors(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a `.safetensors` file, local or in a bucket.

    Raises:
      ValueError: the file is missing or damaged.
    """
    path = paths.to_path(path)
    try:
        if paths.is_bucket(path):
            return _read_object(paths.read_bytes(path))
        with safetensors.safe_open(path, 'numpy') as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, file.metadata() or {}
    except (OSError, TypeError, safetensors.SafetensorError) as error:
        paths.raise_if_unreachable(path, error)
        raise ValueError(
            f'{path} cannot be read as safetensors ({error}): it is truncated or of '
            'another format; download or write it again'
        ) from error


def _read_object(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata in the bytes of a `.safetensors` file."""
    tensors = safetensors.numpy.load(data)
    # The format: the header's length in 8 bytes, then the header as JSON.
    length = int.from_bytes(data[:8], 'little')
    return tensors, json.loads(data[8 : 8 + length]).get('__metadata__', {})


def _read_torch(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    torch = _import_torch(path)
    try:
        # The training programs of SiT and DiT save their command line, a Namespace,
        # beside the weights; building it runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(
                path,
                map_location='cpu',
                weights_only=True,
                # So that the optimizer state, if present, is never read.
                mmap=zipfile.is_zipfile(path),
            )
    except Exception as error:  # An untrusted file can raise any type.
        # The rest of PyTorch's message explains how to disable the protection.
        found = re.search(r'unsupported .*?(?=\n|\. |$)', str(error), re.IGNORECASE)
        reason = found[0] if found else str(error).split('.')[0] or 'it is empty'
        raise ValueError(
            f'{path} cannot be read with weights_only ({reason}): it is damaged, or '
            'holds more than tensors, so that loading it could run arbitrary code. The '
            'owner of a trusted file can write its tensors with '
            'safetensors.torch.save_file'
        ) from error
    tree = ''
    if isinstance(content, dict):
        nested = (name for name in NESTINGS if isinstance(content.get(name), dict))
        tree = next(nested, '')
        content = content[tree] if tree else content
    named = content.items() if isinstance(content, dict) else [('content', content)]
    for name, value in named:
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f'{path}: {name!r} is of type {type(value).__name__} instead of a '
                f'tensor; save a state_dict, alone or under {", ".join(NESTINGS)}'
            )
    # PyTorch cannot convert bfloat16 to NumPy.
    return tree, {
        name: (v.float() if v.is_floating_point() else v).detach().numpy()
        for name, v in named
    }


def _import_torch(path: Path):
    """The module torch."""
    try:
        import torch

        version = torch.__version__
    except ImportError:
        version = ''
    numbers = re.match(r'(\d+)\.(\d+)', version)
    if not numbers or tuple(map(int, numbers.groups())) < SAFE_TORCH:
        problem = (
            f'PyTorch {version} cannot read it safely (CVE-2025-32434)'
            if version
            else 'PyTorch is not installed'
        )
        raise ValueError(
            f'{path} cannot be read: {problem}; run {INSTALL_TORCH} for version '
            f'{".".join(map(str, SAFE_TORCH))} or newer, or give a .safetensors file'
        )
    return torch
