r"""Trains recipes with several seeds and compares them.

    python -m ism_jax.ablation --config configs/ablation.py --out results/ladder.json

Trains and scores every recipe of the config file (its `RECIPES`, and `CHANGED_RUNGS` if
it has them) with every seed, each in separate processes. If a run fails, it is reported
and the others continue. The same command resumes: finished runs are kept, unfinished
ones resume from their last checkpoint.

    --recipes sm,ism,ism/transport.epsilon=0.02/ema.target_decay=0.99

selects recipes, with changed fields after slashes (in double quotes if a value has a
comma). `--set train.steps=500` changes a field of all recipes. With `--equal_flops ism`
every recipe trains with as many FLOPs as that one, in fewer steps if its step has more
(by `ism_jax.cost`: teacher calls and Jacobian-vector products count).

The scores are the Frechet distance and accuracy by the small classifier of
`ism_jax.train`. If a method offers a range of guidance scales, each number of steps up
to 8 uses the scale of `sample.guidance` with the lowest Frechet distance on other
samples, at most 1,000; more steps use the scale of the last of these. The score is then
computed with different noise. If the network is conditioned on the guidance interval,
that is chosen in the same way, at the chosen scale.

Writes `--out`, a JSON list of all records, with the table (`.md`), the plot (`.png`)
and the classifier beside it. A classifier that is there scores the next runs, too: only
then can they be compared. `--summary` only rewrites the table and the plot.

    python -m ism_jax.ablation --config configs/ablation.py --search \
        --candidates 27 --rungs 750x1,1500x1,3000x3 --keep 0.33

searches for recipes by successive halving. The candidates are the config file's
`SEARCH_BASE` and random combinations of the options of its `SEARCH`, drawn by
`--search_seed`. Each rung, STEPSxSEEDS, trains the remaining candidates and keeps the
share `--keep` with the lowest scores. The score is the geometric mean of the Frechet
distances over all numbers of steps in `sample.steps`, averaged over seeds; candidates
with a failed or diverged run rank last and are never kept.

Candidates of a rung have equal FLOPs: `SEARCH_BASE` trains for STEPS, and a candidate
whose step has r times the FLOPs (by `ism_jax.cost`) for STEPS / r. The tables of the
rungs are written beside `--out`, by default `results/search.json`. The same command
resumes.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
import hashlib
import importlib.util
import json
import os
from pathlib import Path
import shlex
import subprocess
import sys
import time

from absl import flags
import numpy as np

from ism_jax import config as config_lib
from ism_jax import config_check, cost, recipe_search, resolved_config, trained_network
from ism_jax.evaluation import ladder
from ism_jax.evaluation.records import write_records
from ism_jax.evaluation.sample_scorer import SampleScorer
from ism_jax.experiment import make_source
from ism_jax.runtime import command_line, files, paths, provenance

# The largest number of steps with its own guidance scale.
MAX_STEPS_WITH_CHOICE = 8
# Guidance intervals to choose from, for networks that are conditioned on them.
INTERVALS = ((0.0, 1.0), (0.25, 1.0), (0.0, 0.75), (0.25, 0.75))
# Added to a run's seed for the noise of the samples that choose the guidance scale.
CHOICE_SEED = 10_000
# These samples are at most as many.
MAX_CHOICE_SAMPLES = 1000
# Longest name of a run's folder without its seed; file systems allow 255 bytes.
MAX_FOLDER_NAME = 240

Run = tuple[str, int]  # Recipe and seed.


def load_config_file(path: Path):
    """The module of a config file.

    Raises:
      ValueError: there is no such file, or it has no `RECIPES`.
    """
    module = None
    if path.is_file():
        spec = importlib.util.spec_from_file_location('ablation_config', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    if not hasattr(module, 'RECIPES'):
        raise ValueError(
            f'--config {path} is not a Python file with RECIPES, the names that its '
            'get_config takes; give one such as configs/ablation.py'
        )
    return module


def all_recipes(module) -> tuple[str, ...]:
    """`RECIPES` of a config file and its `CHANGED_RUNGS`."""
    return tuple(dict.fromkeys((*module.RECIPES, *changed_rungs(module))))


def changed_rungs(module) -> tuple[str, ...]:
    """`CHANGED_RUNGS` of a config file, recipes such as 'ism/x=y', or ()."""
    return getattr(module, 'CHANGED_RUNGS', ())


def resolve(module, recipe: str, changes: Sequence[str], seed: int):
    """The config of a run.

    Args:
      module: from `load_config_file`.
      recipe: such as 'ism/transport.epsilon=0.02'.
      changes: 'field=value', for every recipe.
      seed: seed of the run.

    Raises:
      ValueError: an unknown recipe or field, or an invalid config.
    """
    name, *own = recipe.split('/')
    config = module.get_config(name)
    for change in (*changes, *own):
        config_lib.set_field(config, change)
    config.seed = seed
    config_check.validate(config)
    return config


def run_all(
    module,
    config_path: Path,
    *,
    recipes: Sequence[str],
    seeds: Sequence[int],
    changes: Sequence[str],
    workdir: Path,
    out: Path,
    parallel: int,
    log=print,
) -> dict[str, str]:
    """Runs all unfinished runs; updates `out` after each.

    Seeds are the outer loop, so that a table of all recipes is complete early.

    Args:
      module: from `load_config_file`.
      config_path: its path, for the command in the records.
      recipes, seeds, changes: see `resolve`; every recipe runs with every seed.
      workdir: folder of the runs' folders.
      out: JSON file of all records.
      parallel: number of runs at a time.
      log: called with progress messages.

    Returns:
      {run: error} of the runs that failed.
    """
    runs = [(recipe, seed) for seed in seeds for recipe in recipes]
    configs = {run: resolve(module, run[0], changes, run[1]) for run in runs}
    texts = {run: config_lib.to_json(config) for run, config in configs.items()}
    # Recipes that resolve to the same config run once.
    originals = {}
    for run, text in texts.items():
        originals.setdefault(text, run)
    results = {}
    for text, run in originals.items():
        if (records := finished_records(workdir, run, text)) is not None:
            results[run] = records
    waiting = [run for run in originals.values() if run not in results]
    log(f'{len(results)} of {len(originals)} runs are finished')
    if waiting:
        share_classifier(make_source(configs[waiting[0]]), workdir, out.parent, log)
    for run in waiting:
        prepare_folder(run_folder(workdir, run), texts[run])

    def update_out():
        named = {run: results.get(originals[text]) for run, text in texts.items()}
        named = {run: records for run, records in named.items() if records}
        commands = {run: command_of(config_path, run, changes) for run in named}
        update_records(out, named, commands)

    failures = {}
    for run, records, error in run_processes(workdir, waiting, parallel, log):
        if error:
            failures[f'{run[0]}, seed {run[1]}'] = error
        else:
            results[run] = records
            update_out()
    update_out()
    return failures


def share_classifier(source, workdir: Path, folder: Path, log) -> None:
    """Puts the classifier that scores all runs into `workdir`, and beside the records.

    Trained on another processor it has other weights and other scores, so the one of
    earlier records is used again. A new one is trained here, once.

    Args:
      source: the real images.
      workdir: folder of the runs' folders.
      folder: folder of the records.
      log: called with progress messages.
    """
    copy_classifiers(folder, workdir)
    SampleScorer(source, None, cache_dir=workdir, seed=0, samples=2, log=log)
    copy_classifiers(workdir, folder)


def copy_classifiers(source: Path, target: Path) -> None:
    """Copies the classifiers that `target` lacks; their names tell their images."""
    for path in source.glob('classifier-*.npz'):
        if not (target / path.name).exists():
            files.write_bytes(target / path.name, path.read_bytes())


def run_folder(workdir: Path, run: Run) -> Path:
    """The folder of a run."""
    recipe, seed = run
    name = recipe.replace('/', '__')
    if len(name) > MAX_FOLDER_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        name = f'{name[: MAX_FOLDER_NAME - 17]}_{digest}'
    return workdir / f'{name}_seed{seed}'


def finished_records(workdir: Path, run: Run, text: str) -> list[dict] | None:
    """The records of a run, or None if it is not finished with this config."""
    config, records = (
        run_folder(workdir, run) / name for name in ('config.json', 'records.json')
    )
    if not records.exists() or not config.exists() or config.read_text() != text:
        return None
    return json.loads(records.read_text())


def prepare_folder(folder: Path, text: str) -> None:
    """Writes the config of a run that is not finished."""
    # Otherwise records of another config would count as those of this one.
    (folder / 'records.json').unlink(missing_ok=True)
    files.write_bytes(folder / 'config.json', text.encode())


def command_of(config_path: Path, run: Run, changes: Sequence[str]) -> str:
    """The command that repeats a run."""
    recipe, seed = run
    if ',' in recipe:  # Quoted, because --recipes is a list.
        recipe = f'"{recipe}"'
    parts = ['python', '-m', 'ism_jax.ablation', '--config', str(config_path)]
    parts += ['--recipes', recipe, '--seeds', str(seed)]
    return shlex.join([*parts, *(f'--set={change}' for change in changes)])


def run_processes(
    workdir: Path, runs: Sequence[Run], parallel: int, log
) -> Iterator[tuple[Run, list[dict], str]]:
    """Yields each run as it ends, with its records, and its error or ''."""
    started = time.time()
    pool = futures.ThreadPoolExecutor(
        parallel, initializer=pin_thread, initargs=(iter(range(parallel)), parallel)
    )
    pending = {pool.submit(run_recipe, run_folder(workdir, r)): r for r in runs}
    try:
        for done, future in enumerate(futures.as_completed(pending), start=1):
            run, (records, error, minutes) = pending[future], future.result()
            left = (time.time() - started) / done * (len(runs) - done) / 60
            distances = (
                f'{r["steps"]}: {ladder.format_number(r["fd"])}' for r in records
            )
            outcome = f'FD by steps {", ".join(distances)}'
            log(
                f'{run[0]}, seed {run[1]}: {minutes:.1f} min; '
                + (f'FAILED: {error}' if error else outcome)
                + f' (about {left:.0f} min left)'
            )
            yield run, records, error
    finally:
        # After Ctrl-C the processes save their state and end; no others start.
        pool.shutdown(cancel_futures=True)


def pin_thread(slots: Iterator[int], parallel: int) -> None:
    """Pins this thread, and the processes that it starts, to its share of the cores."""
    if parallel > 1 and hasattr(os, 'sched_setaffinity'):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[next(slots) % len(cores) :: parallel])


def run_recipe(folder: Path) -> tuple[list[dict], str, float]:
    """Trains and scores the run of a folder, each in a process.

    Args:
      folder: folder of the run, with its config in `config.json`.

    Returns:
      Records, an error in one line or '', and minutes.
    """
    started = time.time()
    minutes = lambda: (time.time() - started) / 60
    config = f'{resolved_config.__file__}:{folder / "config.json"}'
    options = (f'--config={config}', f'--workdir={folder}', '--distributed=off')
    error = run_process(folder, 'ism_jax.train', *options)
    if not error:
        options = (f'--run_folder={folder}', f'--train_minutes={minutes()}')
        error = run_process(folder, 'ism_jax.ablation', *options)
    path = folder / 'records.json'
    return [] if error else json.loads(path.read_text()), error, minutes()


def run_process(folder: Path, module: str, *options: str) -> str:
    """Runs a command; appends to the folder's log and returns its error or ''."""
    log = folder / 'log.txt'
    environment = {
        # Runs of a recipe with other seeds compile the same programs.
        'JAX_COMPILATION_CACHE_DIR': str(folder.parent / 'compiled'),
        # Otherwise an error could precede earlier output in the log.
        'PYTHONUNBUFFERED': '1',
    }
    with log.open('a') as output:
        process = subprocess.run(
            [sys.executable, '-m', module, *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment | os.environ,
        )
    if process.returncode == 0:
        return ''
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    last = lines[-1] if lines else f'exit status {process.returncode}'
    return f'{last} (see {log})'


def score_run(folder: Path, train_minutes: float) -> list[dict]:
    """Scores the inference EMA of a trained run; one record per number of steps."""
    run = trained_network.load(folder)
    # All runs, at any seed, share the real images and the classifier.
    experiment = run.experiment()
    sampler, source = experiment.make_sampler(), make_source(run.config)
    samples = run.config.scores.samples
    scorer = SampleScorer(
        source, sampler, cache_dir=folder.parent, seed=0, samples=samples
    )
    started = time.time()
    records = score(
        scorer,
        run.params,
        steps=run.config.sample.steps,
        guidance=run.config.sample.guidance,
        intervals=INTERVALS if experiment.objective.conditions_on_interval else (),
        samples=samples,
        seed=run.config.seed,
    )
    about = {
        'real_fd': scorer.floor['fd'],
        'real_accuracy': scorer.floor['accuracy'],
        'real_samples': scorer.floor['samples'],
        'trained_steps': run.step,
        'step_gflop': cost.step_flops(experiment) / 1e9,
        'train_minutes': train_minutes,
        'score_minutes': (time.time() - started) / 60,
        **provenance.environment(),
    }
    calls = experiment.objective.network_calls
    return [
        record | {'network_calls': calls(record['steps'], record['guidance'])} | about
        for record in records
    ]


def score(
    scorer,
    params,
    *,
    steps: Sequence[int],
    guidance: Sequence[float],
    intervals: Sequence[tuple[float, float]] = (),
    samples: int,
    seed: int,
) -> list[dict]:
    """One record for each number of steps, at the guidance chosen for it.

    Args:
      scorer: a `SampleScorer`.
      params: inference EMA parameters.
      steps: numbers of sampling steps.
      guidance: guidance scales w to choose from; see the module for the rule.
      intervals: guidance intervals to choose from; () for the method's own.
      samples: number of samples of each score.
      seed: seed of the run.

    Returns:
      Records, where `chosen_from` maps guidance scales to Frechet distances.
    """
    records, distances = [], {}
    chosen = {'guidance': guidance[0]}

    def score_with(number, noise_seed, **setting):
        setting = dict(steps=number, samples=samples) | chosen | setting
        return scorer(params, **setting, noise_seed=noise_seed)

    def choose(number, name, values):
        """Sets the value with the lowest distance; returns all distances."""
        distances = {
            value: score_with(
                number,
                CHOICE_SEED + seed,
                samples=min(samples, MAX_CHOICE_SAMPLES),
                **{name: value},
            )['fd']
            for value in values
        }
        # NaN, from samples that diverged, is never chosen.
        chosen[name] = min(
            values, key=lambda value: np.nan_to_num(distances[value], nan=np.inf)
        )
        return distances

    for number in sorted(steps):
        if len(guidance) > 1 and number <= MAX_STEPS_WITH_CHOICE:
            tried = choose(number, 'guidance', guidance)
            distances = {f'{w:g}': fd for w, fd in tried.items()}
            if intervals:
                tried = choose(number, 'interval', intervals)
                distances |= {f'{a:g} .. {b:g}': fd for (a, b), fd in tried.items()}
        records.append(score_with(number, seed) | {'chosen_from': distances})
    return records


def update_records(
    out: Path, results: Mapping[Run, Sequence[dict]], commands: Mapping[Run, str]
) -> None:
    """Writes the runs' records to `out`, where they replace older ones."""
    earlier = json.loads(out.read_text()) if out.exists() else []
    records = [r for r in earlier if (r['recipe'], r['seed']) not in results]
    for (recipe, seed), new in results.items():
        command = {'command': commands[recipe, seed]}
        records += [{'recipe': recipe, 'seed': seed} | r | command for r in new]
    order = lambda record: (record['recipe'], record['seed'], record['steps'])
    write_records(out, sorted(records, key=order))


def write_summary(records: Sequence[dict], module, out: Path) -> str:
    """Writes the table beside `out` and returns it.

    Writes the plot too, if a rung of the ladder or a system is among the records.

    Raises:
      ValueError: there are no records.
    """
    if not records:
        raise ValueError(f'{out} has no records; finish a run without --summary first')
    table = ladder.format_table(records, all_recipes(module))
    files.write_bytes(out.with_suffix('.md'), table.encode())
    if {record['recipe'] for record in records} & {*module.RUNGS, *module.SYSTEMS}:
        systems = 'sm', 'best', *module.SYSTEMS
        figure = ladder.plot(records, module.RUNGS, systems, changed_rungs(module))
        figure.savefig(out.with_suffix('.png'), dpi=110)
    return table


def search(
    module,
    config_path: Path,
    *,
    candidates: int,
    search_seed: int,
    rungs: Sequence[tuple[int, int]],
    keep: float,
    **options,
) -> str | None:
    """Searches the config file's `SEARCH`; writes the table beside `out` in each rung.

    Args:
      module, config_path: see `run_all`.
      candidates: number of recipes to draw.
      search_seed: seed of the draw.
      rungs, keep: see `recipe_search.halve`.
      **options: `changes`, `workdir`, `out`, `parallel` and `log` of `run_all`.

    Returns:
      The best recipe, or None if all candidates of a rung failed.
    """
    changes, workdir, out, log = (
        options[name] for name in ('changes', 'workdir', 'out', 'log')
    )
    resolve_run = lambda recipe, seed=0: resolve(module, recipe, changes, seed)
    flops = recipe_search.draw_candidates(
        module.SEARCH,
        base=module.SEARCH_BASE,
        number=candidates,
        seed=search_seed,
        steps=rungs[0][0],
        resolve=resolve_run,
        log=log,
    )
    log(f'{len(flops)} candidates')

    def train(recipes, num_seeds):
        seeds = range(num_seeds)
        run_all(module, config_path, recipes=recipes, seeds=seeds, **options)
        texts = {
            (recipe, seed): config_lib.to_json(resolve_run(recipe, seed))
            for recipe in recipes
            for seed in seeds
        }
        finished = lambda run: finished_records(workdir, run, texts[run])
        return {r: [finished((r, seed)) for seed in seeds] for r in recipes}

    tables, kept = [], []
    halving = recipe_search.halve(flops, rungs=rungs, keep=keep, train=train)
    for number, (ranked, kept) in enumerate(halving):
        title = f'## FLOPs of {rungs[number][0]} steps of `{module.SEARCH_BASE}`'
        tables.append(f'{title}\n\n{recipe_search.format_rung(ranked, kept)}')
        files.write_bytes(out.with_suffix('.md'), '\n'.join(tables).encode())
        log(tables[-1])
    return kept[0] if kept else None


def run_search(module, path: Path, **options) -> None:
    """Runs the command with `--search`; `options` are those of `run_all`."""
    for name in ('recipes', 'seeds', 'summary'):
        if FLAGS[name].present:
            raise ValueError(
                f'--{name} does not apply to --search: SEARCH in --config has the '
                'recipes, --rungs the seeds, and the same command rewrites the table'
            )
    if not hasattr(module, 'SEARCH') or not hasattr(module, 'SEARCH_BASE'):
        raise ValueError(
            f'--config {path} has no SEARCH and SEARCH_BASE for --search; '
            'configs/ablation.py shows both'
        )
    best = search(
        module,
        path,
        candidates=FLAGS.candidates,
        search_seed=FLAGS.search_seed,
        rungs=recipe_search.parse_rungs(FLAGS.rungs),
        keep=FLAGS.keep,
        **options,
    )
    out = options['out']
    print(f'wrote {out}, {out.with_suffix(".md")}')
    if best is None:
        print('all candidates failed; the lines with FAILED have the reasons')
        sys.exit(1)
    print(f'best: {best}')


def run_flags() -> None:
    """Runs the command."""
    if FLAGS.run_folder:
        folder = Path(FLAGS.run_folder)
        write_records(folder / 'records.json', score_run(folder, FLAGS.train_minutes))
        return
    path = paths.local_path(FLAGS.config, '--config')
    module = load_config_file(path)
    default_out = 'results/search.json' if FLAGS.search else 'results/ladder.json'
    out = paths.local_path(FLAGS.out or default_out, '--out')
    options = dict(
        changes=FLAGS.set,
        workdir=paths.local_path(FLAGS.workdir, '--workdir'),
        out=out,
        parallel=FLAGS.parallel,
        log=lambda line: print(line, flush=True),
    )
    if FLAGS.search:
        return run_search(module, path, **options)
    failures = {}
    if not FLAGS.summary:
        recipes = FLAGS.recipes or all_recipes(module)
        if FLAGS.equal_flops:
            resolve_recipe = lambda recipe: resolve(module, recipe, FLAGS.set, 0)
            recipes = recipe_search.with_equal_flops(
                recipes, FLAGS.equal_flops, resolve_recipe
            )
        failures = run_all(
            module,
            path,
            recipes=recipes,
            seeds=command_line.parse_numbers(FLAGS.seeds, int),
            **options,
        )
    for run, error in failures.items():
        print(f'failed: {run}: {error}')
    records = json.loads(out.read_text()) if out.exists() else []
    print(write_summary(records, module, out))
    written = [p for p in (out, *map(out.with_suffix, ('.md', '.png'))) if p.exists()]
    print(f'wrote {", ".join(map(str, written))}')
    if failures:
        sys.exit(1)


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_string('config', 'configs/ablation.py', 'Config file with RECIPES.')
    flags.DEFINE_list('recipes', [], 'Recipes; all of the config file by default.')
    flags.DEFINE_string(
        'equal_flops', '', 'Recipe whose training FLOPs every recipe has.'
    )
    flags.DEFINE_string('seeds', '0,1,2', 'Seeds of each recipe.')
    flags.DEFINE_multi_string('set', [], 'field=value, for every recipe.')
    flags.DEFINE_string('workdir', 'runs/ablation', 'Folder of the runs.')
    flags.DEFINE_string(
        'out',
        '',
        'JSON file of all records; by default results/ladder.json, or '
        'results/search.json with --search.',
    )
    flags.DEFINE_integer(
        'parallel', 1, 'Runs at a time; they share the CPU cores.', lower_bound=1
    )
    flags.DEFINE_bool('summary', False, 'Only rewrite the table and the plot.')
    flags.DEFINE_bool('search', False, "Search the config file's SEARCH.")
    flags.DEFINE_integer(
        'candidates', 27, 'Recipes that --search draws.', lower_bound=1
    )
    flags.DEFINE_integer('search_seed', 0, 'Seed of the draw.', lower_bound=0)
    flags.DEFINE_string(
        'rungs', '750x1,1500x1,3000x3', 'STEPSxSEEDS of each rung of the search.'
    )
    flags.DEFINE_float(
        'keep',
        0.33,
        'Share of the candidates that a rung keeps.',
        lower_bound=0.0,
        upper_bound=1.0,
    )
    flags.DEFINE_string('run_folder', '', 'Only score this trained run (internal).')
    flags.DEFINE_float('train_minutes', 0.0, 'Training time of that run (internal).')
    command_line.run(run_flags)
