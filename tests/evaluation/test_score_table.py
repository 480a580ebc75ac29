"""The tables that commands print."""

import math

from ism_jax.evaluation import score_table

RECORDS = [
    {'steps': 4, 'guidance': 1.5, 'fd': 3.25, 'accuracy': 0.987, 'samples': 1000},
    {'steps': 1, 'guidance': 0, 'fd': 123.456, 'accuracy': 0.5, 'samples': 1000},
    {'steps': 1, 'guidance': 1.5, 'fd': 20.0, 'accuracy': 0.75, 'samples': 1000},
]
FLOOR = {'fd': 2.5, 'accuracy': 0.99, 'samples': 500}


def test_classifier_table():
    table = score_table.classifier_table(
        RECORDS, floor=FLOOR, reference='4,500 real digits'
    )
    assert (
        table
        == """\
1,000 samples per setting, against 4,500 real digits.
Rows: number of sampling steps. Columns: guidance scale w (0: no guidance).
"real" is 500 held-out real images in place of samples: the score to reach.
FD is larger for fewer images: compare "real" and samples only roughly.

FD, Frechet distance of features (lower is better)
  steps     w=0  w=1.5
  --------------------
      1  123.46  20.00
      4       -   3.25
   real    2.50  (at any steps and guidance)

Accuracy, samples classified as their label (higher is better)
  steps    w=0  w=1.5
  -------------------
      1  50.0%  75.0%
      4      -  98.7%
   real  99.0%  (at any steps and guidance)"""
    )


def test_small_distances_get_more_decimals_and_nan_is_printed():
    records = [
        {'steps': 2, 'guidance': 0.5, 'fd': 0.01234, 'accuracy': 1, 'samples': 10},
        {'steps': 1, 'guidance': 0.5, 'fd': math.nan, 'accuracy': 0, 'samples': 2000},
    ]
    table = score_table.classifier_table(records, floor=FLOOR, reference='images')
    assert table.startswith('10 to 2,000 samples per setting, against images.')
    rows = [line.split() for line in table.split('Accuracy')[0].splitlines()]
    assert ['1', 'nan'] in rows and ['2', '0.0123'] in rows


def _record(steps, guidance, grid):
    network = {'network': 'tiny', 'weights': 'a' * 64, 'reference': '9 images'}
    return {
        'steps': steps,
        'guidance': guidance,
        'guidance_grid': grid,
        'scores': {'FID': 12.3456, 'IS': 2.0, 'IS deviation': 0.1},
        'samples': 50_000,
        'labels': 'balanced',
        'seed': 0,
        'trained_steps': 7,
        'judges': {'inception': network | {'reference_key': 'key'}},
    }


def test_metrics_table():
    table = score_table.metrics_table([_record(1, 1.5, [1.5]), _record(2, 0.0, [0.0])])
    assert (
        table
        == """\
| steps | w | FID | IS | samples |
| --- | --- | --- | --- | --- |
| 1 | 1.5 | 12.35 | 2 | 50,000 |
| 2 | 0 | 12.35 | 2 | 50,000 |

inception: tiny (weights aaaaaaaaaaaa), against 9 images (key key).
Labels balanced, seed 0, after 7 steps of training."""
    )


def test_metrics_table_warns_of_a_grid_over_guidance():
    records = [_record(1, 2.0, [1.0, 2.0]), _record(2, 2.0, [2.0])]
    table = score_table.metrics_table(records)
    assert '| 1 | 2 (grid of 2) |' in table and '| 2 | 2 |' in table
    assert 'Steps 1: a grid over guidance, w = 1, 2.' in table
