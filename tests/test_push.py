"""`ism_jax.convert push` against a local stand-in of the Hugging Face hub."""

import io
import shutil

import hub_server
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

import ism_jax
from ism_jax import convert
from ism_jax.evaluation import records

pytest.importorskip('huggingface_hub')
pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    """The stand-in, to which this process is logged in."""
    from huggingface_hub import constants

    with hub_server.Hub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, 'ENDPOINT', hub.url)
        template = hub.url + '/{repo_id}/resolve/{revision}/{filename}'
        patch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
        cache = tmp_path_factory.mktemp('cache')
        patch.setattr(constants, 'HF_HUB_CACHE', str(cache))
        patch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        patch.setenv('HF_TOKEN', hub_server.TOKEN)
        yield hub
        hub.shutdown()


@pytest.fixture(scope='module')
def scored(small_run, tmp_path_factory):
    """The small run with scores."""
    folder = tmp_path_factory.mktemp('scored') / 'run'
    shutil.copytree(small_run, folder)
    score = dict(accuracy=0.5, samples=1000, trained_steps=6)
    scores = [
        score | dict(steps=1, guidance=0.0, fd=123.456),
        score | dict(steps=4, guidance=1.5, fd=float('nan')),
        score | dict(steps=4, guidance=1.5, fd=77.7, trained_steps=3),
    ]
    records.write_records(folder / 'scores.json', scores)
    return folder


@pytest.fixture(scope='module')
def pushed(hub, scored, one_device):
    """The files of the pushed run."""
    lines = convert.push(scored, 'user/digits', license='mit')
    assert lines[0] == f'uploaded to {hub.url}/user/digits'
    return hub.files['user/digits']


def test_a_pushed_run_loads_and_samples_bit_for_bit(hub, pushed, scored):
    assert pushed.keys() == {
        'README.md', 'config.json', 'model.safetensors', 'samples.png'
    }  # fmt: skip
    assert hub.messages == ['ism_jax, ism, inference EMA, step 6']
    assert not hub.private
    there, here = ism_jax.load('user/digits'), ism_jax.load(scored)
    np.testing.assert_array_equal(there.sample([1, None]), here.sample([1, None]))


def test_the_card_states_the_run_and_its_scores(pushed):
    header, text = pushed['README.md'].decode().split('---\n', 2)[1:]
    assert 'license: mit\nlibrary_name: ism_jax\npipeline_tag: uncond' in header
    assert 'ism]' in header and text.startswith('\n# digits\n')
    for part in (
        '[arXiv 2510.21250](https://arxiv.org/abs/2510.21250)',
        '![Samples',
        "model = ism_jax.load('user/digits')\n",
        '`mnist`, images of 32x32x1',
        '| classes | 10 |',
        '| training | 6 steps of ',
        '| steps | w = 0 | w = 1.5 |\n| --- | --- | --- |\n'
        '| 1 | 123 (50%) |  |\n| 4 |  | nan (50%) |',
        '1,000 samples:',
        'not the FID',
    ):
        assert part in text, part
    assert '77.7' not in text  # Of another checkpoint.
    with Image.open(io.BytesIO(pushed['samples.png'])) as picture:
        assert 300 < picture.size[0] < 2200


def test_the_lines_of_the_card_work(pushed):
    code = pushed['README.md'].decode().split('```python\n')[1].split('```')[0]
    names = {}
    exec(code, names)  # noqa: S102
    assert names['images'].shape == (3, 32, 32, 1)


def test_an_exported_folder_is_pushed_as_it_is(hub, pushed, tmp_path):
    for name in ('config.json', 'model.safetensors'):
        (tmp_path / name).write_bytes(pushed[name])
    convert.push(tmp_path, 'user/again', private=True)
    again = hub.files['user/again']
    assert again['config.json'] == pushed['config.json']
    ours, theirs = (
        safetensors.numpy.load(files['model.safetensors']) for files in (pushed, again)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name])
    assert hub.private == {'user/again'}
    card = again['README.md'].decode()
    assert 'license' not in card and '## Scores' not in card


@pytest.mark.parametrize(
    'token, repo, message',
    [
        (hub_server.TOKEN, 'other/digits', 'other/digits cannot be .*403.*HF_TOKEN'),
        ('hf_wrong', 'user/new', 'user/new cannot be .*401.*HF_TOKEN'),
        (hub_server.TOKEN, 'digits', '--repo digits is not a hub id'),
    ],
)
def test_the_hub_refuses(hub, scored, monkeypatch, token, repo, message):
    monkeypatch.setenv('HF_TOKEN', token)
    with pytest.raises(ValueError, match=message) as caught:
        convert.push(scored, repo)
    assert 'hf_' not in str(caught.value)
    assert repo not in hub.files


def test_private_never_means_public(hub, scored):
    hub.files['user/public'] = {}
    with pytest.raises(ValueError, match='exists and is public'):
        convert.push(scored, 'user/public', private=True)
    assert not hub.files['user/public']


def test_a_hub_that_cannot_be_reached(hub, scored, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(ValueError, match=r'user/digits cannot .*\(Connect'):
        convert.push(scored, 'user/digits')
