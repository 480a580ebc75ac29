"""Recipes, their runs and their scores."""

from concurrent import futures
import functools
import json
import math
import os
from pathlib import Path
import subprocess
import sys

from ladder_records import ladder_records
import numpy as np
import pytest

from ism_jax import ablation, train
from ism_jax import config as config_lib
from ism_jax.data import array_source, sources
from ism_jax.evaluation.records import write_records

ROOT = Path(__file__).parent.parent
CONFIG = str(ROOT / 'configs' / 'ablation.py')


@pytest.fixture(scope='module')
def module():
    return ablation.load_config_file(Path(CONFIG))


def _changed(first, second):
    first, second = config_lib.flatten(first), config_lib.flatten(second)
    return {
        name
        for name in first.keys() | second.keys()
        if first.get(name) != second.get(name)
    }


@pytest.mark.parametrize(
    'before,after,fields',
    [
        ('+intrinsic_guidance', '+interval', {'objective.guidance_interval'}),
        ('+interval', '+wavelet', {'wavelet.enabled'}),
        ('+wavelet', '+sot', {'transport.enabled'}),
        ('+sot', 'ism', {'ema.twin'}),
        ('ism', 'ism-twin_ema', {'ema.twin'}),
        ('ism', 'ism-sot', {'transport.enabled'}),
        ('ism', 'ism-wavelet', {'wavelet.enabled'}),
        ('ism', 'ism-interval', {'objective.guidance_interval'}),
    ],
)
def test_a_rung_changes_only_its_part(module, before, after, fields):
    configs = [ablation.resolve(module, r, (), 0) for r in (before, after)]
    assert _changed(*configs) == fields


def test_the_second_ladder_changes_the_guidance_range_alone(module):
    recipes = ablation.all_recipes(module)
    assert recipes[: len(module.RECIPES)] == module.RECIPES
    assert len(set(recipes)) == len(recipes) == len(module.RECIPES) + 5
    for rung, changed in zip(module.RUNGS, module.CHANGED_RUNGS, strict=True):
        configs = [ablation.resolve(module, r, (), 0) for r in (rung, changed)]
        expected = {'objective.guidance_max'} if changed in recipes[-5:] else set()
        assert _changed(*configs) == expected
    largest = max(configs[1].sample.guidance)
    assert configs[1].objective.guidance_max == largest


def test_systems_share_data_and_budget(module):
    sm = ablation.resolve(module, 'sm', (), 0)
    first = ablation.resolve(module, '+intrinsic_guidance', (), 0)
    assert sm.objective.name == 'shortcut' and first.objective.name == 'ism'
    assert {f.split('.')[0] for f in _changed(sm, first)} == {
        'objective',
        'sample',
        'log',
    }
    without = ablation.resolve(module, 'ism-intrinsic_guidance', (), 0)
    balance = ablation.resolve(module, '+balance', (), 0)
    assert without.objective == balance.objective != sm.objective
    assert without.wavelet.enabled and without.transport.enabled and without.ema.twin
    for name in module.SYSTEMS:
        config = ablation.resolve(module, name, (), 0)
        assert config.objective.name == name
        assert not (config.wavelet.enabled or config.transport.enabled)
        for section in ('data', 'train', 'optimizer', 'scores'):  # The same for all.
            assert config[section] == sm[section]
        assert config.sample.steps == sm.sample.steps == (1, 2, 4, 8, 128)
    assert set(module.RECIPES) == {
        *config_lib.RUNGS,
        *config_lib.REMOVALS,
        'best',
        *module.SYSTEMS,
    }
    best = ablation.resolve(module, 'best', (), 0)
    assert {
        f.split('.')[0] for f in _changed(ablation.resolve(module, 'ism', (), 0), best)
    } == {'objective', 'model', 'wavelet'}


def test_a_recipe_changes_fields(module):
    config = ablation.resolve(
        module,
        'ism/transport.epsilon=0.5/objective.midpoint=online',
        ['train.steps=7', 'objective.batch_split=(4,2,2)', 'optimizer.warmup_steps=0'],
        3,
    )
    assert config.transport.epsilon == 0.5 and config.objective.midpoint == 'online'
    assert config.train.steps == 7 and config.objective.batch_split == (4, 2, 2)
    assert config.seed == 3


@pytest.mark.parametrize(
    'recipe,message',
    [
        ('sot', "recipe 'sot' is not one of sm, "),
        ('ism/transport.epsilom=1', 'did you mean transport.epsilon'),
        ('ism/transport.epsilon', 'write field=value'),
        ('ism/transport.epsilon=small', "epsilon = 'small' must be a float"),
        ('ism/train.steps=1.5', "train.steps = '1.5' must be a int"),
        ('ism/train.batch_size=30', 'multiple of 4'),
    ],
)
def test_bad_recipes_are_refused(module, recipe, message):
    with pytest.raises(ValueError, match=message):
        ablation.resolve(module, recipe, (), 0)


class FakeScorer:
    """FD by (steps, guidance); records its calls."""

    def __init__(self, distances):
        self.distances, self.calls = distances, []

    def __call__(self, params, *, steps, guidance, samples, noise_seed, **interval):
        self.calls.append((steps, guidance, noise_seed, *interval.values()))
        fd = self.distances[steps, guidance, *interval.values()]
        setting = {'steps': steps, 'guidance': guidance} | interval
        return setting | {'fd': fd, 'samples': samples}


def test_guidance_is_chosen_on_other_noise():
    scorer = FakeScorer(
        {
            (1, 0.0): 9.0,
            (1, 1.0): 5.0,
            (8, 0.0): 3.0,
            (8, 1.0): math.nan,
            (128, 0.0): 2.0,
            (128, 1.0): 1.0,
        }
    )
    records = ablation.score(
        scorer, None, steps=(1, 8, 128), guidance=(0.0, 1.0), samples=10, seed=4
    )
    # 128 steps use the choice of 8, which excludes NaN.
    assert [(r['steps'], r['guidance']) for r in records] == [(1, 1), (8, 0), (128, 0)]
    scored = [call for call in scorer.calls if call[2] == 4]
    choosing = [call for call in scorer.calls if call[2] != 4]
    assert [call[0] for call in scored] == [1, 8, 128]
    assert len(choosing) == 4 and {call[0] for call in choosing} == {1, 8}
    assert records[0]['chosen_from'] == {'0': 9.0, '1': 5.0}
    single = FakeScorer({(1, 0.5): 2.0})
    ablation.score(single, None, steps=(1,), guidance=(0.5,), samples=10, seed=0)
    assert single.calls == [(1, 0.5, 0)]  # Nothing to choose.


def test_the_interval_is_chosen_at_the_chosen_scale():
    whole, late = (0.0, 1.0), (0.25, 1.0)
    scorer = FakeScorer(
        {
            (1, 0.0): 9.0,
            (1, 1.0): 5.0,
            (1, 1.0, whole): 4.0,
            (1, 1.0, late): 3.0,
            (128, 1.0, late): 2.0,
        }
    )
    options = dict(guidance=(0.0, 1.0), intervals=(whole, late), samples=10, seed=4)
    first, last = ablation.score(scorer, None, steps=(1, 128), **options)
    assert first['interval'] == last['interval'] == late and first['fd'] == 3
    assert first['chosen_from'] == {'0': 9.0, '1': 5.0, '0 .. 1': 4.0, '0.25 .. 1': 3.0}


def test_the_summary_is_written_beside_the_records(module, tmp_path):
    table = ablation.write_summary(ladder_records(), module, tmp_path / 'ladder.json')
    lines = table.splitlines()
    assert [line.split('`')[1] for line in lines[2:]] == ['sm', 'ism', 'flow_matching']
    assert '| 22.0 ± 0.577 (50%) | 25.0 ± 0.577 (50%) | 3 | 1 | 2.00 |' in lines[2]
    assert (tmp_path / 'ladder.png').read_bytes()[:4] == b'\x89PNG'
    assert (tmp_path / 'ladder.md').read_text() == table
    with pytest.raises(ValueError, match='no records'):
        ablation.write_summary([], module, tmp_path / 'ladder.json')


def test_only_rungs_and_systems_are_plotted(module, tmp_path):
    records = [r | {'recipe': 'ism/ema.target_decay=0.99'} for r in ladder_records()]
    assert 'target_decay' in ablation.write_summary(
        records[:1], module, tmp_path / 'choices.json'
    )
    assert [p.name for p in tmp_path.iterdir()] == ['choices.md']


def test_config_files_without_recipes_are_refused(tmp_path):
    (tmp_path / 'other.py').write_text('')
    for name in ('other.py', 'missing.py'):
        with pytest.raises(ValueError, match=f'{name} is not a Python file with REC'):
            ablation.load_config_file(tmp_path / name)


def test_records_of_another_config_do_not_count_as_finished(tmp_path):
    run = ('sm', 0)
    folder = ablation.run_folder(tmp_path, run)
    ablation.prepare_folder(folder, 'old')
    (folder / 'records.json').write_text('[{"fd": 1}]')
    assert ablation.finished_records(tmp_path, run, 'old') == [{'fd': 1}]
    assert ablation.finished_records(tmp_path, run, 'new') is None
    ablation.prepare_folder(folder, 'new')
    assert ablation.finished_records(tmp_path, run, 'new') is None


@pytest.mark.skipif(
    not hasattr(os, 'sched_getaffinity') or len(os.sched_getaffinity(0)) < 2,
    reason='needs two CPU cores that a process can choose',
)
def test_parallel_runs_have_their_own_cores():
    code = 'import os, time; print(*os.sched_getaffinity(0)); time.sleep(0.5)'

    def cores(_):
        out = subprocess.run([sys.executable, '-c', code], capture_output=True)
        return {int(core) for core in out.stdout.split()}

    every = os.sched_getaffinity(0)
    with futures.ThreadPoolExecutor(
        2, initializer=ablation.pin_thread, initargs=(iter(range(2)), 2)
    ) as pool:
        first, second = pool.map(cores, range(2))
    assert first and second and not first & second and first | second == every
    assert os.sched_getaffinity(0) == every


TINY = f"""
import importlib.util
spec = importlib.util.spec_from_file_location('ablation', {CONFIG!r})
full = importlib.util.module_from_spec(spec)
spec.loader.exec_module(full)
RECIPES = ('sm', 'flow_matching')
RUNGS, SYSTEMS = RECIPES, {{}}


def get_config(arg=''):
    c = full.get_config(arg + ',runlocal')
    c.sample.steps = (1, 2)
    return c
"""


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """A folder of runs, which share a classifier."""
    return tmp_path_factory.mktemp('runs')


def test_finished_runs_are_kept_and_failures_are_reported(tmp_path, workdir):
    config = tmp_path / 'tiny.py'
    config.write_text(TINY)
    lines = []

    def run_all(recipes):
        return ablation.run_all(
            ablation.load_config_file(config),
            config,
            recipes=recipes,
            seeds=[0],
            changes=['train.max_skipped_in_row=1'],
            workdir=workdir,
            out=tmp_path / 'out.json',
            parallel=2,
            log=lines.append,
        )

    diverges = 'flow_matching/optimizer.learning_rate=1e38'
    failures = run_all([diverges, 'sm'])
    assert list(failures) == [f'{diverges}, seed 0']
    assert 'not finite' in failures[f'{diverges}, seed 0']
    records = json.loads((tmp_path / 'out.json').read_text())
    assert [(r['recipe'], r['steps']) for r in records] == [('sm', 1), ('sm', 2)]
    wanted = {
        'recipe',
        'seed',
        'steps',
        'guidance',
        'fd',
        'accuracy',
        'command',
        'hardware',
        'commit',
    }
    assert wanted <= records[0].keys()
    assert records[0]['guidance'] == 0.5  # Part of SM's training.
    assert records[0]['trained_steps'] == 20 and records[0]['train_minutes'] > 0
    assert records[0]['step_gflop'] > 0
    assert [record['network_calls'] for record in records] == [1, 2]

    # The classifier stays beside the records.
    (kept,) = tmp_path.glob('classifier-*.npz')
    assert kept.read_bytes() == (workdir / kept.name).read_bytes()

    # Finished runs do not run again, and their records stay.
    before = (workdir / 'sm_seed0' / 'log.txt').stat().st_mtime
    assert not run_all(['sm'])
    assert '1 of 1 runs are finished' in lines
    assert (workdir / 'sm_seed0' / 'log.txt').stat().st_mtime == before
    assert json.loads((tmp_path / 'out.json').read_text()) == records


def test_the_classifier_of_earlier_records_scores_new_runs(tmp_path):
    records, runs = tmp_path / 'results', tmp_path / 'runs'
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 1), np.uint8)
    source = array_source.ArraySource('noise', images, np.arange(40) % 2, ['a', 'b'])
    lines = []
    for workdir in (runs, tmp_path / 'other_runs'):
        ablation.share_classifier(source, workdir, records, lines.append)
    assert sum('training on' in line for line in lines) == 1
    (kept,) = records.glob('*')
    assert 'other_runs' in lines[-1] and kept.name in lines[-1]


SEARCHED = (
    TINY
    + """
SEARCH_BASE = 'flow_matching'
SEARCH = {'weight decay': ('', 'optimizer.weight_decay=0.1')}
"""
)


@pytest.fixture
def search(tmp_path):
    """A search of two candidates; returns the best and the messages."""
    config = tmp_path / 'tiny.py'
    config.write_text(SEARCHED)

    def run(rungs, workdir=tmp_path / 'runs'):
        lines = []
        best = ablation.search(
            ablation.load_config_file(config),
            config,
            candidates=2,
            search_seed=0,
            rungs=rungs,
            keep=0.5,
            changes=['optimizer.warmup_steps=0', 'log.grid_every=0'],
            workdir=workdir,
            out=tmp_path / 'search.json',
            parallel=1,
            log=lines.append,
        )
        return best, lines

    return run


def test_a_search_continues_after_an_interruption(search, tmp_path, monkeypatch):
    ran, interrupt_at = [], 3

    def run_recipe(folder):
        ran.append(folder.name)
        if len(ran) == interrupt_at:
            raise KeyboardInterrupt
        config = json.loads((folder / 'config.json').read_text())
        fd = 1.0 if config['optimizer']['weight_decay'] else 4.0
        record = {'fd': fd, 'accuracy': 0.5, 'trained_steps': 1}
        records = [record | {'steps': steps} for steps in (1, 2)]
        (folder / 'records.json').write_text(json.dumps(records))
        return records, '', 1.0

    monkeypatch.setattr(ablation, 'SampleScorer', lambda *args, **options: None)
    monkeypatch.setattr(ablation, 'run_recipe', run_recipe)
    rungs = [(2, 1), (4, 2)]
    with pytest.raises(KeyboardInterrupt):
        search(rungs)
    best, lines = search(rungs)
    changed = 'flow_matching/optimizer.weight_decay=0.1'
    assert best == changed
    name = changed.replace('/', '__')
    assert ran == [
        'flow_matching__train.steps=2_seed0',
        f'{name}__train.steps=2_seed0',
        f'{name}__train.steps=4_seed0',  # Interrupted.
        f'{name}__train.steps=4_seed0',
        f'{name}__train.steps=4_seed1',
    ]
    assert '2 of 2 runs are finished' in lines and '0 of 2 runs are finished' in lines
    records = json.loads((tmp_path / 'search.json').read_text())
    assert {(r['recipe'], r['seed']) for r in records} == {
        ('flow_matching/train.steps=2', 0),
        (f'{changed}/train.steps=2', 0),
        (f'{changed}/train.steps=4', 0),
        (f'{changed}/train.steps=4', 1),
    }
    table = (tmp_path / 'search.md').read_text()
    assert search(rungs)[0] == best and len(ran) == 5
    assert (tmp_path / 'search.md').read_text() == table


def test_a_search_trains_and_scores(search, tmp_path, workdir, monkeypatch):
    """In this process and with data read once, because processes start slowly."""
    load = functools.cache(sources.make_source)
    monkeypatch.setattr(sources, 'make_source', load)

    def run_recipe(folder):
        config = config_lib.from_json((folder / 'config.json').read_text())
        train.train(config, folder)
        records = ablation.score_run(folder, 0.0)
        write_records(folder / 'records.json', records)
        return records, '', 0.0

    monkeypatch.setattr(ablation, 'run_recipe', run_recipe)
    best, _ = search([(2, 1), (4, 1)], workdir)
    records = json.loads((tmp_path / 'search.json').read_text())
    assert len(records) == 3 * 2  # Runs and numbers of steps.
    trained = {r['recipe']: r['trained_steps'] for r in records}
    assert trained == {
        'flow_matching/train.steps=2': 2,
        'flow_matching/optimizer.weight_decay=0.1/train.steps=2': 2,
        f'{best}/train.steps=4': 4,
    }
    first, second = (tmp_path / 'search.md').read_text().split('## ')[1:]
    assert first.startswith('FLOPs of 2 steps of `flow_matching`')
    rows = [row.strip('| ').split(' | ') for row in first.splitlines()[4:6]]
    assert rows[0][0] == f'`{best}`'
    for candidate, score, *_, seeds, steps, _, kept in rows:
        name = f'{candidate.strip("`")}/train.steps=2'
        fds = [r['fd'] for r in records if r['recipe'] == name]
        assert float(score) == pytest.approx(math.sqrt(math.prod(fds)), rel=1e-2)
        assert (seeds, steps) == ('1 of 1', '2')
        assert kept == ('yes' if candidate == f'`{best}`' else 'no')
    assert second.count('| yes |') == 1 and '| 1 of 1 | 4 |' in second


def test_every_option_of_the_search_is_valid_alone(module):
    for options in module.SEARCH.values():
        assert options[0] == '' and len(set(options)) == len(options) > 1
        for option in options[1:]:
            config = ablation.resolve(module, f'{module.SEARCH_BASE}/{option}', (), 0)
            assert config != ablation.resolve(module, module.SEARCH_BASE, (), 0)


def test_long_recipes_have_short_folder_names(tmp_path):
    changes = '/'.join(f'objective.loss_weights=(1.0,1.0,{i})' for i in range(9))
    runs = [(f'ism/{changes}/train.steps={steps}', 0) for steps in (1, 2)]
    folders = [ablation.run_folder(tmp_path, run) for run in runs]
    assert folders[0] != folders[1] and len(runs[0][0]) > 255
    for folder in folders:
        assert len(folder.name) < 255 and folder.name.endswith('_seed0')
    assert ablation.run_folder(tmp_path, ('ism/a=1', 2)).name == 'ism__a=1_seed2'
