"""The wheel: its commands and configs work outside the checkout."""

import configparser
import importlib.util
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """The wheel's content, as an installation has it."""
    for name in ('setuptools', 'wheel'):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f'{name} is not installed')
    folder = tmp_path_factory.mktemp('wheel')
    for name in ('ism_jax', 'configs'):
        ignore = shutil.ignore_patterns('__pycache__')
        shutil.copytree(ROOT / name, folder / 'checkout' / name, ignore=ignore)
    for name in ('pyproject.toml', 'requirements.txt', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, folder / 'checkout')
    options = ('--no-deps', '--no-build-isolation', '--quiet', f'--wheel-dir={folder}')
    command = [sys.executable, '-m', 'pip', 'wheel', *options, folder / 'checkout']
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = folder.glob('*.whl')
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / 'installed')
    return folder / 'installed'


def test_it_has_every_module_and_config(installed):
    for folder, inside in (('ism_jax', 'ism_jax'), ('configs', 'ism_jax/configs')):
        ours = {p.relative_to(ROOT / folder) for p in (ROOT / folder).rglob('*.py')}
        theirs = {
            p.relative_to(installed / inside)
            for p in (installed / inside).rglob('*.py')
            if folder == 'configs' or 'configs' not in p.parts
        }
        assert theirs == ours
    assert (installed / 'ism_jax' / 'py.typed').is_file()


def test_every_command_is_an_entry_point(installed):
    (text,) = installed.glob('*.dist-info/entry_points.txt')
    parser = configparser.ConfigParser()
    parser.read(text)
    scripts = dict(parser['console_scripts'])
    commands = {
        path.stem
        for path in (ROOT / 'ism_jax').glob('*.py')
        if "if __name__ == '__main__':" in path.read_text()
    }
    assert scripts == {
        f'ism-{name.replace("_", "-")}': f'ism_jax.entry_points:{name}'
        for name in commands
    }


def test_the_extra_of_the_tests_is_their_requirements():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    lines = (ROOT / 'tests' / 'requirements.txt').read_text().splitlines()
    names = [line.partition('#')[0].strip() for line in lines]
    assert project['optional-dependencies']['test'] == list(filter(None, names))


def test_a_config_is_found_by_its_name_outside_the_checkout(installed, tmp_path):
    code = 'from ism_jax import entry_points; entry_points.train()'
    for config in ('imagenet256_ism_xl2', 'quickstart:runlocal'):
        done = subprocess.run(
            [sys.executable, '-c', code, f'--config={config}', '--plan'],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=300,
            env=os.environ | {'PYTHONPATH': str(installed)},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert 'parameters' in done.stdout
