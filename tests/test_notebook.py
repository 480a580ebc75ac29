"""The notebook, executed with a small network.

To execute it at full size and keep its outputs (needs nbconvert and ipywidgets):

    jupyter nbconvert --to notebook --execute --inplace launch/colab.ipynb
"""

import base64
import importlib.util
import io
from pathlib import Path

import numpy as np
from PIL import Image
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / 'launch' / 'colab.ipynb'
MAX_BYTES = 2 * 2**20
# Appended to the cells tagged as parameters, in order.
SMALL = (
    "VARIANT, SIZE, STEPS, SAMPLES, COPIES = 'runlocal', 32, 12, 32, 6\n"
    'RUNS = {folder!r}',
    'FINE_TUNE_STEPS = 5',
)
# What a user does next: move the sliders, and wait for new samples.
MOVE_SLIDERS = """
steps, guidance, label, seed, output = controls.widget.children
before = output.outputs
steps.value, guidance.value, label.value, seed.value = 128, 0.5, '7', 5
"""
REPORT = """
print(len(before), len(output.outputs), before != output.outputs)
"""


def _read():
    nbformat = pytest.importorskip('nbformat', reason='needed to read the notebook')
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope='module')
def executed(tmp_path_factory):
    for name in ('nbclient', 'ipykernel', 'ipywidgets'):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f'{name} is not installed')
    import nbclient
    import nbformat

    notebook = _read()
    folder = tmp_path_factory.mktemp('notebook')
    changes = [change.format(folder=str(folder)) for change in SMALL]
    for cell in notebook.cells:
        if 'parameters' in cell.metadata.get('tags', ()):
            cell.source += f'\n{changes.pop(0)}'
    assert not changes
    notebook.cells += [
        nbformat.v4.new_code_cell(text) for text in (MOVE_SLIDERS, REPORT)
    ]
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={'metadata': {'path': str(ROOT / 'launch')}}
    )
    with pytest.MonkeyPatch.context() as patch:
        # It runs longer than it compiles.
        patch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=1')
        client.execute()
    return notebook, folder


def _outputs(notebook, kind):
    return [
        output
        for cell in notebook.cells
        if cell.cell_type == 'code'
        for output in cell.outputs
        if output.output_type == kind
    ]


def _pictures(cell):
    """The pictures that a cell displays, as arrays."""
    out = []
    for output in cell.outputs:
        if 'image/png' in output.get('data', {}):
            data = base64.b64decode(output.data['image/png'])
            out.append(np.asarray(Image.open(io.BytesIO(data))))
    return out


def _cell(notebook, text):
    (cell,) = [cell for cell in notebook.cells if text in cell.source]
    return cell


def _text(cell):
    return ''.join(o.text for o in cell.outputs if o.output_type == 'stream')


def test_it_runs_and_displays_its_pictures(executed):
    notebook, folder = executed
    assert not _outputs(notebook, 'error')
    # Two grids, of one step and of four, with a row for each time they were drawn.
    for text, rows in (('train.train(config', 6), ('train.train(tuned', 5)):
        pictures = _pictures(_cell(notebook, text))
        assert len(pictures) == 2
        for picture in pictures:
            assert picture.shape[0] == rows * 66 + 2 and picture.std() > 1
    assert 'step 12/12' in _text(_cell(notebook, 'train.train(config'))
    assert len(_pictures(_cell(notebook, 'steps_by_guidance'))) == 1
    diagnoses = [cell for cell in notebook.cells if '\nshow(' in '\n' + cell.source]
    assert [len(_pictures(cell)) for cell in diagnoses] == [1, 1, 1]
    assert 'S = ' in _text(diagnoses[-1])
    assert (folder / 'colab_exported' / 'model.safetensors').exists()
    assert len(list((folder / 'letters').rglob('*.png'))) > 500
    assert 'trained 5 steps' in repr(_load(folder / 'colab_letters'))
    assert _load(folder / 'colab_letters').class_names == ('A', 'B', 'C', 'D')


def _load(folder):
    import ism_jax

    return ism_jax.load(folder)


def test_its_sliders_sample_again(executed):
    notebook, _ = executed
    assert _text(notebook.cells[-1]).strip().endswith('True')


def test_it_is_committed_with_its_outputs():
    """Of a full-size run, without errors, in order, and small; no path of a machine."""
    notebook = _read()
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    counts = [cell.execution_count for cell in code]
    assert counts == sorted(counts) and None not in counts
    assert not _outputs(notebook, 'error')
    (cell,) = [cell for cell in code if 'train.train(config' in cell.source]
    assert len(_pictures(cell)) == 2
    steps = next(c for c in code if 'STEPS = ' in c.source).source
    steps = int(steps.split('STEPS = ')[1].split()[0])
    assert steps >= 1000 and f'step {steps}/{steps}' in _text(cell)
    for path in ('/root', '/home', '/tmp', '/content', '/work'):
        assert path not in NOTEBOOK.read_text()
