"""Formatted numbers, and the HTML page."""

import numpy as np
import pytest

from ism_jax.diagnosis import report


@pytest.mark.parametrize(
    'value, text',
    [
        (0.9996, '1'),
        (17.0859, '17.1'),
        (1234.5, '1230'),
        (-0.43, '-0.43'),
        (4e-4, '0'),
        (np.float32(0.1), '0.1'),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(value, text):
    assert report.number(value) == text


def test_shares_are_formatted():
    assert report.percent(1) == '100%' and report.percent(0.0456) == '4.56%'


def test_grades():
    assert [report.grade(v, 1, 2) for v in (0, 1, 2)] == ['good', 'fair', 'poor']


def test_the_page_escapes_text_and_leaves_out_missing_figures():
    judged = report.not_applicable('<none>')
    section = report.Section('Fault', 'Why?', 'x < 1', 'text', **judged)
    page = report.page('a < b', 'about', [section], 'notes')
    assert '<h1>a &lt; b</h1>' in page and '&lt;none&gt;' in page
    assert 'x &lt; 1' in page and '>n/a<' in page and '<img' not in page
    shown = section._replace(figure=b'png', caption='of it')
    page = report.page('a', 'about', [section, shown], 'notes')
    assert page.count('<img alt="of it" src="data:image/png;base64,cG5n">') == 1
