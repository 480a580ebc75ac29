"""The writers of records: the same calls, read back from each one's files."""

import importlib.util
import json
import math
import struct
import sys

import jax
import numpy as np
import pytest

from ism_jax.runtime import provenance
from ism_jax.training import progress, writers

CONFIG = {'model.depth': 3, 'log.grid_steps': (1, 4), 'data.dir': '', 'data.flip': True}
SCALARS = {'loss': 0.5, 'velocity/loss': 0.25}


def _write(name, workdir, config, step=5):
    """Opens a writer and makes each call, as a run does."""
    (writer,) = writers.open_writers(name, workdir, config)
    report = progress.Progress(
        workdir, [writer], batch_size=4, num_steps=9, first_step=0
    )
    report.step({name: np.float32(v) for name, v in SCALARS.items()} | {'skipped': 0})
    report.log(step, {})
    report.picture(step, 'samples_1_steps', np.zeros((2, 8, 8, 1), np.float32), 2)
    report.close()


def test_json_lines(tmp_path):
    _write('jsonl', tmp_path, CONFIG)
    path = tmp_path / 'records.jsonl'
    about, scalars, picture = map(json.loads, path.read_text().splitlines())
    assert about['config'] == CONFIG | {'log.grid_steps': [1, 4]}
    assert about['commit'] == provenance.commit()
    assert scalars['step'] == 5 and SCALARS.items() <= scalars.items()
    assert scalars['images_per_second'] > 0
    assert picture['step'] == 5
    assert (tmp_path / 'grids' / picture['picture']).is_file()
    # A killed run leaves part of a line, a diverged one values that JSON lacks.
    whole = path.read_text()
    path.write_text(whole + '{"time": 17')
    (writer,) = writers.open_writers('jsonl', tmp_path, CONFIG)
    writer.scalars(6, {'loss': math.nan, 'norm': math.inf})
    # Not closed: what a killed run has written is there.
    *old, _, last = path.read_text().splitlines()
    assert old == whole.splitlines()
    values = json.loads(last, parse_constant=pytest.fail)
    assert (values['step'], values['loss'], values['norm']) == (6, None, None)
    writer.close()


def _wandb_records(path):
    """The records of an offline run, as `wandb sync` reads them."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    assert len(content) < 2**15  # One block.
    position = 7
    while position < len(content):
        _, size, _ = struct.unpack_from('<IHB', content, position)
        position += 7 + size
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content[position - size : position])
        yield record


def test_a_run_writes_them_all(small_run):
    """With what a coupling reports; see the fixture for its writers."""
    lines = (small_run / 'records.jsonl').read_text().splitlines()
    about, *logs = map(json.loads, lines)
    assert about['config']['log.writer'] == 'tensorboard,jsonl'
    assert [log['step'] for log in logs] == [3, 6]
    assert all(log['transport/cost_ratio'] > 0 for log in logs)
    assert list((small_run / 'tensorboard').iterdir())


def test_wandb_offline(tmp_path, monkeypatch):
    if importlib.util.find_spec('wandb') is None:
        pytest.skip('wandb is not installed')
    import wandb

    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_PROJECT', 'of the test')
    workdir = tmp_path / 'mine'
    workdir.mkdir()
    _write('wandb', workdir, CONFIG)
    _write('wandb', workdir, CONFIG | {'model.depth': 4}, step=3)  # Resumed.
    wandb.teardown()  # As at the end of the process; it completes the files.
    runs, config, history = set(), {}, []
    files = sorted(workdir.glob('wandb/offline-run-*/*.wandb'))
    assert len(files) == 2
    for record in (record for path in files for record in _wandb_records(path)):
        runs.add((record.run.run_id, record.run.display_name, record.run.project))
        for item in (*record.run.config.update, *record.config.update):
            config[item.key or '.'.join(item.nested_key)] = json.loads(item.value_json)
        if record.HasField('history'):
            history.append(
                {
                    item.key or '.'.join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
            )
    (run,) = runs - {('', '', '')}
    assert run == ((workdir / 'wandb_run.txt').read_text(), 'mine', 'of the test')
    assert config['model.depth'] == 4 and config['log.grid_steps'] == [1, 4]
    assert config['commit'] == provenance.commit()
    assert [line['step'] for line in history] == [5, 5, 3, 3]
    assert all(SCALARS.items() <= line.items() for line in history[::2])
    picture = history[1]['samples_1_steps.path']
    assert list(workdir.glob(f'wandb/*/files/{picture}'))


def test_mlflow_files(tmp_path, monkeypatch):
    if importlib.util.find_spec('mlflow') is None:
        pytest.skip('mlflow is not installed')
    import mlflow

    monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
    monkeypatch.setenv('MLFLOW_TRACKING_URI', f'file://{tmp_path}/mlruns')
    monkeypatch.setenv('MLFLOW_EXPERIMENT_NAME', 'of the test')
    _write('mlflow', tmp_path, CONFIG)
    _write('mlflow', tmp_path, CONFIG | {'model.depth': 4}, step=3)  # Resumed.
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'of the test'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == 'FINISHED' and run.info.run_name == tmp_path.name
    assert run.data.params == {name: str(value) for name, value in CONFIG.items()}
    assert run.data.tags['model.depth'] == '4'  # Parameters cannot change.
    assert run.data.tags['mlflow.source.git.commit'] == provenance.commit()
    for name, value in SCALARS.items():
        history = client.get_metric_history(run.info.run_id, name)
        assert sorted((m.step, m.value) for m in history) == [(3, value), (5, value)]
    images = [file.path for file in client.list_artifacts(run.info.run_id, 'images')]
    assert sum('samples_1_steps+step+5' in path for path in images) == 2  # And a small.
    (tmp_path / 'mlflow_run.txt').write_text('0' * 32)
    with pytest.raises(ValueError, match=r'MLflow cannot .* remove .*mlflow_run\.txt'):
        writers.open_writers('mlflow', tmp_path, CONFIG)


def test_missing_packages_are_found(tmp_path, monkeypatch):
    assert writers.names_in(' jsonl, tensorboard,') == ('jsonl', 'tensorboard')
    assert [writers.missing_distribution(n) for n in ('tensorboard', 'jsonl')] == [
        None,
        None,
    ]
    # W&B writes a folder of this name, which Python can import as an empty package.
    (tmp_path / 'wandb').mkdir()
    monkeypatch.setattr(sys, 'path', [str(tmp_path)])
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    assert writers.missing_distribution('wandb') == 'wandb'


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    assert writers.open_writers('jsonl,tensorboard', tmp_path, CONFIG) == []
    assert list(tmp_path.iterdir()) == []


def test_a_failing_tracker_warns_once_and_stops_no_training(tmp_path, capsys):
    class Broken:
        def scalars(self, step, values):
            raise RuntimeError('the server is down')

    lines = writers.open_writers('jsonl', tmp_path, CONFIG)
    report = progress.Progress(
        tmp_path, [Broken(), *lines], batch_size=4, num_steps=2, first_step=0
    )
    for step in (1, 2):
        report.step({'loss': np.float32(1.0), 'skipped': np.float32(0)})
        report.log(step, {})
    shown = capsys.readouterr().out
    assert shown.count('cannot be written: the server is down') == 1
    assert report.loss == pytest.approx(1.0)
    assert len((tmp_path / 'records.jsonl').read_text().splitlines()) == 3
