"""Evaluation by metrics: resumed, shared among processes, and recorded."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from ism_jax.evaluation import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    protocol,
    real_images,
    sample_chunks,
    score_table,
)
from ism_jax.method import time_grid
from ism_jax.objectives import ism
from ism_jax.sampling.sampler import Sampler

PARAMS = {'a': np.float32(0.3)}
DESCRIPTION = {
    'params_sha256': '7e05e99c8eb2890099a386e4a5c511f33180f8e8d19894ce6d0f0007b7f20d8b',
    'average': 'infer',
    'trained_steps': 7,
    'objective': {'name': 'ism', 'base_steps': 128},
    'model': {'depth': 2},
    'autoencoder': '',
    'autoencoder_sha256': '',
}


def _sampler(batch_size=8):
    def apply(params, x, t, d, w, label):
        return params['a'] * x + (label + w)[:, None, None, None] * 0.1

    return Sampler(
        ism.Objective(num_classes=3), apply, (8, 8, 1), batch_size=batch_size
    )


@pytest.fixture
def evaluate(tiny_metrics):
    def run(out, metric_set=None, params=PARAMS, **options):
        options = dict(
            steps=(1, 2), guidance=(1.0,), samples=40, labels='balanced', seed=3,
            log=lambda text: None,
        ) | options  # fmt: skip
        return protocol.evaluate_settings(
            params, _sampler(), metric_set or tiny_metrics(), DESCRIPTION,
            num_classes=3, out=out, **options,
        )  # fmt: skip

    return run


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(protocol, 'CHUNK', 16)


def _direct(steps, w, samples=40):
    """The 8-bit samples of a setting, in one batch."""
    ((images, _),) = _sampler(samples).batches(
        PARAMS, jax.random.key(3), np.arange(samples) % 3, guidance=w,
        schedule=time_grid.dyadic_schedule(steps, 128),
    )  # fmt: skip
    values = (np.clip(np.asarray(images, np.float64), -1, 1) + 1) * 127.5
    return np.rint(values).astype(np.uint8)


def test_scores_are_those_of_all_samples_together(
    evaluate, tmp_path, small_chunks, tiny_metrics
):
    records = evaluate(tmp_path)
    assert [record['steps'] for record in records] == [1, 2]
    metric_set = tiny_metrics()
    reference = metric_set.references['inception']
    out = metric_set.networks['inception'](_direct(2, 1.0))
    scores = records[1]['scores']
    for name, output in {'FID': 'features', 'sFID': 'spatial'}.items():
        features = out[output].astype(np.float64)
        expected = frechet_distance.gaussian_distance(
            features.mean(0), np.cov(features.T), *reference.moments[output]
        )
        np.testing.assert_allclose(scores[name], expected, rtol=1e-4)
    expected = inception_score.inception_score(out['unbiased_logits'])
    found = [scores['IS'], scores['IS deviation']]
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    expected = precision_recall.precision_recall(out['features'], reference.features)
    assert (scores['Precision'], scores['Recall']) == expected
    expected = kernel_distance.kernel_distance(
        out['features'], reference.features, subset_size=40
    )
    np.testing.assert_allclose(scores['KID'], expected[0], rtol=1e-3)
    assert not list(tmp_path.rglob('chunk-*')), 'chunks of scored settings are removed'


def test_a_record_states_everything_that_repeats_it(evaluate, tmp_path):
    (record,) = evaluate(tmp_path, steps=(4,))
    assert record.items() >= DESCRIPTION.items()
    assert record['schedule'] == [0.25] * 4 and record['guidance'] == 1.0
    assert record['samples'] == 40 and record['labels'] == 'balanced'
    assert record['seed'] == 3 and record['sampler_batch_size'] == 8
    assert record['rounding'] == protocol.ROUNDING
    network = record['judges']['inception']
    assert network['weights'] == '0' and len(network['reference_key']) == 16
    assert {'commit', 'command', 'jax', 'hardware'} <= record.keys()
    assert json.loads((tmp_path / 'records.json').read_text()) == [record]


def test_folders_of_earlier_versions_are_found(evaluate, tmp_path):
    """The names are those of an evaluation before the package had subpackages."""
    records = evaluate(tmp_path, labels='uniform', guidance=(1.0, 2.5))
    assert [record['cell'] for record in records] == [
        'steps_1_guidance_1_6f41eb4d',
        'steps_1_guidance_2.5_f45bf588',
        'steps_2_guidance_1_6be1ea62',
        'steps_2_guidance_2.5_59532c57',
    ]


def test_a_stopped_evaluation_resumes(evaluate, tmp_path, small_chunks, monkeypatch):
    (whole,) = evaluate(tmp_path / 'whole', steps=(2,))

    class Killed(Exception):
        pass

    made, make = [], sample_chunks.Chunks.make

    def make_two(self, index, *args, **options):
        if len(made) == 2:
            raise Killed
        made.append(index)
        make(self, index, *args, **options)

    def make_all(self, index, *args, **options):
        made.append(index)
        make(self, index, *args, **options)

    out = tmp_path / 'killed'
    monkeypatch.setattr(sample_chunks.Chunks, 'make', make_two)
    with pytest.raises(Killed):
        evaluate(out, steps=(2,))
    monkeypatch.setattr(sample_chunks.Chunks, 'make', make_all)
    (resumed,) = evaluate(out, steps=(2,))
    assert made == [0, 1, 2] and resumed['scores'] == whole['scores']
    # A scored setting is read, not sampled.
    assert evaluate(out, steps=(2,)) == [resumed]
    assert made == [0, 1, 2]
    # Another seed is another setting.
    evaluate(out, steps=(2,), seed=4)
    assert made == [0, 1, 2, 0, 1, 2]


def test_a_damaged_chunk_is_recomputed(evaluate, tmp_path, small_chunks):
    (whole,) = evaluate(tmp_path / 'whole', steps=(2,))
    out = tmp_path / 'torn'
    evaluate(out, steps=(2,), process_index=1, process_count=2)
    torn = next(out.rglob('chunk-00001.npz'))
    content = bytearray(torn.read_bytes())
    content[len(content) // 2] ^= 1
    torn.write_bytes(content)
    with pytest.warns(UserWarning, match='chunk-00001.npz is damaged or incomplete'):
        (resumed,) = evaluate(out, steps=(2,))
    assert resumed['scores'] == whole['scores']


def test_processes_share_the_chunks_of_a_setting(evaluate, tmp_path, small_chunks):
    (alone,) = evaluate(tmp_path / 'alone', steps=(2,))
    shared, lines = tmp_path / 'shared', []
    options = dict(steps=(2,), process_count=2, log=lines.append)
    assert evaluate(shared, process_index=0, **options) is None
    assert len(list(shared.rglob('chunk-*'))) == 2  # 0 and 2 of 0, 1, 2.
    assert evaluate(shared, process_index=1, **options) is None
    assert 'wait for other processes' in lines[-1]
    (record,) = evaluate(shared, process_index=0, **options)
    assert record['scores'] == alone['scores']


def test_kept_samples_are_those_that_were_scored(
    evaluate, tmp_path, small_chunks, tiny_metrics
):
    (record,) = evaluate(tmp_path, steps=(2,), keep=('npz', 'png'))
    folder = tmp_path / record['cell']
    with np.load(folder / 'samples_40x8x8x3.npz', allow_pickle=False) as file:
        assert file.files == ['arr_0', 'arr_1']  # ADM's layout.
        images, labels = file['arr_0'], file['arr_1']
    assert images.dtype == np.uint8 and images.shape == (40, 8, 8, 3)
    # Another batch size may round differently.
    assert np.abs(images.astype(int) - _direct(2, 1.0)).max() <= 1
    np.testing.assert_array_equal(labels, np.arange(40) % 3)
    pictures = sorted((folder / 'png').iterdir())
    assert len(pictures) == 40
    for index in (0, 17, 39):
        picture = np.asarray(Image.open(pictures[index]).convert('RGB'))
        np.testing.assert_array_equal(picture, images[index])
    for origin in (folder / 'samples_40x8x8x3.npz', folder / 'png'):
        of_images = protocol.evaluate_images(
            real_images.open_images(origin), tiny_metrics(), log=lambda text: None
        )
        assert of_images['scores'] == record['scores']
        assert of_images['images_sha256']
        assert 'FID' in score_table.metrics_table([of_images])


def test_samples_can_be_kept_later(evaluate, tmp_path, small_chunks):
    (without,) = evaluate(tmp_path, steps=(2,))
    assert without['kept'] == {}
    (later,) = evaluate(tmp_path, steps=(2,), keep=('npz',))
    assert later['scores'] == without['scores']
    assert (tmp_path / later['cell'] / later['kept']['npz']).exists()


def test_a_grid_over_guidance_is_recorded(evaluate, tmp_path):
    (alone,) = evaluate(tmp_path, steps=(1,), guidance=(1.0,))
    assert alone['guidance_grid'] == [1.0]
    # Also if its scales are evaluated one after another.
    later = evaluate(tmp_path, steps=(1, 2), guidance=(2.0,))
    assert [record['guidance_grid'] for record in later] == [[1.0, 2.0], [2.0]]
    # Selected with one noise, scored with another.
    (other,) = evaluate(tmp_path, steps=(1,), guidance=(2.0,), seed=4)
    assert other['guidance_grid'] == [2.0]


def test_what_cannot_be_scored_is_refused_before_sampling(evaluate, tmp_path):
    with pytest.raises(ValueError, match='5 samples are too few for is'):
        evaluate(tmp_path, samples=5)
    assert not list(tmp_path.iterdir())


def test_samples_with_nan_have_no_score(evaluate, tmp_path):
    with pytest.raises(ValueError, match='steps 1, w 1: .* values are NaN'):
        evaluate(tmp_path, params={'a': jnp.nan})


def test_labels_of_samples():
    balanced = protocol.sample_labels('balanced', 50_000, 1000, 0)
    assert (np.bincount(balanced) == 50).all()
    uniform = protocol.sample_labels('uniform', 50_000, 1000, 0)
    counts = np.bincount(uniform, minlength=1000)
    assert 40 < counts.var() < 60 and counts.sum() == 50_000  # Poisson of 50.
    assert (uniform != protocol.sample_labels('uniform', 50_000, 1000, 1)).any()
