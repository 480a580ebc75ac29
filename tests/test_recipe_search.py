"""Candidates, budgets, scores and rungs of a search, without training."""

import math

import numpy as np
import pytest

from ism_jax import config as config_lib
from ism_jax import config_check, cost, experiment, recipe_search

SPACE = {
    'first': ('', 'a=1', 'a=2'),
    'second': ('', 'b=1/c=1'),
    'third': ('', 'd=1', 'd=2', 'd=3'),
}


def _draw(number, seed=0, identify=lambda recipe: recipe):
    return recipe_search.draw(
        SPACE, base='ism', number=number, seed=seed, identify=identify
    )


def test_candidates_are_drawn_without_replacement():
    every = _draw(100)
    assert len(every) == len(set(every)) == 3 * 2 * 4
    assert every[0] == 'ism' and 'ism/a=2/b=1/c=1/d=3' in every
    assert _draw(5) == every[:5] == _draw(5)  # A larger search extends a smaller one.
    assert _draw(1) == ['ism']
    assert set(_draw(5, seed=1)) != set(every[:5])


def test_the_draw_is_uniform():
    counts = {}
    for seed in range(600):
        second = _draw(2, seed)[1]
        counts[second] = counts.get(second, 0) + 1
    assert len(counts) == 23
    # Standard deviation 5.0.
    np.testing.assert_allclose(list(counts.values()), 600 / 23, atol=20)


def test_invalid_and_equivalent_recipes_are_replaced():
    valid = lambda recipe: None if 'b=1' in recipe and 'd=2' in recipe else recipe
    drawn = _draw(21, identify=valid)
    assert len(drawn) == 21 == len(_draw(100, identify=valid))
    same = lambda recipe: recipe.replace('/d=1', '').replace('/d=2', '')
    assert len(_draw(100, identify=same)) == 3 * 2 * 2


def _resolve(recipe):
    config = config_lib.with_argument(config_lib.default(), 'runlocal')
    for change in recipe.split('/')[1:]:
        config_lib.set_field(config, change)
    config_check.validate(config)
    return config


def _draw_candidates(space, steps=10, log=print):
    return recipe_search.draw_candidates(
        space, base='ism', number=9, seed=0, steps=steps, resolve=_resolve, log=log
    )


def test_recipes_train_with_equal_flops():
    base = 'ism/train.steps=100'
    split = 'ism/objective.midpoint=online'  # One more forward pass.
    same, other = recipe_search.with_equal_flops([base, split], base, _resolve)
    assert same == base and other.startswith(f'{split}/train.steps=')
    configs = [_resolve(recipe) for recipe in (same, other)]
    spent = [c.train.steps * recipe_search.step_flops(c) for c in configs]
    assert configs[1].train.steps < 97
    np.testing.assert_allclose(*spent, rtol=0.01)


def test_candidates_are_valid_and_have_their_flops():
    derivative = (
        'objective.consistency=derivative/objective.step_draw=ends'
        '/model.step_embedding=size'
    )
    space = {
        'consistency': ('', derivative, 'objective.consistency=difference'),
        'batch': ('', 'train.batch_size=64', 'train.batch_size=32'),  # 32 is the base.
    }
    lines = []
    flops = _draw_candidates(space, log=lines.append)
    assert next(iter(flops)) == 'ism' and len(flops) == 4
    configs = {config_lib.to_json(_resolve(recipe)) for recipe in flops}
    assert configs == {
        config_lib.to_json(_resolve(f'ism{change}{batch}'))
        for change in ('', f'/{derivative}')
        for batch in ('', '/train.batch_size=64')
    }
    assert flops['ism/train.batch_size=64'] == 2 * flops['ism']
    skipped = [line for line in lines if line.startswith('skipped ism/objective.c')]
    assert len(skipped) == len(lines) == 3
    assert all('objective.step_draw' in line for line in skipped)


def test_flops_need_no_data():
    config = _resolve('ism')
    expected = cost.step_flops(experiment.Experiment(config))
    config.data.source = 'folder:/missing'
    assert recipe_search.step_flops(config) == expected > 0


def test_mistakes_in_the_space_are_refused():
    with pytest.raises(ValueError, match='did you mean ema.target_decay'):
        _draw_candidates({'decay': ('', 'ema.target_deca=0.9')})
    with pytest.raises(ValueError, match='warmup_steps = 5 must be less than'):
        _resolve('ism/optimizer.warmup_steps=5/train.steps=5')
    # The base recipe is never skipped.
    with pytest.raises(ValueError, match='--rungs has 5 steps in .* train.steps = 5'):
        recipe_search.draw_candidates(
            {},
            base='ism/optimizer.warmup_steps=5',
            number=1,
            seed=0,
            steps=5,
            resolve=_resolve,
        )


def test_candidates_that_are_invalid_in_the_first_rung_are_skipped():
    space = {
        'batch': ('', 'train.batch_size=64'),
        'warmup': ('', 'optimizer.warmup_steps=6'),
    }
    # Batches of 64 have half of the 10 steps: a warm-up of 6 does not fit.
    flops = _draw_candidates(space, steps=10)
    assert set(flops) == {
        'ism',
        'ism/train.batch_size=64',
        'ism/optimizer.warmup_steps=6',
    }


def test_budgets_are_equal_in_flops():
    for ratio in (0.3, 1.0, 1.95):
        name = recipe_search.with_budget('ism/a=1', 3000, ratio)
        recipe, _, steps = name.rpartition('/train.steps=')
        assert recipe == 'ism/a=1'
        assert int(steps) * ratio == pytest.approx(3000, abs=1)
    assert recipe_search.with_budget('ism', 3, 10.0) == 'ism/train.steps=1'


def _run(*distances):
    return [{'steps': 2**i, 'fd': fd} for i, fd in enumerate(distances)]


def _candidate(*runs, recipe='ism'):
    return recipe_search.Candidate(recipe, 10, 10**9, runs)


def test_scores_are_geometric_means_over_steps_and_means_over_seeds():
    assert _candidate(_run(2.0, 8.0)).score == pytest.approx(4.0)
    assert _candidate(_run(2.0, 8.0), _run(9.0, 4.0)).score == pytest.approx(5.0)
    assert _candidate(_run(2.0, None)).score == math.inf  # The samples diverged.
    assert _candidate(_run(2.0, 8.0), None).score == math.inf  # A run failed.


class FakeTraining:
    """FD by recipe; None for a run that fails, NaN for samples that diverge."""

    def __init__(self, distances):
        self.distances, self.calls = distances, []

    def __call__(self, recipes, num_seeds):
        self.calls.append((list(recipes), num_seeds))
        runs = {}
        for name in recipes:
            distance = self.distances[name.rpartition('/')[0]]
            run = _run(None if distance != distance else distance) if distance else None
            runs[name] = [run] * num_seeds
        return runs


def test_each_rung_keeps_the_best():
    distances = dict(zip('abcdef', (6.0, 2.0, math.nan, 1.0, None, 3.0), strict=True))
    training = FakeTraining(distances)
    flops = dict.fromkeys('abcdef', 100) | {'b': 200}
    rungs = [(8, 1), (16, 1), (32, 3)]
    results = list(recipe_search.halve(flops, rungs=rungs, keep=0.5, train=training))
    assert [kept for _, kept in results] == [['d', 'b', 'f'], ['d', 'b'], ['d']]
    assert training.calls == [
        (
            [
                'a/train.steps=8',
                'b/train.steps=4',
                'c/train.steps=8',
                'd/train.steps=8',
                'e/train.steps=8',
                'f/train.steps=8',
            ],
            1,
        ),
        (['d/train.steps=16', 'b/train.steps=8', 'f/train.steps=16'], 1),
        (['d/train.steps=32', 'b/train.steps=16'], 3),
    ]
    # Failed candidates are not kept, even if too few others are left.
    (ranked, kept), *_ = recipe_search.halve(
        flops, rungs=[(8, 1), (9, 1)], keep=1.0, train=training
    )
    assert kept == ['d', 'b', 'f', 'a'] and len(ranked) == 6


def test_a_search_ends_when_all_fail():
    training = FakeTraining({'a': None, 'b': math.nan})
    results = recipe_search.halve(
        {'a': 1, 'b': 1}, rungs=[(8, 1), (9, 1)], keep=0.5, train=training
    )
    assert [kept for _, kept in results] == [[]] and len(training.calls) == 1


def test_the_table_has_a_row_per_candidate():
    candidates = [
        _candidate(None, recipe='ism/a=1'),
        _candidate(_run(2.0, 8.0), _run(4.0, 16.0), recipe='ism'),
        _candidate(_run(1.0, 4.0), None, recipe='ism/a=2'),
    ]
    header, _, *rows = recipe_search.format_rung(candidates, ['ism']).splitlines()
    assert header == (
        '| candidate | score | 1 step | 2 steps | seeds | training steps '
        '| GFLOP per step | kept |'
    )
    assert rows == [
        '| `ism` | 6.00 | 3.00 ± 1.00 | 12.0 ± 4.00 | 2 of 2 | 10 | 1 | yes |',
        '| `ism/a=1` | NaN |  |  | 0 of 1 | 10 | 1 | no |',
        '| `ism/a=2` | NaN | 1.00 | 4.00 | 1 of 2 | 10 | 1 | no |',
    ]


def test_rungs_are_steps_and_seeds():
    assert recipe_search.parse_rungs('750x1, 750x2,3000x3') == [
        (750, 1),
        (750, 2),
        (3000, 3),
    ]


@pytest.mark.parametrize(
    'text',
    ['', '750', '750x0', '750x1,', '1.5x1', '-5x1', '750x1,500x1', '750x2,800x1'],
)
def test_other_rungs_are_refused(text):
    with pytest.raises(ValueError, match=f"--rungs '{text}' must be STEPSxSEEDS of"):
        recipe_search.parse_rungs(text)
