"""The command on a tiny run: parameters, report, and what it refuses."""

import base64
from html import parser
import io
from pathlib import Path
import runpy
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from ism_jax import diagnose, train, trained_network
from ism_jax.diagnosis import self_consistency

ROOT = Path(__file__).parents[1]
FAULTS = (
    'Compounding guidance',
    'Inflexible guidance',
    'Frequency bias',
    'Divergent self-consistency',
    'Curved trajectories',
)


class _Page(parser.HTMLParser):
    """Checks that tags are closed in order; keeps headings, cells and figures."""

    VOID = {'meta', 'img', 'br'}

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.pictures = [], [], [], []
        self.text = {'h2': [], 'td': [], 'p': []}
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [attributes['id']] if 'id' in attributes else []
        self.links += [attributes['href']] if 'href' in attributes else []
        if tag == 'img':
            kind, data = attributes['src'].split(',')
            assert kind == 'data:image/png;base64' and attributes['alt']
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(data))))
        if tag in self.text:
            self.text[tag].append('')

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in self.open:
            if tag in self.text:
                self.text[tag][-1] += data


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    config = runpy.run_path(ROOT / 'configs/fashion_mnist.py')['get_config']('runlocal')
    config.scores.enabled = False
    config.model.update(hidden_size=16, depth=1, patch_size=16)
    config.objective.base_steps = 4
    config.wavelet.enabled = False
    config.ema.target_decay = 0.5
    config.train.steps = 4
    config.optimizer.warmup_steps = 0
    config.log.grid_every = 0
    config.transport.batches = 2
    config.lock()
    workdir = tmp_path_factory.mktemp('run')
    state = train.train(config, workdir)
    return workdir, jax.tree.map(np.asarray, (state.params, state.target, state.infer))


def test_parameter_sets_of_a_checkpoint(workdir):
    workdir, (online, target, infer) = workdir
    run = trained_network.load(workdir)
    sets = trained_network.load_parameter_sets(workdir, run)
    assert list(sets) == ['online', 'target', 'infer']
    jax.tree.map(
        np.testing.assert_array_equal,
        sets,
        {'online': online, 'target': target, 'infer': infer},
    )
    lag = self_consistency.parameter_distance(sets['target'], sets['online'])
    assert 1e-4 < lag < 0.5


def test_the_command_writes_a_whole_report(workdir, tmp_path):
    workdir, _ = workdir
    out = tmp_path / 'page.html'
    done = subprocess.run(
        [
            sys.executable, '-m', 'ism_jax.diagnose', '--workdir', str(workdir),
            '--out', str(out), '--samples', '16',
        ],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    page = _Page(out.read_text())
    assert [h.split('. ')[1] for h in page.text['h2']] == list(FAULTS)
    assert len(page.text['td']) == 4 * 5 and all(page.text['td'])
    assert all(link.removeprefix('#') in page.ids for link in page.links)
    assert len(page.pictures) == 5
    assert all(p.width > 700 and p.height > 400 for p in page.pictures)
    assert 'as far as CFG at w = 3.5' in page.text['td'][5]
    assert 'length' in page.text['td'][17] and 'S = ' in page.text['td'][17]
    for fault in FAULTS:
        assert fault in done.stdout


@pytest.mark.parametrize(
    'options, words', [({}, 'holds no run'), ({'samples': 3}, '3 is too few')]
)
def test_bad_input_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        diagnose.diagnose('nowhere', **options)
