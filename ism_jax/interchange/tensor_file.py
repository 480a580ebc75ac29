"""Files of named tensors, read without running anything that is in them.

A `.safetensors` file holds numbers only. A `.pt` file is a pickle, which is a program:
it is read with PyTorch's `weights_only`, which builds tensors and refuses the rest, and
not at all with a PyTorch in which that refusal could be got round. Other pickles are
refused.
"""

import argparse
from pathlib import Path
import re
import zipfile

import ml_dtypes  # noqa: F401  (comes with JAX; makes NumPy know bfloat16)
import numpy as np
import safetensors

TORCH_SUFFIXES = ('.pt', '.pth', '.ckpt', '.bin')
# Earlier ones ran code of a crafted file in spite of weights_only (CVE-2025-32434).
SAFE_TORCH = (2, 6)
INSTALL_TORCH = 'pip install torch (the CPU build is enough, see pytorch.org)'
# Where training programs nest the tensors; the first that is there is read.
NESTINGS = ('ema', 'model', 'state_dict')
PARALLEL_PREFIX = 'module.'  # Of every name, where DistributedDataParallel was saved.
# Of the batches that a batch norm of PyTorch has seen: an integer, and no weight.
BATCH_COUNTER = 'num_batches_tracked'


def read(path) -> tuple[dict[str, np.ndarray], str]:
    """Reads a file of named tensors.

    Args:
      path: ends in `.safetensors` or one of `TORCH_SUFFIXES`.

    Returns:
      {name: float32 array} without counters of batch norms, and which tree of the file
      that is: one of `NESTINGS`, or '' where the tensors are not nested.

    Raises:
      ValueError: no such file, another format, a damaged file, one that holds more
        than tensors of floating-point numbers, or a PyTorch that is missing or unsafe.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'{path} is not a file; give the path of a checkpoint')
    if path.suffix == '.safetensors':
        tree, (tensors, _) = '', read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        tree, tensors = _read_torch(path)
    else:
        raise ValueError(
            f'{path} is not a .safetensors or {"/".join(TORCH_SUFFIXES)} file; other '
            'formats are not read: a pickle would run what is in it. The owner of a '
            'trusted file can write its tensors with safetensors.numpy.save_file'
        )
    if tensors and all(name.startswith(PARALLEL_PREFIX) for name in tensors):
        tensors = {n.removeprefix(PARALLEL_PREFIX): a for n, a in tensors.items()}
    tensors = {n: a for n, a in tensors.items() if n.split('.')[-1] != BATCH_COUNTER}
    for name, array in tensors.items():
        if array.dtype.name not in ('float16', 'bfloat16', 'float32', 'float64'):
            raise ValueError(
                f'{path}: {name} is of {array.dtype}; weights are floating-point '
                'numbers of 16, 32 or 64 bits'
            )
    return {name: array.astype(np.float32) for name, array in tensors.items()}, tree


def read_safetensors(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a `.safetensors` file.

    Raises:
      ValueError: the file is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, 'numpy') as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, file.metadata() or {}
    except (OSError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(
            f'{path} cannot be read as safetensors ({error}): it is truncated or of '
            'another format; fetch or write it again'
        ) from error


def _read_torch(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    torch = _safe_torch(path)
    try:
        # The training programs of SiT and DiT save their command line, a Namespace,
        # beside the weights; it is built without running anything.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(
                path,
                map_location='cpu',
                weights_only=True,
                # So that the optimizer's state, if there, is never read.
                mmap=zipfile.is_zipfile(path),
            )
    except Exception as error:  # A foreign file can make it raise anything.
        # PyTorch's own words go on with how to switch the protection off.
        found = re.search(r'unsupported .*?(?=\n|\. |$)', str(error), re.IGNORECASE)
        reason = found[0] if found else str(error).split('.')[0] or 'it is empty'
        raise ValueError(
            f'{path} cannot be read with weights_only ({reason}): it is damaged, or '
            'holds more than tensors, and then loading it could run any program. The '
            'owner of a trusted file can write its tensors with '
            'safetensors.torch.save_file'
        ) from error
    tree = ''
    if isinstance(content, dict):
        nested = (name for name in NESTINGS if isinstance(content.get(name), dict))
        tree = next(nested, '')
        content = content[tree] if tree else content
    if not isinstance(content, dict):
        raise ValueError(
            f'{path} holds a {type(content).__name__}, not named tensors; save a '
            'state_dict'
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f'{path}: {name!r} is a {type(value).__name__} where a tensor was '
                f'expected; save a state_dict, alone or under {", ".join(NESTINGS)}'
            )
    # NumPy has no bfloat16 that PyTorch knew of.
    return tree, {
        name: (v.float() if v.is_floating_point() else v).detach().numpy()
        for name, v in content.items()
    }


def _safe_torch(path: Path):
    """The module torch.

    Raises:
      ValueError: it is missing, or not safe to read a foreign file with.
    """
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f'{path} can only be read with PyTorch, which is not installed; run '
            f'{INSTALL_TORCH}, or give the tensors as .safetensors'
        ) from error
    numbers = re.match(r'(\d+)\.(\d+)', torch.__version__).groups()
    if tuple(map(int, numbers)) < SAFE_TORCH:
        raise ValueError(
            f'PyTorch {torch.__version__} cannot read {path} safely (CVE-2025-32434); '
            f'install {".".join(map(str, SAFE_TORCH))} or newer: {INSTALL_TORCH}'
        )
    return torch
