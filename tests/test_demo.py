"""The demo page: the studio behind it, and the page in a browser.

The second part needs gradio, playwright (`pip install gradio playwright`) and Debian's
chromium, and is skipped without them.
"""

import importlib.util
import os
from pathlib import Path
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest

import ism_jax
from ism_jax import demo

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def studio(small_run):
    return demo.Studio(ism_jax.load(small_run))


def _samples(studio, **changes):
    values = dict(label='7', seed=3, steps=2, schedule='', guidance=1.0, count=1)
    return studio.samples(**values | changes)


CONDITIONS = dict(label='7', seed=0, guidance=1.0)


def test_the_studio_makes_pictures(studio):
    side = 128 + 2  # Enlarged, with padding.
    made = _samples(studio, label='any', count=4)
    assert made.count == 4 and made.settings['schedule'] == (0.5, 0.5)
    frames, height, width, _ = made.frames.shape
    assert frames == 1 and height < 2 * side < 3 * side < width
    assert '4 images in ' in made.timing() and 'ms each' in made.timing()
    one = _samples(studio)
    for change in (dict(seed=4), dict(label='none')):
        other = _samples(studio, **change)
        assert one.frames.shape == other.frames.shape
        assert (one.frames != other.frames).any()
    given = _samples(studio, label='any', count=4, steps=128, schedule=' 0.5, 0.5')
    np.testing.assert_array_equal(given.frames, made.frames)
    assert studio.side_by_side(**CONDITIONS).count == 4
    assert studio.between(last_seed=1, steps=2, count=6, **CONDITIONS).count == 6
    studio.warm_up()
    studio.warm_up_more()


def test_a_path_is_an_animation_that_ends_at_the_sample(studio):
    path = studio.path(steps=3, **CONDITIONS)
    assert path.count == 4 and len(path.frames) == 3 * 6 + 1
    with Image.open(studio.save(path)) as image:
        assert image.is_animated and image.n_frames == len(path.frames)
        assert image.text['steps'] == '3'
        image.seek(image.n_frames - 1)
        assert image.info['duration'] == 1500
    # The moving image is at the left of the states: noise, 3 steps.
    cells = [path.frames[-1][:, i * 130 + 2 : i * 130 + 130] for i in range(5)]
    np.testing.assert_array_equal(cells[0], cells[4])
    sample = studio.model.sample(['7'], steps=3, guidance=1.0, seed=0)[0]
    np.testing.assert_array_equal(cells[0][2:130:4, ::4], sample)
    # Half of a step later it is half way.
    states = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1)).astype(np.uint8)
    frames = demo.path_frames(states)
    np.testing.assert_allclose(frames[3][0], states[:2].mean(0), atol=0.5)
    assert (frames[3][2:] == 255).all() and (frames[-1][1:] == states).all()


def test_an_interval_is_checked(studio, monkeypatch):
    monkeypatch.setattr(studio.model, 'default_interval', (0.0, 1.0))
    fields = [tab.fields for tab in demo.make_tabs(studio)]
    assert all({'start', 'end'} <= {*names} for names in fields)
    for start, end, field in ((-0.1, 1, 'start'), (0.5, 0.5, 'end'), (0, 2, 'end')):
        with pytest.raises(demo.FieldError) as caught:
            _samples(studio, start=start, end=end)
        assert caught.value.field == field
    given = {}
    monkeypatch.setattr(
        studio.model,
        'sample',
        lambda labels, **options: given.update(options) or np.zeros((1, 32, 32, 1)),
    )
    made = _samples(studio, start=0.25, end=0.75)
    assert given['interval'] == made.settings['interval'] == (0.25, 0.75)


def test_downloads_hold_their_settings(studio):
    made = _samples(studio, seed=5, guidance=1.5)
    with Image.open(studio.save(made)) as image:
        assert image.format == 'PNG'
        assert image.text == {
            'class': '7',
            'seed': '5',
            'guidance': '1.5',
            'trained_steps': '6',
            'schedule': '[0.5, 0.5]',
        }
        np.testing.assert_array_equal(np.asarray(image), made.frames[0].squeeze())


@pytest.mark.parametrize(
    'field, value, message',
    [
        ('label', 'cat', 'not a class of this network'),
        ('label', '../../etc', 'not a class of this network'),
        ('seed', -1, 'an integer in 0 ..'),
        ('seed', 1.5, 'an integer in 0 ..'),
        ('seed', None, 'an integer in 0 ..'),
        ('seed', float('nan'), 'an integer in 0 ..'),
        ('steps', 129, r'an integer in 1 .. 128'),
        ('steps', 10**9, r'an integer in 1 .. 128'),
        ('schedule', '0.3,0.7', 'not one of'),
        ('schedule', 'x' * 10**6, 'not a list of numbers'),
        ('schedule', '0.5', 'must sum to 1'),
        ('guidance', 9.0, r'a number in 0.0 .. 3.5'),
        ('count', 17, 'an integer in 1 .. 16'),
    ],
)
def test_bad_values_name_their_field(studio, field, value, message):
    with pytest.raises(demo.FieldError, match=message) as caught:
        _samples(studio, **{field: value})
    assert caught.value.field == field and len(str(caught.value)) <= 300


def test_old_pictures_are_deleted(studio):
    made = _samples(studio)
    for _ in range(300):
        last = studio.save(made)
    assert len(list(studio.folder.iterdir())) <= 257 and Path(last).exists()


def test_tabs_have_fields_that_their_methods_take(studio):
    tabs = demo.make_tabs(studio)
    assert [tab.title for tab in tabs] == [
        'Samples',
        'Steps side by side',
        'From noise to image',
        'Between two seeds',
    ]
    values = dict(label='7', seed=0, last_seed=1, steps=2, schedule='', guidance=1.0)
    for tab in tabs:
        given = {name: values.get(name, 2) for name in tab.fields}
        assert tab.make(**given).count >= 2


def test_guidance_without_a_limit_is_bounded(small_run):
    model = ism_jax.load(small_run)
    model.guidance_range = 0.0, float('inf')
    studio = demo.Studio(model)
    assert studio.guidance_range == (0.0, demo.MAX_GUIDANCE)
    assert studio.default_guidance == 1.5
    model.guidance_range = 0.5, 0.5
    assert demo.Studio(model).default_guidance == 0.5


def test_the_page_is_built(studio):
    pytest.importorskip('gradio')
    page = demo.make_page(studio)
    labels = [block.label for block in page.blocks.values() if hasattr(block, 'label')]
    assert {'Class', 'Seed', 'Last seed', 'Steps', 'Guidance', 'Images'} <= {*labels}


@pytest.mark.parametrize('host', ['127.0.0.1', '127.8.8.8', '::1', 'localhost'])
def test_loopback_addresses_are_allowed(host):
    demo.check_host(host, False)


@pytest.mark.parametrize('host', ['0.0.0.0', '::', '192.168.0.7', 'example.org', ''])
def test_other_addresses_need_share_host(host):
    with pytest.raises(ValueError, match='--share-host'):
        demo.check_host(host, False)
    demo.check_host(host, True)


@pytest.fixture(scope='module')
def url(small_run):
    for name in ('gradio', 'playwright'):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f'{name} is not installed')
    if shutil.which('chromium') is None:
        pytest.skip('chromium is not installed')
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        port = server.getsockname()[1]
    process = subprocess.Popen(
        [
            sys.executable,
            '-m',
            'ism_jax.demo',
            '--workdir',
            small_run,
            f'--port={port}',
        ],
        cwd=ROOT,
        env=os.environ | {'PYTHONUNBUFFERED': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for line in process.stdout:
            if 'Running on' in line:
                break
        assert process.poll() is None
        yield f'http://127.0.0.1:{port}'
    finally:
        process.kill()


@pytest.fixture(params=[(1200, 1000), (390, 844)], ids=['desktop', 'phone'])
def page(url, request):
    from playwright import sync_api

    quiet = '--no-sandbox --disable-gpu --no-first-run --disable-background-networking'
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which('chromium'),
            args=[*quiet.split(), '--disable-component-update', '--disable-sync'],
        )
        width, height = request.param
        page = browser.new_page(viewport={'width': width, 'height': height})
        page.urls = []
        page.on('request', lambda request: page.urls.append(request.url))
        page.goto(url)
        yield page
        browser.close()


def _picture(page):
    return page.locator('img[src*="ism_jax_"]:visible').first


def _changed(page, before):
    """Waits for another picture."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        source = _picture(page).get_attribute('src')
        if source != before:
            return source
        time.sleep(0.05)
    raise AssertionError('the picture did not change')


def test_nothing_is_wider_than_the_page(page):
    _picture(page).wait_for(timeout=60_000)
    width = page.viewport_size['width']
    assert page.evaluate('document.scrollingElement.scrollWidth') <= width
    box = _picture(page).bounding_box()
    assert 0 <= box['x'] and box['x'] + box['width'] <= width
    # On a phone, too, the picture is not below its fields.
    assert box['y'] < page.get_by_label('Seed', exact=True).first.bounding_box()['y']


def test_sliders_move_by_keyboard(page):
    _picture(page).wait_for(timeout=60_000)
    source = _picture(page).get_attribute('src')
    slider = page.get_by_role('slider', name='Guidance').locator('visible=true').first
    slider.focus()
    slider.press('ArrowRight')
    _changed(page, source)
    assert float(slider.input_value()) == pytest.approx(1.6)


def test_the_first_tab(page, url, tmp_path):
    _picture(page).wait_for(timeout=60_000)  # Without a click.
    source = _picture(page).get_attribute('src')
    assert 'ms each' in page.locator('.prose.timing:visible').inner_text()
    # Each control alone changes the picture.
    seed = page.get_by_label('Seed', exact=True).first
    seed.fill('7')
    seed.blur()
    source = _changed(page, source)
    for name, value in (('Steps', '2'), ('Guidance', '3'), ('Images', '6')):
        number = page.get_by_label(f'number input for {name}').locator('visible=true')
        number.first.fill(value)
        number.first.press('Tab')
        source = _changed(page, source)
    page.get_by_label('Class').locator('visible=true').first.click()
    page.get_by_role('option', name='7', exact=True).click()
    source = _changed(page, source)
    # The downloaded file holds its settings.
    with page.expect_download() as download:
        page.get_by_label('Download').locator('visible=true').first.click()
    download.value.save_as(tmp_path / 'picture.png')
    with Image.open(tmp_path / 'picture.png') as image:
        assert image.text['seed'] == '7' and image.text['class'] == '7'
        assert image.text['guidance'] == '3.0'
    # A bad value shows an error beside its field; the picture stays.
    seed.fill('-3')
    seed.blur()
    beside = page.locator('.prose.beside-seed:visible [role=alert]')
    beside.first.wait_for(timeout=30_000)
    assert 'must be an integer' in beside.first.inner_text()
    assert _picture(page).get_attribute('src') == source
    seed.fill('3')
    seed.blur()
    _changed(page, source)
    beside.first.wait_for(state='detached', timeout=30_000)
    # No request went to another server.
    elsewhere = [
        url_ for url_ in page.urls if not url_.startswith((url, 'data:', 'blob:'))
    ]
    assert not elsewhere


@pytest.mark.parametrize(
    'name', ['Steps side by side', 'From noise to image', 'Between two seeds']
)
def test_the_other_tabs(page, name):
    tab = page.get_by_role('tab', name=name)
    page.get_by_role('tab', name='Samples').wait_for()
    if not tab.count():  # On a phone, tabs without a place are in a menu.
        page.get_by_label('More tabs').click()
        tab = page.get_by_role('button', name=name)
    tab.click()
    page.get_by_role('button', name='Generate').locator('visible=true').click()
    _picture(page).wait_for(timeout=60_000)
    assert 'ms each' in page.locator('.prose.timing:visible').inner_text()
