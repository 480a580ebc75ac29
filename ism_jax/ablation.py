"""Trains recipes with several seeds and compares them.

    python -m ism_jax.ablation --config configs/ablation.py --out results/ladder.json

Every recipe of the config file (its `RECIPES`), each with every seed, is trained and
scored in a process of its own; one that fails is reported and the others go on. The
same command again goes on where it stopped: finished runs are not repeated, an
unfinished one resumes from its checkpoint.

    --recipes sm,ism,ism/transport.epsilon=0.02/ema.target_decay=0.99

chooses recipes, with fields set otherwise after a slash (in double quotes where a value
has a comma); `--set train.steps=500` sets a field for all.

Scores are those of `ism_jax.evaluate`. Where a method offers a range of guidance, each
number of steps up to 8 takes the strength of `sample.guidance` with the lowest Frechet
distance on a separate set of samples, more steps that of 8; the score is then of other
noise.

Writes `--out`, a JSON list of all records, with the table (`.md`) and the plot of the
ladder and the systems (`.png`) beside it. `--summary` only reads the records and writes
these two.
"""

from collections.abc import Sequence
import concurrent.futures
import importlib.util
import json
import math
import os
from pathlib import Path
import platform
import queue
import shlex
import subprocess
import sys
import time

from absl import app, flags
import jax
from matplotlib import figure as figures
from matplotlib import ticker
import numpy as np

from ism_jax import config as config_lib
from ism_jax import experiment
from ism_jax.data import sources
from ism_jax.evaluation import scores
from ism_jax.evaluation.sample_scorer import SampleScorer
from ism_jax.runtime import command_line, files, provenance
from ism_jax.train import train

# Guidance is chosen for up to so many steps; more take the choice of these.
CHOOSE_UP_TO = 8
# Added to a run's seed for the noise of the samples that choose.
CHOOSING = 10_000


def resolve(module, recipe: str, changes: Sequence[str], seed: int):
    """The config of a run.

    Args:
      module: the config file, with `get_config`.
      recipe: such as 'ism/transport.epsilon=0.02'.
      changes: 'field=value', for every recipe.
      seed: of the run.

    Raises:
      ValueError: an unknown recipe or field, or a config that could not work.
    """
    name, *own = recipe.split('/')
    config = module.get_config(name)
    for change in (*changes, *own):
        config_lib.set_field(config, change)
    config.seed = seed
    config_lib.validate(config)
    return config


def load_config_file(path: str):
    """The module of a config file.

    Raises:
      ValueError: no such file, or one that names no recipes.
    """
    if not Path(path).is_file():
        raise ValueError(f'--config {path} is no file; give configs/ablation.py')
    spec = importlib.util.spec_from_file_location('ablation_config', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, 'RECIPES'):
        raise ValueError(
            f'--config {path} has no RECIPES, the names that its get_config takes'
        )
    return module


def run_recipe(config, workdir: Path, cache_dir: Path) -> list[dict]:
    """Trains and scores one run; one record for each number of steps.

    Args:
      config: of the run.
      workdir: of the run.
      cache_dir: where the classifier is, the same for all runs.
    """
    started = time.time()
    state = train(config, workdir)
    minutes = (time.time() - started) / 60
    source = sources.make_source(
        config.data.source, **config_lib.source_options(config)
    )
    model = experiment.make_model(config, len(source.class_names))
    objective = config_lib.make_objective(config, len(source.class_names))
    sampler = experiment.make_sampler(
        config,
        objective,
        lambda params, *inputs: experiment.apply_model(model, params, *inputs),
        source.image_shape,
        batch_size=config.sample.batch_size,
    )
    # The same reference images and classifier for every run, whatever its seed.
    scorer = SampleScorer(source, sampler, cache_dir=cache_dir, seed=0)
    started = time.time()
    records = score(
        scorer,
        state.infer,
        steps=config.sample.steps,
        guidance=config.sample.guidance,
        samples=config.scores.samples,
        seed=config.seed,
    )
    about = {
        'real_fd': scorer.floor['fd'],
        'real_accuracy': scorer.floor['accuracy'],
        'trained_steps': int(state.step),
        'train_minutes': minutes,
        'score_minutes': (time.time() - started) / 60,
        'hardware': provenance.hardware(),
        'commit': provenance.commit(),
        'python': platform.python_version(),
        'jax': jax.__version__,
    }
    return [record | about for record in records]


def score(
    scorer: SampleScorer, params, *, steps, guidance, samples: int, seed: int
) -> list[dict]:
    """One record for each number of steps, at the guidance that was chosen for it.

    The rule is the module's. `chosen_from` holds the distances it was chosen by.
    """
    records, chosen, tried = [], guidance[0], {}
    for number in sorted(steps):
        if len(guidance) > 1 and number <= CHOOSE_UP_TO:
            tried = {
                f'{w:g}': scorer(
                    params, steps=number, guidance=float(w),
                    samples=samples, noise_seed=CHOOSING + seed,
                )['fd']
                for w in guidance
            }  # fmt: skip
            # A distance of NaN, of samples that diverged, never wins.
            chosen = min(
                guidance, key=lambda w: np.nan_to_num(tried[f'{w:g}'], nan=np.inf)
            )
        record = scorer(
            params, steps=number, guidance=float(chosen), samples=samples,
            noise_seed=seed,
        )  # fmt: skip
        records.append(record | {'chosen_from': tried})
    return records


def run_all(
    module,
    config_path: str,
    *,
    recipes: Sequence[str],
    seeds: Sequence[int],
    changes: Sequence[str],
    workdir: Path,
    out: Path,
    parallel: int,
    show=print,
) -> dict[str, str]:
    """Runs what is not finished; `out` is written after each run.

    Seeds are the outer loop, so that a table of all recipes is there early.

    Returns:
      {run: what went wrong} of the runs that failed.
    """
    configs = {
        (recipe, seed): resolve(module, recipe, changes, seed)
        for seed in seeds
        for recipe in recipes
    }
    results, same, first = {}, {}, {}
    waiting = queue.Queue()
    for (recipe, seed), config in configs.items():
        # Recipes that are the same run by two names are run once.
        original = first.setdefault(config_lib.to_json(config), (recipe, seed))
        if original != (recipe, seed):
            same[recipe, seed] = original
            continue
        folder = run_folder(workdir, recipe, seed)
        text = config_lib.to_json(config)
        path = folder / 'config.json'
        if finished(folder) and path.exists() and path.read_text() == text:
            results[recipe, seed] = json.loads((folder / 'records.json').read_text())
            continue
        folder.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, text.encode())
        waiting.put((recipe, seed))
    show(f'{len(results)} of {len(first)} runs are finished')
    failures, started, total = {}, time.time(), waiting.qsize()

    def write_records():
        named = results | {
            other: results[own] for other, own in same.items() if own in results
        }
        write(out, named, command_of)

    if total:
        prepare_classifier(next(iter(configs.values())), workdir, show)

    def command_of(recipe, seed):
        if ',' in recipe:  # In a list it is one only within quotes.
            recipe = f'"{recipe}"'
        parts = [
            'python', '-m', 'ism_jax.ablation', '--config', config_path,
            '--recipes', recipe, '--seeds', str(seed),
        ]  # fmt: skip
        return shlex.join([*parts, *(f'--set={change}' for change in changes)])

    def serve(slot: int):
        while True:
            try:
                recipe, seed = waiting.get_nowait()
            except queue.Empty:
                return
            begun = time.time()
            problem = run_process(run_folder(workdir, recipe, seed), slot, parallel)
            minutes = (time.time() - begun) / 60
            if problem:
                failures[f'{recipe}, seed {seed}'] = problem
                show(
                    f'{recipe}, seed {seed}: FAILED after {minutes:.1f} min: {problem}'
                )
                continue
            path = run_folder(workdir, recipe, seed) / 'records.json'
            records = json.loads(path.read_text())
            results[recipe, seed] = records
            done = total - waiting.qsize()
            left = (time.time() - started) / max(done, 1) * waiting.qsize() / 60
            distances = ', '.join(f'{r["steps"]}: {_number(r["fd"])}' for r in records)
            show(
                f'{recipe}, seed {seed}: {minutes:.1f} min; FD by steps {distances} '
                f'(about {left:.0f} min left)'
            )
            write_records()

    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        for future in [pool.submit(serve, slot) for slot in range(parallel)]:
            future.result()
    write_records()
    return failures


def prepare_classifier(config, workdir: Path, show) -> None:
    """Trains the classifier once, before the runs that share it."""
    source = sources.make_source(
        config.data.source, **config_lib.source_options(config)
    )
    SampleScorer(source, None, cache_dir=workdir, seed=0, show=show)


def run_folder(workdir: Path, recipe: str, seed: int) -> Path:
    return workdir / f'{recipe.replace("/", "__")}_seed{seed}'


def finished(folder: Path) -> bool:
    return (folder / 'records.json').exists()


def run_process(folder: Path, slot: int, parallel: int) -> str:
    """Runs one recipe in a process; '' or what went wrong, in a line.

    With several at a time each gets its own share of the CPU cores.
    """
    log = folder / 'log.txt'
    command = [sys.executable, '-m', 'ism_jax.ablation', f'--run_folder={folder}']
    if parallel > 1 and hasattr(os, 'sched_getaffinity'):
        every = sorted(os.sched_getaffinity(0))
        own = every[slot % len(every) :: parallel]
        command.append(f'--cores={",".join(map(str, own))}')
    environment = {
        # Seeds of a recipe compile the same programs.
        'JAX_COMPILATION_CACHE_DIR': str(folder.parent / 'compiled'),
        # So that the log's last line is the last that was said.
        'PYTHONUNBUFFERED': '1',
    }
    with log.open('a') as output:
        process = subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment | os.environ,
        )
    if process.returncode == 0 and finished(folder):
        return ''
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    last = lines[-1] if lines else f'exit status {process.returncode}'
    return f'{last} (see {log})'


def write(out: Path, results: dict, command_of) -> None:
    """Adds the results to the records in `out`, in place of older ones of a run."""
    earlier = json.loads(out.read_text()) if out.exists() else []
    kept = [r for r in earlier if (r['recipe'], r['seed']) not in results]
    new = [
        {'recipe': recipe, 'seed': seed} | record
        | {'command': command_of(recipe, seed)}
        for (recipe, seed), records in results.items()
        for record in records
    ]  # fmt: skip
    order = lambda r: (r['recipe'], r['seed'], r['steps'])
    scores.write_records(out, sorted(kept + new, key=order))


def summarize(records: Sequence[dict], field: str) -> dict:
    """{(recipe, steps): (mean, standard error, number of seeds)} of a field.

    The standard error is NaN for a single seed; a value of null, of samples that
    diverged, makes the mean NaN.
    """
    cells = {}
    for record in records:
        value = math.nan if record[field] is None else record[field]
        cells.setdefault((record['recipe'], record['steps']), []).append(value)
    return {
        cell: (
            float(np.mean(values)),
            float(np.std(values, ddof=1) / math.sqrt(len(values)))
            if len(values) > 1
            else math.nan,
            len(values),
        )
        for cell, values in cells.items()
    }


def format_table(records: Sequence[dict], recipes: Sequence[str]) -> str:
    """Markdown: recipes downwards, numbers of steps to the right."""
    distance, accuracy = (summarize(records, field) for field in ('fd', 'accuracy'))
    steps = sorted({record['steps'] for record in records})
    known = {record['recipe'] for record in records}
    order = [r for r in recipes if r in known] + sorted(known - set(recipes))
    minutes = {}
    for record in records:
        minutes.setdefault(record['recipe'], {})[record['seed']] = record[
            'train_minutes'
        ]

    def cell(recipe, number):
        mean, error, _ = distance.get((recipe, number), (math.nan,) * 3)
        share = accuracy.get((recipe, number), (math.nan,))[0]
        if (recipe, number) not in distance:
            return ''
        spread = '' if math.isnan(error) else f' ± {_number(error)}'
        return f'{_number(mean)}{spread} ({100 * share:.0f}%)'

    rows = [
        ['recipe', *(f'{n} step{"s" * (n > 1)}' for n in steps), 'seeds', 'min']
    ]  # fmt: skip
    rows.append(['---'] * len(rows[0]))
    for recipe in order:
        seeds = minutes[recipe]
        rows.append(
            [f'`{recipe}`', *(cell(recipe, n) for n in steps), str(len(seeds)),
             f'{np.mean(list(seeds.values())):.1f}']
        )  # fmt: skip
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows) + '\n'


def _number(value) -> str:
    """Three digits."""
    if value is None or not math.isfinite(value):
        return 'NaN'
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 1
    return f'{value:.{digits}f}'


def plot(records: Sequence[dict], rungs: Sequence[str], systems: Sequence[str]):
    """The ladder to the left, the systems over the number of steps to the right.

    Returns:
      A matplotlib figure.
    """
    distance = summarize(records, 'fd')
    steps = sorted({record['steps'] for record in records})
    figure = figures.Figure(figsize=(12, 4.6), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    colors = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00', '#000')

    def line(axes, cells, places, **style):
        found = [(p, distance[c]) for p, c in zip(places, cells) if c in distance]
        if found:
            x, values = zip(*found)
            mean, error, _ = zip(*values)
            axes.errorbar(
                x, mean, np.nan_to_num(error), marker='o', capsize=3, lw=1.8, **style
            )

    shown = [n for n in (1, 4) if n in steps] or steps[:2]
    for number, color in zip(shown, colors):
        line(
            left,
            [(rung, number) for rung in rungs],
            range(len(rungs)),
            color=color,
            label=f'{number} step{"s" * (number > 1)}',
        )
    left.set_xticks(range(len(rungs)), rungs, rotation=20, ha='right')
    left.set_title('The ladder: each rung adds one part')
    for system, color in zip((*systems, 'ism'), colors):
        line(right, [(system, n) for n in steps], steps, color=color, label=system)
    right.set_xscale('log', base=2)
    right.set_xticks(steps, [str(n) for n in steps])
    right.set_xlabel('sampling steps')
    right.set_title('The systems')
    for axes in (left, right):
        axes.set_yscale('log')
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter('{x:g}')
        axes.yaxis.set_minor_formatter('')
        axes.set_ylabel('Frechet distance (lower is better)')
        axes.grid(alpha=0.3, which='both')
        axes.spines[['top', 'right']].set_visible(False)
        if axes.get_legend_handles_labels()[0]:  # Only the other half was run.
            axes.legend(frameon=False)
    return figure


def write_summary(records: Sequence[dict], module, out: Path) -> str:
    """Writes the table beside `out` and returns it.

    The plot too, where there are rungs or systems to be drawn.
    """
    if not records:
        raise ValueError(f'{out} holds no records; run without --summary first')
    table = format_table(records, module.RECIPES)
    files.write_bytes(out.with_suffix('.md'), table.encode())
    if {record['recipe'] for record in records} & {*module.RUNGS, *module.SYSTEMS}:
        figure = plot(records, module.RUNGS, ('sm', *module.SYSTEMS))
        figure.savefig(out.with_suffix('.png'), dpi=110)
    return table


def run_flags():
    """Does what the command line says."""
    if FLAGS.run_folder:
        if FLAGS.cores:  # Before JAX counts them.
            os.sched_setaffinity(0, [int(core) for core in FLAGS.cores])
        folder = Path(FLAGS.run_folder)
        config = config_lib.from_json((folder / 'config.json').read_text())
        records = run_recipe(config, folder, folder.parent)
        scores.write_records(folder / 'records.json', records)
        return
    module = load_config_file(FLAGS.config)
    out = Path(FLAGS.out)
    if not FLAGS.summary:
        if FLAGS.parallel < 1:
            raise ValueError(f'--parallel {FLAGS.parallel} must be at least 1')
        failures = run_all(
            module,
            FLAGS.config,
            recipes=FLAGS.recipes or module.RECIPES,
            seeds=[int(seed) for seed in FLAGS.seeds],
            changes=FLAGS.set,
            workdir=Path(FLAGS.workdir),
            out=out,
            parallel=FLAGS.parallel,
            show=lambda line: print(line, flush=True),
        )
        for run, problem in failures.items():
            print(f'failed: {run}: {problem}')
    records = json.loads(out.read_text()) if out.exists() else []
    print(write_summary(records, module, out))
    written = [p for p in (out, *map(out.with_suffix, ('.md', '.png'))) if p.exists()]
    print(f'wrote {", ".join(map(str, written))}')
    if not FLAGS.summary and failures:
        sys.exit(1)


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_string('config', 'configs/ablation.py', 'Config file with RECIPES.')
    flags.DEFINE_list('recipes', [], 'Which; all of the config file by default.')
    flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of each recipe.')
    flags.DEFINE_multi_string('set', [], 'field=value, for every recipe.')
    flags.DEFINE_string('workdir', 'runs/ablation', 'Folder of the runs.')
    flags.DEFINE_string('out', 'results/ladder.json', 'The records.')
    flags.DEFINE_integer('parallel', 1, 'Runs at a time; they share the CPU cores.')
    flags.DEFINE_bool('summary', False, 'Only the table and the plot.')
    flags.DEFINE_string('run_folder', '', 'One run, of its config.json (internal).')
    flags.DEFINE_list('cores', [], 'CPU cores of that run (internal).')
    app.run(command_line.main(run_flags))
