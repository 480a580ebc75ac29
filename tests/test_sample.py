"""The command that draws samples."""

import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from ism_jax import config as config_lib
from ism_jax import generator, sample, train, trained_network
from ism_jax.data import pixels


def test_labels_are_ranges_indices_and_null():
    assert sample.parse_labels('0-2,7, null', 10) == [0, 1, 2, 7, 10]


@pytest.mark.parametrize('text', ['0-10x', '11', '0-20', '-1', 'cat', '', '5-3'])
def test_bad_labels_are_refused(text):
    with pytest.raises(ValueError, match='write labels such as 0-4,7,null'):
        sample.parse_labels(text, 10)


def test_every_cell_starts_from_the_same_noise(small_run):
    run = trained_network.load(small_run)
    cells = dict(guidance=(0.0, 1.0), labels=[3, 4, 10], seed=2)
    images = sample.sample_grid(run, schedules=[1, (0.5, 0.5)], **cells)
    assert images.shape == (2, 2, 3, 32, 32, 1)
    assert len({cell.tobytes() for row in images for cell in row}) == 4
    alone = sample.sample_grid(run, schedules=[(0.5, 0.5)], **cells)
    np.testing.assert_array_equal(alone[0], images[1])
    for options in (dict(schedules=[(0.3, 0.7)]), dict(guidance=[99.0])):
        with pytest.raises(ValueError, match='schedule|guidance = 99'):
            sample.sample_grid(run, **{'schedules': [1]} | cells | options)


@pytest.fixture(scope='module')
def interval_run(tmp_path_factory):
    """A run of two steps whose network takes the guidance interval."""
    config = config_lib.with_argument(config_lib.default(), 'imf,runlocal')
    config.train.steps = 2
    config.optimizer.update(learning_rate=1e-2, warmup_steps=0)
    config.scores.enabled = False
    config.log.grid_every = 0
    folder = tmp_path_factory.mktemp('interval_run')
    train.train(config.lock(), folder)
    return trained_network.load(folder)


def test_the_interval_and_any_schedule_are_chosen_when_sampling(interval_run):
    cells = dict(guidance=[3.0], labels=[3, 4], seed=2)

    def draw(schedule, **interval):
        return sample.sample_grid(
            interval_run, schedules=[schedule], **cells, **interval
        )

    usual = draw((0.6, 0.4))
    np.testing.assert_array_equal(draw((0.6, 0.4), interval=(0.0, 1.0)), usual)
    assert np.isfinite(usual).all() and (draw((0.4, 0.6)) != usual).any()
    np.testing.assert_array_equal(draw(3), draw((1 / 3, 1 / 3, 1 / 3)))
    model = generator.Generator(interval_run)
    images = model.sample([3, 4], schedule=(0.6, 0.4), guidance=3.0, seed=2)
    np.testing.assert_array_equal(images, pixels.to_uint8(usual[0, 0]))
    with pytest.raises(ValueError, match=r'interval = \(0.7, 0.3\) must be a start'):
        draw(2, interval=(0.7, 0.3))


def test_an_interval_that_the_network_does_not_take_is_refused(small_run):
    model = generator.Generator(trained_network.load(small_run))
    with pytest.raises(ValueError, match="train with objective.interval = 'input'"):
        model.sample(3, interval=(0.3, 1.0))


def _write(out, images):
    cells = dict(schedules=[(1.0,), (0.5, 0.5)], guidance=[0.0, 1.5], labels=[3, 4, 5])
    sample.write_samples(out, images, **cells, settings={'seed': 2})
    return sorted(path.name for path in out.iterdir())


def test_pictures_and_arrays_hold_the_settings(tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 2, 3, 8, 8, 1))
    assert _write(tmp_path, images) == [
        'grid.png',
        'samples.npz',
        'steps_1_guidance_0.png',
        'steps_1_guidance_1.5.png',
        'steps_2_guidance_0.png',
        'steps_2_guidance_1.5.png',
    ]
    with np.load(tmp_path / 'samples.npz') as written:
        assert written['images'].shape == images.shape and written['seed'] == 2
        assert written['schedules'].tolist() == ['1.0', '0.5,0.5']
    with Image.open(tmp_path / 'steps_2_guidance_1.5.png') as image:
        assert image.text == {'seed': '2', 'schedule': '[0.5, 0.5]', 'guidance': '1.5'}


def test_latents_are_written_without_pictures(tmp_path):
    assert _write(tmp_path, np.zeros((2, 2, 3, 8, 8, 4))) == ['samples.npz']


@pytest.mark.parametrize('flag', ['--out', '--workdir'])
def test_urls_are_refused(flag, tmp_path):
    paths = {'--out': tmp_path, '--workdir': tmp_path, flag: 'https://host/x'}
    options = [f'{name}={path}' for name, path in paths.items()]
    done = subprocess.run(
        [sys.executable, '-m', 'ism_jax.sample', *options],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and f'{flag} https://host/x is a URL' in done.stderr
