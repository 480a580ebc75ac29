"""The comparison of two records."""

import json
import subprocess
import sys

import pytest

from ism_jax import figure_ratios

OLD = {
    'jax': '0.10',
    'measured': {
        'rows': [{'name': 'train step', 'ratio': 1.0, 'milliseconds': 200.0}],
        'collectives': [
            {
                'kind': 'all-gather',
                'content': 'activations',
                'dtype': 'f32',
                'count': 8,
            },
            {'kind': 'all-reduce', 'content': 'gradients', 'dtype': 'f32', 'count': 2},
        ],
    },
}


def _new():
    record = json.loads(json.dumps(OLD))
    record['measured']['rows'][0]['milliseconds'] = 50.0
    # The order of rows does not matter, only their names.
    gone, kept = record['measured']['collectives']
    kept['count'] = 3
    record['measured']['collectives'] = [kept, gone | {'kind': 'all-to-all'}]
    return record


def test_rows_are_matched_by_name_and_only_differences_are_listed():
    text = figure_ratios.table(_new(), OLD)
    rows = [line.split() for line in text.splitlines()]
    assert ['200', '50', '0.250'] in [row[-3:] for row in rows]
    assert ['2', '3', '1.500'] in [row[-3:] for row in rows]
    assert len(rows) == 5 and 'rows, train step, ratio' not in text
    assert any(
        'all-gather' in line and line.split()[-1] == '8' for line in text.splitlines()
    )
    assert figure_ratios.table(OLD, OLD) == 'no figure differs'


def test_the_command_compares_two_files(tmp_path):
    paths = tmp_path / 'old.json', tmp_path / 'new.json'
    for path, record in zip(paths, (OLD, _new()), strict=True):
        path.write_text(json.dumps(record))
    command = [sys.executable, '-m', 'ism_jax.benchmark', f'--record={paths[1]}']
    done = subprocess.run(
        [*command, f'--against={paths[0]}'], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and '0.250' in done.stdout, done.stderr


@pytest.mark.parametrize(
    'text, message', [('[1]', 'is no record'), ('x', 'not a JSON')]
)
def test_other_files_are_refused(text, message, tmp_path):
    (tmp_path / 'a').write_text(text)
    with pytest.raises(ValueError, match=message):
        figure_ratios.read(tmp_path / 'a')
