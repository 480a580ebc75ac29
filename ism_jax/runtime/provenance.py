"""Where a result comes from: hardware, commit of the code, and versions."""

import os
from pathlib import Path
import platform
import subprocess

import jax


def environment() -> dict[str, str]:
    """Hardware, commit and versions, for a record."""
    return {
        'hardware': hardware(),
        'commit': commit(),
        'python': platform.python_version(),
        'jax': jax.__version__,
    }


def hardware() -> str:
    """The devices, as text."""
    device = jax.devices()[0]
    if device.platform != 'cpu':
        return f'{jax.device_count()} x {device.device_kind}'
    name = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.exists():
        lines = [li for li in info.read_text().splitlines() if 'model name' in li]
        name = lines[0].partition(':')[2].strip() if lines else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else '?'
    return f'CPU, {cores} core(s) of {name}'


def commit() -> str:
    """The commit of the code, with '+' if it was changed since; '' if unknown."""
    git = lambda *args: subprocess.run(
        ['git', *args], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[1],
    ).stdout.strip()  # fmt: skip
    try:
        changed = git('status', '--porcelain', '--untracked-files=no', '.')
        return git('rev-parse', '--short=12', 'HEAD') + ('+' if changed else '')
    except (OSError, subprocess.CalledProcessError):
        return ''
