"""Formatting and lint, by the pinned version of ruff; pyproject.toml has its rules."""

from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ('ism_jax', 'tests', 'configs', 'launch/draw_glyphs.py')


@pytest.mark.parametrize('command', [('check',), ('format', '--check')])
def test_ruff(command):
    done = subprocess.run(
        [sys.executable, '-m', 'ruff', *command, '--no-cache', *FOLDERS],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
