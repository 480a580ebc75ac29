"""Bad input on the command line is one line and exit code 2; help is useful."""

from pathlib import Path
import subprocess
import sys

import pytest

from ism_jax import config as config_lib
from ism_jax.runtime import paths

ROOT = Path(__file__).parents[2]


def _train(*flags):
    return subprocess.run(
        [sys.executable, '-m', 'ism_jax.train', *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )


CONFIG = '--config=configs/quickstart.py'


@pytest.mark.parametrize(
    'flags,message',
    [
        ((), '--config is missing; give one such as'),
        (
            ('--config=configs/nothing.py',),
            '--config configs/nothing.py does not exist',
        ),
        (('--config=configs/quickstart.py:sm',), "config argument 'sm' is unknown"),
        (
            (CONFIG, '--config.train.batch_sise=8'),
            "the config has no field 'batch_sise'; did you mean 'batch_size'",
        ),
        ((CONFIG, '--config.trian.steps=8'), "did you mean 'train'"),
        ((CONFIG, '--config.train.steps=many'), '--config.train.steps=many'),
        ((CONFIG, '--config.train.batch_size=22'), 'train.batch_size = 22'),
        ((CONFIG, '--wrkdir=x'), "Unknown command line flag 'wrkdir'"),
        ((CONFIG, 'x'), "'x' is not a flag"),
        ((CONFIG, '--workdir=s3://bucket/a'), '--workdir s3://bucket/a is a URL'),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message, tmp_path):
    if not any(flag.startswith('--workdir') for flag in flags):
        flags = (*flags, f'--workdir={tmp_path}/run')
    result = _train(*flags)
    assert result.returncode == 2, result.stderr
    (line,) = [li for li in result.stderr.splitlines() if 'error:' in li]
    assert message in line and result.stderr.strip().endswith(line)
    assert 'Traceback' not in result.stderr
    assert not (tmp_path / 'run').exists() and not (ROOT / 'gs:').exists()


def test_help_lists_flags_and_says_where_the_fields_are():
    result = _train('--help')
    assert result.returncode == 0
    for text in ('resumes a run', '--workdir', '--num_processes', '--help=config'):
        assert text in result.stdout, text


def test_help_on_the_config_lists_every_field_with_its_value():
    result = _train('--help=config')
    assert result.returncode == 0
    for name, value in config_lib.flatten(config_lib.default()).items():
        assert f'--config.{name}={value!r}' in result.stdout
    result = _train('--help=config', CONFIG, '--config.train.steps=77')
    assert '--config.train.steps=77' in result.stdout
    assert '--config.model.hidden_size=32' in result.stdout


@pytest.mark.parametrize('url', ['gs://bucket/a', 's3://b', 'https://x/y'])
def test_urls_are_not_local_paths(url):
    with pytest.raises(ValueError, match=f'--out {url} is a URL'):
        paths.local_path(url, '--out')
    with pytest.raises(ValueError, match='is a URL'):
        paths.local_path(Path(url), '--out')


def test_local_paths_are_expanded():
    assert paths.local_path('~/a', '--out') == Path.home() / 'a'
    assert paths.local_path('/a/b:c/d', '--out') == Path('/a/b:c/d')
    assert paths.local_path('C:/a', '--out') == Path('C:/a')
