"""Sections of the report, formatted numbers, and the HTML page."""

import base64
from collections.abc import Sequence
import html
from typing import Literal, NamedTuple

import numpy as np

Grade = Literal['good', 'fair', 'poor', 'none']


class Section(NamedTuple):
    """One diagnosis.

    Attributes:
      fault: name of the fault.
      question: the question that the diagnosis answers.
      good: what a good value is.
      text: an explanation for newcomers, in two or three sentences.
      number: what was measured.
      verdict: what the number means for this network.
      grade: 'none' where nothing could be judged.
      figure: PNG, or None.
      caption: caption of the figure.
    """

    fault: str
    question: str
    good: str
    text: str
    number: str
    verdict: str
    grade: Grade
    figure: bytes | None = None
    caption: str = ''


def grade(value: float, good: float, fair: float) -> Grade:
    """'good' below the first limit, 'fair' below the second, else 'poor'."""
    return 'good' if value < good else 'fair' if value < fair else 'poor'


def not_applicable(verdict: str, number: str = 'not applicable') -> dict[str, str]:
    """Number, verdict and grade of a section that cannot be judged."""
    return dict(number=number, verdict=verdict, grade='none')


def number(value: float) -> str:
    """Three significant digits without an exponent; 0 below 0.0005."""
    if abs(value) < 5e-4:
        return '0'
    return np.format_float_positional(value, 3, fractional=False, trim='-')


def percent(share: float) -> str:
    """A share as a percentage."""
    return f'{number(100 * share)}%'


_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1080px; padding: 2rem 1.5rem 4rem;
  background: #fff; color: #1d1d1f;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .1rem; }
.about, .question, figcaption, footer { color: #5c5c61; }
.question { margin: 0 0 .8rem; }
table { border-collapse: collapse; width: 100%; margin: 1.6rem 0 1rem;
  font-size: .94rem; }
th { text-align: left; font-weight: 600; color: #5c5c61;
  border-bottom: 2px solid #1d1d1f; padding: .35rem .8rem .35rem 0; }
td { vertical-align: top; padding: .55rem .8rem .55rem 0;
  border-bottom: 1px solid #e4e4e7; }
td:first-child { min-width: 11.5rem; } td:last-child { width: 30%; }
td a { color: inherit; font-weight: 600; }
.grade { display: inline-block; min-width: 2.6rem; margin-right: .5rem;
  padding: 0 .5rem; border-radius: .7rem; font-size: .82rem; font-weight: 600;
  text-align: center; }
.good { background: #cfeee4; color: #00513b; }
.fair { background: #fdeac2; color: #5e4300; }
.poor { background: #fbd9c7; color: #7a3000; }
.none { background: #ececef; color: #4a4a4f; }
figure { margin: 1rem 0 0; }
figure img { max-width: 100%; height: auto; }
figcaption { font-size: .88rem; margin-top: .3rem; }
"""


def page(title: str, about: str, sections: Sequence[Section], notes: str) -> str:
    """The report as one HTML file without scripts or links to other files.

    `about` is the line below the title, `notes` the footer.
    """
    title, about, notes = (html.escape(text) for text in (title, about, notes))
    rows, bodies = zip(
        *(_section_html(i, section) for i, section in enumerate(sections, 1)),
        strict=True,
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{title}</title><style>{_STYLE}</style></head><body>\n'
        f'<h1>{title}</h1><p class="about">{about}</p>\n'
        '<table><thead><tr><th>Fault</th><th>Measured</th><th>A good value</th>'
        f'<th>Verdict</th></tr></thead><tbody>{"".join(rows)}</tbody></table>\n'
        + '\n'.join(bodies)
        + f'\n<footer><p>{notes}</p></footer>\n</body></html>\n'
    )


def _section_html(index: int, section: Section) -> tuple[str, str]:
    """The section's row in the table, and its body."""
    fault, question, good, text, measured, verdict, caption = (
        html.escape(part) for part in (*section[:6], section.caption)
    )
    name = 'n/a' if section.grade == 'none' else section.grade
    judged = f'<span class="grade {section.grade}">{name}</span>{verdict}'
    row = (
        f'<tr><td><a href="#fault-{index}">{index}. {fault}</a></td>'
        f'<td>{measured}</td><td>{good}</td><td>{judged}</td></tr>'
    )
    figure = ''
    if section.figure is not None:
        data = base64.b64encode(section.figure).decode()
        figure = (
            f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            f'<figcaption>{caption}</figcaption></figure>'
        )
    body = (
        f'<section id="fault-{index}"><h2>{index}. {fault}</h2>'
        f'<p class="question">{question}</p><p>{text}</p><p>{judged}</p>'
        f'{figure}</section>'
    )
    return row, body
