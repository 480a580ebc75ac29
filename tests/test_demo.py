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


def test_the_studio_makes_pictures(studio):
    side = 128 + 2  # Enlarged, with padding.
    made = studio.samples('any', 3, 2, '', 1.0, 4)
    assert made.count == 4 and made.settings['schedule'] == (0.5, 0.5)
    assert made.image.shape[0] < 2 * side < 3 * side < made.image.shape[1]
    assert '4 images in ' in made.timing() and 'ms each' in made.timing()
    one = studio.samples('7', 3, 2, '', 1.0, 1)
    other = studio.samples('7', 4, 2, '', 1.0, 1)
    assert one.image.shape == other.image.shape and (one.image != other.image).any()
    given = studio.samples('any', 3, 128, ' 0.5, 0.5', 1.0, 4)
    np.testing.assert_array_equal(given.image, made.image)
    assert studio.side_by_side('7', 0, 1.0).count == 5
    assert studio.path('7', 0, 3, 1.0).count == 4
    assert studio.between('7', 0, 1, 2, 1.0, 6).count == 6
    studio.warm_up()
    studio.warm_up_more()


def test_downloads_hold_their_settings(studio):
    made = studio.samples('7', 5, 2, '', 1.5, 1)
    with Image.open(studio.save(made)) as image:
        assert image.format == 'PNG'
        assert image.text == {
            'class': '7',
            'seed': '5',
            'guidance': '1.5',
            'trained_steps': '6',
            'schedule': '[0.5, 0.5]',
        }
        np.testing.assert_array_equal(np.asarray(image), made.image.squeeze())


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
    good = dict(label='7', seed=0, steps=1, schedule='', guidance=1.0, count=1)
    with pytest.raises(demo.FieldError, match=message) as caught:
        studio.samples(**good | {field: value})
    assert caught.value.field == field and len(str(caught.value)) <= 300


def test_old_pictures_are_deleted(studio):
    made = studio.samples('7', 0, 1, '', 1.0, 1)
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


@pytest.fixture
def page(url):
    from playwright import sync_api

    quiet = '--no-sandbox --disable-gpu --no-first-run --disable-background-networking'
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which('chromium'),
            args=[*quiet.split(), '--disable-component-update', '--disable-sync'],
        )
        page = browser.new_page(viewport={'width': 1200, 'height': 1000})
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
    page.get_by_role('tab', name=name).click()
    page.get_by_role('button', name='Generate').locator('visible=true').click()
    _picture(page).wait_for(timeout=60_000)
    assert 'ms each' in page.locator('.prose.timing:visible').inner_text()
