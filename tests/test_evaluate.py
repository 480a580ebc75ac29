"""The command `ism_jax.evaluate`."""

import json
from pathlib import Path
import subprocess
import sys
import types

import numpy as np
from PIL import Image
import pytest

from ism_jax import evaluate, trained_network
from ism_jax.data import array_source

ROOT = Path(__file__).parent.parent


def _flags(**values):
    defaults = dict(
        images='', workdir='run', keep='', process_index=None, process_count=None,
        inception='', dinov2='', efficientnet='',
    )  # fmt: skip
    return types.SimpleNamespace(**defaults | values)


@pytest.mark.parametrize(
    'values, message',
    [
        (dict(workdir=None), 'give --workdir, a run, or --images'),
        (dict(images='a.npz'), 'give --workdir, a run, or --images'),
        (dict(keep='npz,jpg'), "--keep npz,jpg: 'jpg' is not one of npz, png"),
        (dict(dinov2='gs://bucket/dino'), '--dinov2 gs://bucket/dino is a URL'),
        (dict(process_index=2, process_count=2), '--process_index 2 is not in 0 .. 1'),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(values, message):
    evaluate.check_flags(_flags())
    evaluate.check_flags(_flags(keep='npz,png', process_index=1, process_count=2))
    with pytest.raises(ValueError, match=message):
        evaluate.check_flags(_flags(**values))


def test_a_reference_is_a_path_or_a_source(tmp_path):
    assert evaluate.open_reference(str(tmp_path), image_size=None) == tmp_path
    image = Image.fromarray(np.zeros((9, 9, 3), np.uint8))
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / 'image.png')
    source = evaluate.open_reference(f'folder:{tmp_path}', image_size=8)
    assert source.image_shape == (8, 8, 3) and len(source) == 2
    with pytest.raises(ValueError, match='--reference nowhere does not exist'):
        evaluate.open_reference('nowhere', image_size=None)
    with pytest.raises(ValueError, match='no --reference: .* or a source such as'):
        evaluate.open_reference('', image_size=8)


def test_description_identifies_the_network(small_run):
    run = trained_network.load(small_run)
    description = evaluate.describe(run)
    # Other keys would give the settings of an earlier evaluation new folders.
    assert list(description) == [
        'params_sha256', 'average', 'trained_steps', 'objective', 'model',
        'autoencoder', 'autoencoder_sha256',
    ]  # fmt: skip
    assert description['trained_steps'] == 6 and description['autoencoder'] == ''
    # Options at their defaults are left out, so that a new one keeps earlier scores.
    assert description['objective'] == {'name': 'ism'}
    assert description['model']['hidden_size'] == run.config.model.hidden_size
    assert 'time_scale' not in description['model']
    earlier = trained_network.load(small_run, 3)
    assert evaluate.describe(earlier)['params_sha256'] != description['params_sha256']


def test_a_run_is_scored_by_a_classifier(small_run, tmp_path, monkeypatch):
    run = trained_network.load(small_run)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, *run.image_shape)).astype(np.uint8)
    source = array_source.ArraySource(
        'few', images, np.arange(40) % len(run.class_names), run.class_names
    )
    monkeypatch.setattr(evaluate, 'run_source', lambda run: source)
    sampler = run.experiment().make_sampler(8)
    records = evaluate.evaluate_by_classifier(
        run, sampler, steps=(1,), guidance=(0.0,), samples=20, workdir=tmp_path
    )
    assert json.loads((tmp_path / 'scores.json').read_text()) == records
    assert records[0]['samples'] == 20 and records[0]['trained_steps'] == 6
    with pytest.raises(ValueError, match='--samples 1: a score needs at least 2'):
        evaluate.evaluate_by_classifier(
            run, sampler, steps=(1,), guidance=(0.0,), samples=1, workdir=tmp_path
        )


def _photographs(folder, count, seed):
    """Crops of a photograph, tinted in one colour."""
    from sklearn.datasets import load_sample_image

    photograph = load_sample_image('flower.jpg').astype(float)
    random = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        top, left = (random.integers(0, n - 64) for n in photograph.shape[:2])
        crop = photograph[top : top + 64, left : left + 64]
        crop = crop * random.uniform(0.4, 1, 3)[None, None]
        Image.fromarray(crop.astype(np.uint8)).save(folder / f'{number:03}.png')
    return folder


@pytest.mark.slow  # The parts of the score are compared in tests/evaluation.
def test_command_line_agrees_with_torch_fidelity(
    tmp_path, inception_file, torch_fidelity
):
    """Both programs score the same pictures with the same weights.

    Theirs gets decoded pictures, because it reads files by torchvision.
    """
    import torch

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, folder):
            self.paths = sorted(folder.iterdir())

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, index):
            picture = np.asarray(Image.open(self.paths[index]))
            return torch.from_numpy(picture.transpose(2, 0, 1).copy())

    samples = _photographs(tmp_path / 'samples', 20, seed=0)
    real = _photographs(tmp_path / 'real', 24, seed=1)
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(samples), input2=Pictures(real),
        cuda=False, verbose=False, cache=False,
        isc=True, fid=True, kid=True, prc=True, kid_subset_size=20,
        feature_extractor='inception-v3-compat', num_workers=0,
        feature_extractor_weights_path=str(inception_file), save_cpu_ram=True,
    )  # fmt: skip
    output = _command(
        f'--images={samples}', f'--reference={real}', '--metrics=fid,is,kid,pr',
        f'--inception={inception_file}', '--inception_name=random',
        f'--cache_dir={tmp_path / "cache"}', f'--out={tmp_path / "out"}',
    )  # fmt: skip
    assert '| FD-random | IS (random) |' in output
    record = json.loads((tmp_path / 'out' / 'images.json').read_text())[0]
    pairs = {
        'FD-random': 'frechet_inception_distance',
        'IS (random)': 'inception_score_mean',
        'IS (random) deviation': 'inception_score_std',
        'KID (random)': 'kernel_inception_distance_mean',
        'Precision (random)': 'precision',
        'Recall (random)': 'recall',
    }
    for ours, name in pairs.items():
        print(
            f'{ours}: {record["scores"][ours]:.8g}, torch-fidelity {theirs[name]:.8g}'
        )
        np.testing.assert_allclose(record['scores'][ours], theirs[name], rtol=1e-4)
    assert theirs['frechet_inception_distance'] > 1


def _command(*flags):
    done = subprocess.run(
        [sys.executable, '-m', 'ism_jax.evaluate', *flags], capture_output=True,
        text=True, cwd=ROOT,  timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    'flags, message',
    [
        ([], 'give --workdir, a run, or --images'),
        (['--images=a.npz'], 'no metrics; choose among fid, sfid'),
        (['--images=a.npz', '--metrics=fid'], 'a.npz is neither a folder'),
    ],
)
def test_bad_flags_are_refused(flags, message, tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', 'ism_jax.evaluate', *flags], capture_output=True,
        text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and message in done.stderr, done.stderr
