"""A search over training recipes by successive halving (arXiv 1502.07943).

Each rung trains its candidates with the same FLOPs, ranks them by their Frechet
distances and keeps the best; the next rung has a larger budget. A recipe is a name such
as 'ism/ema.target_decay=0.99'. The caller resolves recipes to configs and trains them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import itertools
import math
import re

import numpy as np

from ism_jax import config as config_lib
from ism_jax import cost
from ism_jax.evaluation import ladder
from ism_jax.experiment import Experiment
from ism_jax.sampling import image_grid


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A recipe with its runs in one rung.

    Attributes:
      recipe: its name, without the number of training steps.
      train_steps: number of training steps of its runs.
      step_flops: FLOPs of a training step.
      runs: records of the run of each seed; None for a run that failed.
    """

    recipe: str
    train_steps: int
    step_flops: int
    runs: Sequence[Sequence[dict] | None]

    @property
    def score(self) -> float:
        """Geometric mean of the FD over numbers of sampling steps, averaged over seeds.

        Infinite if a run failed or its samples diverged. In the geometric mean the same
        ratio counts the same at each number of steps, whatever the scale of its FD.
        """
        if not all(self.runs):
            return math.inf
        fds = [[r['fd'] for r in run] for run in self.runs]
        logs = np.log(np.array(fds, float))  # None, from samples that diverged, is NaN.
        score = float(np.exp(logs.mean(1)).mean())
        return score if math.isfinite(score) else math.inf


def draw(
    space: Mapping[str, Sequence[str]],
    *,
    base: str,
    number: int,
    seed: int,
    identify: Callable[[str], str | None],
) -> list[str]:
    """Recipes drawn from a space without replacement; the first is `base`.

    With the same seed, a larger number only appends recipes.

    Args:
      space: the options of each choice, 'field=value/field=value' or '' for no change.
      base: recipe that the options change.
      number: number of recipes; fewer are drawn if the space has no more.
      seed: seed of the draw.
      identify: maps a recipe to a text that equivalent recipes share, or to None if the
        recipe is invalid.
    """
    random = np.random.default_rng(seed)
    sizes = [len(options) for options in space.values()]
    recipes, seen = {identify(base): base}, set()
    while len(recipes) < number and len(seen) < math.prod(sizes):
        indices = tuple(random.integers(sizes))
        if indices in seen:
            continue
        seen.add(indices)
        chosen = (o[i] for o, i in zip(space.values(), indices, strict=True))
        recipe = '/'.join((base, *filter(None, chosen)))
        if (identity := identify(recipe)) is not None:
            recipes.setdefault(identity, recipe)
    return list(recipes.values())


def draw_candidates(
    space: Mapping[str, Sequence[str]],
    *,
    base: str,
    number: int,
    seed: int,
    steps: int,
    resolve: Callable[[str], object],
    log: Callable[[str], None] = print,
) -> dict[str, int]:
    """Valid recipes, no two with the same config, with the FLOPs of a training step.

    Args:
      space, base, number, seed: see `draw`.
      steps: number of training steps of the base recipe in the first rung.
      resolve: maps a recipe to its config; raises a ValueError if it is invalid.
      log: called with a message about each invalid combination.

    Raises:
      ValueError: an unknown field in `space`, or `base` is invalid.
    """
    resolve(base)  # Raises if it is invalid with any number of steps.
    for option in itertools.chain(*space.values()):
        # An invalid combination is skipped, but a misspelled field is a mistake.
        config = resolve(base)
        for change in filter(None, option.split('/')):
            config_lib.set_field(config, change)
    flops = {}

    def identify(recipe):
        try:
            config = resolve(recipe)
            flops[recipe] = step_flops(config)
            # The warm-up may be longer than the training of the first rung.
            resolve(with_budget(recipe, steps, flops[recipe] / flops[base]))
        except ValueError as error:
            if recipe == base:
                raise ValueError(
                    f'--rungs has {steps} steps in the first rung, with which the base '
                    f'recipe is invalid: {error}'
                ) from error
            log(f'skipped {recipe}: {error}')
            return None
        return config_lib.to_json(config)

    drawn = draw(space, base=base, number=number, seed=seed, identify=identify)
    return {recipe: flops[recipe] for recipe in drawn}


def step_flops(config) -> int:
    """FLOPs of a training step of a config; opens no data."""
    side = config.data.image_size
    shape = (side, side, config.data.channels)
    # The number of classes only sizes a lookup table, which has no products.
    return cost.step_flops(Experiment(config, num_classes=1, image_shape=shape))


def parse_rungs(text: str) -> list[tuple[int, int]]:
    """Training steps and seeds of each rung, from '750x1,3000x3'.

    Raises:
      ValueError: another form, or a rung has fewer steps or seeds than the previous.
    """
    parts = text.split(',')
    matches = [re.fullmatch(r'([1-9]\d*)x([1-9]\d*)', part.strip()) for part in parts]
    rungs = [tuple(map(int, match.groups())) for match in matches if match]
    falls = any(
        after[0] < before[0] or after[1] < before[1]
        for before, after in itertools.pairwise(rungs)
    )
    if not rungs or len(rungs) < len(parts) or falls:
        raise ValueError(
            f'--rungs {text!r} must be STEPSxSEEDS of each rung, such as '
            '750x1,1500x1,3000x3; neither may decrease'
        )
    return rungs


def with_budget(recipe: str, steps: int, ratio: float) -> str:
    """The recipe with the FLOPs of `steps` steps of the base recipe.

    Args:
      recipe: its name.
      steps: number of training steps of the base recipe.
      ratio: FLOPs of a step of the recipe / FLOPs of a step of the base recipe.
    """
    return f'{recipe}/train.steps={max(1, round(steps / ratio))}'


def with_equal_flops(
    recipes: Sequence[str], base: str, resolve: Callable[[str], object]
) -> list[str]:
    """The recipes with the training FLOPs of `base`.

    Args:
      recipes: their names.
      base: the name of another recipe.
      resolve: see `draw_candidates`.
    """
    config = resolve(base)
    steps, flops = config.train.steps, step_flops(config)
    return [
        recipe
        if recipe == base
        else with_budget(recipe, steps, step_flops(resolve(recipe)) / flops)
        for recipe in recipes
    ]


def halve(
    flops: Mapping[str, int],
    *,
    rungs: Sequence[tuple[int, int]],
    keep: float,
    train: Callable[[Sequence[str], int], Mapping[str, Sequence]],
) -> Iterator[tuple[list[Candidate], list[str]]]:
    """Yields the candidates of each rung and the recipes kept, best first.

    Args:
      flops: FLOPs of a training step of each recipe; the first is the base recipe.
      rungs: number of training steps of the base recipe, and number of seeds.
      keep: share of the recipes that a rung keeps; the last rung keeps one.
      train: maps recipes, with their numbers of training steps, and a number of seeds
        to the `Candidate.runs` of each.
    """
    left = list(flops)
    base = left[0]
    for number, (steps, seeds) in enumerate(rungs, start=1):
        names = {r: with_budget(r, steps, flops[r] / flops[base]) for r in left}
        runs = train(list(names.values()), seeds)
        candidates = [
            Candidate(recipe, int(name.rpartition('=')[2]), flops[recipe], runs[name])
            for recipe, name in names.items()
        ]
        left = best(candidates, keep if number < len(rungs) else 0.0)
        yield candidates, left
        if not left:
            return


def best(candidates: Sequence[Candidate], keep: float) -> list[str]:
    """The recipes with the lowest scores, best first.

    Args:
      candidates: of one rung.
      keep: share of the candidates to keep, rounded to at least one. Those with an
        infinite score are not kept.
    """
    finite = [c for c in candidates if math.isfinite(c.score)]
    number = max(1, round(keep * len(candidates)))
    return [c.recipe for c in sorted(finite, key=lambda c: c.score)[:number]]


def format_rung(candidates: Sequence[Candidate], kept: Sequence[str]) -> str:
    """A Markdown table of a rung, best candidate first, with the FD by steps."""
    records = [
        record | {'recipe': candidate.recipe}
        for candidate in candidates
        for run in candidate.runs
        for record in run or ()
    ]
    distance = ladder.summarize(records, 'fd')
    steps = sorted({record['steps'] for record in records})
    header = ['candidate', 'score', *map(image_grid.step_count, steps), 'seeds']
    header += ['training steps', 'GFLOP per step', 'kept']
    rows = [header, ['---'] * len(header)]
    for candidate in sorted(candidates, key=lambda c: c.score):
        cells = (distance.get((candidate.recipe, number)) for number in steps)
        rows.append(
            [
                f'`{candidate.recipe}`',
                ladder.format_number(candidate.score),
                *(
                    '' if cell is None else ladder.format_mean(*cell[:2])
                    for cell in cells
                ),
                f'{sum(map(bool, candidate.runs))} of {len(candidate.runs)}',
                f'{candidate.train_steps}',
                f'{candidate.step_flops / 1e9:.3g}',
                'yes' if candidate.recipe in kept else 'no',
            ]
        )
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows) + '\n'
