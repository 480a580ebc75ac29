"""The five diagnoses on inputs whose answer is known, and the command on a tiny run."""

import base64
from html import parser
import io
import itertools
import math
import os
from pathlib import Path
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from scipy import optimize

from ism_jax import diagnose, objectives, train, trained_network
from ism_jax.diagnosis import diagnostics, report
from ism_jax.sampling.sampler import Sampler

ROOT = Path(__file__).parents[2]
NULL = 2
SHAPE = (8, 8, 1)


@pytest.fixture(autouse=True, scope='module')
def one_device():
    """Programs for eight devices compile slowly."""
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, 'devices', lambda: devices)
        yield


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _batch(size=6, seed=0):
    """x, t, label; times on the grid of 1/8."""
    x = jnp.asarray(_normal(size, 2, 2, 1, seed=seed))
    label = jnp.arange(size, dtype=jnp.int32) % NULL
    return x, jnp.arange(size) % 2 * 0.5, label


# 1. Compounding guidance.


def _affine_field(x, t, label):
    """v(c) - v(null) depends on t alone, and v(null) is affine in x."""
    push = jnp.where(label == NULL, 0.0, (1 + t) * (1 + label))
    return (t - 0.7)[:, None, None, None] * x + push[:, None, None, None]


def _curved_field(x, t, label):
    scale = jnp.where(label == NULL, 0.3, 1.0 + label) + t
    return jnp.sin(2 * x) * scale[:, None, None, None]


def test_a_jump_is_the_recursion_of_the_method():
    x, t, label = _batch()
    null = jnp.full_like(label, NULL)
    g, base = 1.5, 8
    quarter, eighth = jnp.full_like(t, 2 / base), jnp.full_like(t, 1 / base)
    move = lambda x, d, v: x + d[:, None, None, None] * v
    field = _curved_field

    def guide(first, x, t):
        return first(x, t, null) + g * (first(x, t, label) - first(x, t, null))

    def double(step, x, t, d):
        first = step(x, t)
        return (first + step(move(x, d, first), t + d)) / 2

    def two(x, t, label):
        if label is null:
            return double(lambda x, t: field(x, t, null), x, t, eighth)
        return double(lambda x, t: guide(field, x, t), x, t, eighth)

    options = dict(null=NULL, steps=4, base_steps=base, scale=g)
    expected = {
        'all': double(lambda x, t: guide(two, x, t), x, t, quarter),
        'finest': double(lambda x, t: two(x, t, label), x, t, quarter),
        'velocity': diagnostics.guided_steps(
            field, x, t, 4 * eighth, label, null=NULL, scale=g, steps=4
        ),
    }
    for guided, value in expected.items():
        jump = diagnostics.shortcut_jump(field, x, t, label, guided=guided, **options)
        np.testing.assert_allclose(jump, value, rtol=1e-5, atol=1e-5)
    assert np.abs(expected['all'] - expected['finest']).max() > 0.05


def _compounding(field, guided, base=32, g=1.5, **options):
    _, _, label = _batch(16)
    noise, data = (jnp.asarray(x) for x in _normal(2, 16, 2, 2, 1))

    def jump(x, t, d):
        return diagnostics.shortcut_jump(
            field, x, t, label, null=NULL, base_steps=base, scale=g, guided=guided,
            steps=round(float(d[0]) * base),
        )  # fmt: skip

    return diagnostics.compounding(
        jump, field, noise, data, label, null=NULL, base_steps=base, **options
    )


@pytest.mark.parametrize(
    'guided, expected',
    [
        ('all', lambda n: 1.5 ** math.log2(n)),
        ('finest', lambda n: 1.5 if n > 1 else 1.0),
        ('velocity', lambda n: 1.5),
    ],
)
def test_proposition_1_is_exact_where_it_should_be(guided, expected):
    found = _compounding(_affine_field, guided)
    assert list(found) == [1, 2, 4, 8, 16, 32]
    for steps, scale in found.items():
        assert scale.scale == pytest.approx(expected(steps), rel=2e-3), steps
        assert scale.explained > 0.9999 and scale.is_clear()


def test_the_scale_of_guided_steps_is_found_in_any_field():
    found = _compounding(_curved_field, 'velocity')
    assert all(e.scale == pytest.approx(1.5, abs=5e-3) for e in found.values())
    # A field that is guided already: the same jump, counted in the field's own scale.
    again = _compounding(_curved_field, 'velocity', base=4, field_scale=2.0)
    assert again[4].scale == pytest.approx(3.0, abs=1e-2)


def test_the_closed_form_deviates_as_its_docstring_says():
    found = diagnose.closed_form_compounding(0.9 * diagnose.DATA_STD)
    compounded = {n: found['SM, all levels'][n].scale for n in (8, 32, 64)}
    assert compounded == pytest.approx({8: 3.381, 32: 7.820, 64: 12.236}, rel=2e-3)
    assert found['SM, all levels'][128].scale > 1.3 * 1.5**7
    for name, first in (('SM, finest', 1.0), ('iSM', 1.5)):
        scales = [e.scale for e in found[name].values()]
        assert scales == pytest.approx([first] + 7 * [1.5], abs=5e-3)
    table = diagnose.compounding_table(found, 1.5).splitlines()
    assert table[0].split() == 'N g ** log2 N SM, all levels SM, finest iSM'.split()
    assert table[4].split() == ['8', '3.375', '3.381', '1.500', '1.500']


def test_small_steps_are_guided_from_the_interval_on():
    x, _, label = _batch()
    t, d = jnp.zeros(6), jnp.ones(6)
    steps = lambda **options: diagnostics.guided_steps(
        _affine_field, x, t, d, label, null=NULL, steps=4, **options
    )
    early = diagnostics.guided_steps(
        _affine_field, x, t, d / 2, label, null=NULL, steps=2, scale=1.0
    )
    late = diagnostics.guided_steps(
        _affine_field, x + early / 2, t + 0.5, d / 2, label, null=NULL, steps=2,
        scale=4.0,
    )  # fmt: skip
    found = steps(scale=4.0, interval=0.5)
    np.testing.assert_allclose(found, (early + late) / 2, rtol=1e-5, atol=1e-6)
    assert np.abs(found - steps(scale=4.0)).max() > 0.1


def test_a_scale_that_nothing_explains_is_not_clear():
    x, t, label = _batch()
    steps = jax.jit(
        lambda scale: diagnostics.guided_steps(
            _affine_field, x, t, t * 0 + 0.5, label, null=NULL, scale=scale, steps=2
        )
    )
    away = steps(2.0) + 50 * _normal(*x.shape, seed=1)
    assert not diagnostics.effective_scale(away, steps).is_clear()
    assert not diagnostics.effective_scale(steps(500.0), steps).is_clear()
    assert diagnostics.effective_scale(steps(2.0), steps).is_clear()


# 2. Inflexible guidance.


def test_response_is_the_distance_that_samples_move():
    start, direction = _normal(2, 5, 4, 4, 1)
    direction /= diagnostics.rms(direction)
    move = lambda lengths: start + np.reshape(lengths, (-1, 1, 1, 1, 1)) * direction
    response = diagnostics.guidance_response(move([0, 1, 3, 2]))
    np.testing.assert_allclose(response.distance, [0, 1, 3, 2], rtol=1e-5)
    assert response.monotone == pytest.approx(2 / 3)
    baked = diagnostics.guidance_response(move([1, 1, 1]))
    assert baked.monotone == 0 and not baked.distance.any()
    agree = diagnostics.displacement_agreement
    assert agree(move([0, 1]), move([0, 2])) == pytest.approx((0.5, 1), rel=1e-4)
    assert agree(move([0, -3]), move([0, 1])) == pytest.approx((3, -1), rel=1e-4)
    assert agree(move([1, 1]), move([0, 1])) == (0, 0)


# 3. Frequency bias.


def test_white_images_have_a_flat_spectrum():
    frequencies, power = diagnostics.radial_power(_normal(200, 32, 24, 2))
    assert frequencies[0] == 0 and frequencies[-1] == 0.5 and len(power) == 13
    np.testing.assert_allclose(power[1:], 1, atol=0.1)  # The first is of 8 waves.


def test_a_blur_has_its_transfer_function():
    """A single bright pixel is exactly white; a mean of two pixels is a cosine."""
    impulse = np.zeros((1, 32, 32, 1))
    impulse[0, 3, 5] = 32  # So that its mean square is 1.
    blurred = (impulse + np.roll(impulse, 1, axis=1)) / 2
    _, white = diagnostics.radial_power(impulse)
    np.testing.assert_allclose(white, 1, rtol=1e-9)
    frequencies, power = diagnostics.radial_power(blurred)
    rows = np.fft.fftfreq(32)[:, None]
    transfer = np.cos(np.pi * rows) ** 2 + np.zeros((32, 32))
    radius = np.hypot(rows, rows.T)
    for frequency, value in zip(frequencies, power):
        ring = np.abs(radius - frequency) < 1 / 64
        assert value == pytest.approx(transfer[ring].mean(), rel=1e-6)
    expected = -np.log(power[frequencies > 0.25]).mean()
    found = diagnostics.high_frequency_error(blurred, impulse)
    assert found == pytest.approx(expected) and found > 0.3


def test_frequency_error_counts_too_much_like_too_little():
    images = _normal(50, 16, 16, 1)
    error = diagnostics.high_frequency_error
    assert error(2 * images, images) == pytest.approx(math.log(4))
    assert error(images, 2 * images) == pytest.approx(math.log(4))
    assert error(images[:25], images[25:]) < 0.1
    # Low frequencies do not count.
    assert error(images + 5, images) == pytest.approx(0, abs=1e-6)


def test_wavelet_levels_are_coarse_to_fine():
    row, column = np.indices((16, 16))
    checker = np.zeros((1000, 16, 16, 1), np.float32)
    checker += ((-1.0) ** (row + column))[None, :, :, None]
    power = diagnostics.level_power(checker)
    assert power.shape == (4,)
    np.testing.assert_allclose(power, [0, 0, 0, 4 / 3], atol=1e-6)
    white = diagnostics.level_power(_normal(*checker.shape))
    np.testing.assert_allclose(white, 1, atol=0.1)


# 4. Divergent self-consistency.


def _exact_velocity(x, t, d, w, label):
    """Of dx/dt = x: the mean over d is x (e^d - 1) / d."""
    del t, w, label
    return x * (jnp.expm1(d) / d)[:, None, None, None]


@pytest.mark.parametrize('too_long', [0.0, 0.25])
def test_self_consistency_error_is_the_relative_excess(too_long):
    x, t, label = _batch()
    d = jnp.full_like(t, 0.25)

    def velocity(x, t, d, w, label):
        excess = jnp.where(d > 0.3, 1 + too_long, 1.0)[:, None, None, None]
        return excess * _exact_velocity(x, t, d, w, label)

    error = diagnostics.self_consistency_error(velocity, x, t, d, 0 * t, label)
    assert error == pytest.approx(too_long / (1 + too_long), abs=1e-6)


def test_the_second_half_step_starts_where_the_first_ends():
    x, t, label = _batch()
    d = jnp.full_like(t, 0.25)
    velocity = lambda x, t, d, w, label: (t + 0.5 * d)[:, None, None, None] + 0 * x
    error = diagnostics.self_consistency_error(velocity, x, t, d, 0 * t, label)
    assert error == pytest.approx(0, abs=1e-6)  # dx/dt = t


def test_lag_of_parameters():
    online = {'a': np.full((3,), 2.0), 'b': [np.full((2, 2), -1.0)]}
    target = jax.tree.map(lambda leaf: 1.02 * leaf, online)
    assert diagnostics.parameter_distance(target, online) == pytest.approx(0.02)
    moved = {'a': online['a'] + np.array([3, 0, 0]), 'b': online['b']}
    assert diagnostics.parameter_distance(moved, online) == pytest.approx(3 / 4)
    assert diagnostics.relative_rms(np.array([0, 2.0]), np.array([4.0, 0])) == 0.5


# 5. Curvy trajectories.


def test_straight_paths_and_half_circles():
    steps = np.array([0.5, 0.25, 0.125, 0.125])
    t = np.concatenate([[0], np.cumsum(steps)])[:, None, None]
    straight = _normal(3, 5)[None] * t + 1
    np.testing.assert_allclose(diagnostics.path_length_ratio(straight), 1, rtol=1e-6)
    assert diagnostics.straightness(straight, steps) == pytest.approx(0, abs=1e-12)
    assert diagnostics.path_profile(straight)[1].max() < 1e-6

    angle = np.linspace(0, np.pi, 2001)[:, None]
    circle = 3 * np.stack([-np.cos(angle), np.sin(angle)], axis=-1)
    steps = np.full(2000, 1 / 2000)
    np.testing.assert_allclose(
        diagnostics.path_length_ratio(circle), np.pi / 2, rtol=1e-6
    )
    # Speed 3 pi, chord 6, two values: (9 pi^2 - 36) / 2.
    expected = (9 * np.pi**2 - 36) / 2
    assert diagnostics.straightness(circle, steps) == pytest.approx(expected, rel=1e-5)
    along, across = diagnostics.path_profile(circle)
    assert along[0] == 0 and along[-1] == pytest.approx(1)
    assert across.max() == pytest.approx(0.5)


def test_trajectory_is_the_samplers_path():
    x, _, label = _batch()
    times, steps = np.array([0, 0.5, 0.75]), np.array([0.5, 0.25, 0.25])
    path = diagnostics.trajectory(
        _exact_velocity, x, jnp.zeros(6), label, *np.float32([times, steps])
    )
    for point, t in zip(path, [0, 0.5, 0.75, 1]):
        np.testing.assert_allclose(point, np.exp(t) * x, rtol=1e-5)


def test_crossing_rate_is_the_share_of_cheaper_swaps():
    noise, data = _normal(2, 12, 3)
    cost = lambda i, j: np.sum((noise[i] - data[j]) ** 2)
    pairs = list(itertools.combinations(range(12), 2))
    better = [
        cost(i, j) + cost(j, i) < cost(i, i) + cost(j, j) for i, j in pairs
    ]  # fmt: skip
    found = diagnostics.crossing_rate(noise, data)
    assert found == pytest.approx(np.mean(better), abs=0.01)
    assert 0.2 < found < 0.8


def test_crossing_rate_of_known_couplings():
    noise, data = _normal(2, 300, 6)
    assert diagnostics.crossing_rate(*_normal(2, 4000, 6)) == pytest.approx(
        0.5, abs=0.02
    )
    cost = ((noise[:, None] - data[None]) ** 2).sum(-1)
    _, partner = optimize.linear_sum_assignment(cost)
    assert diagnostics.crossing_rate(noise, data[partner]) == 0
    line = np.sort(_normal(50))[:, None]
    assert diagnostics.crossing_rate(line, line[::-1]) == 1
    # Optimal within each class, of which one is paired far away.
    labels = np.arange(50) % 2
    data = line - 100 * labels[:, None]
    assert diagnostics.crossing_rate(line, data, labels=labels) == 0
    assert 0.1 < diagnostics.crossing_rate(line, data) < 0.5


# Refusals.


@pytest.mark.parametrize(
    'call, words',
    [
        (lambda: diagnostics.relative_rms(np.ones(3), np.zeros(3)), 'mean square of 0'),
        (lambda: _jump(guided='some'), "'some'"),
        (lambda: _jump(steps=3), 'power of two'),
        (lambda: _jump(steps=16), '1 .. 8'),
        (
            lambda: diagnostics.effective_scale(np.full(3, np.nan), lambda g: 0),
            '3 values',
        ),
        (
            lambda: diagnostics.effective_scale(np.ones(3), lambda g: np.ones(3)),
            'does not depend on the label',
        ),
        (lambda: diagnostics.guidance_response(np.zeros((1, 2, 4, 4, 1))), 'two stren'),
        (lambda: diagnostics.radial_power(np.zeros((4, 4, 1))), r'\(4, 4, 1\)'),
        (lambda: diagnostics.radial_power(np.zeros((1, 2, 8, 1))), 'at least 4'),
        (lambda: diagnostics.log_ratio(np.ones(3), np.zeros(3)), 'positive'),
        (lambda: diagnostics.log_ratio(np.ones(3), np.ones(4)), 'one shape'),
        (lambda: diagnostics.parameter_distance([np.ones(2)], [np.zeros(2)]), 'all'),
        (lambda: _consistency(0.75), 'reaches 1.5'),
        (lambda: diagnostics.path_length_ratio(np.zeros((1, 2, 3))), 'one step'),
        (lambda: diagnostics.path_length_ratio(np.zeros((3, 2, 3))), '2 paths end'),
        (lambda: diagnostics.straightness(np.zeros((3, 2, 3)), [1]), '2 steps'),
        (lambda: diagnostics.crossing_rate(np.ones((3, 2)), np.ones((2, 2))), 'same'),
        (
            lambda: diagnostics.crossing_rate(
                np.ones((3, 2)), np.ones((3, 2)), labels=[0, 1, 2]
            ),
            'larger pool',
        ),
        (lambda: diagnose.diagnose('nowhere'), 'holds no run'),
        (lambda: diagnose.diagnose('nowhere', samples=3), 'at least 16'),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def _jump(**options):
    x, t, label = _batch()
    options = dict(null=NULL, steps=2, base_steps=8, scale=2, guided='all') | options
    return diagnostics.shortcut_jump(_affine_field, x, t, label, **options)


def _consistency(d):
    x, t, label = _batch()
    d, t = jnp.full_like(t, d), 0 * t
    return diagnostics.self_consistency_error(_exact_velocity, x, t, d, t, label)


# The report.


class _Page(parser.HTMLParser):
    """Checks that tags are closed in order; keeps headings, cells and pictures."""

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


FAULTS = (
    'Compounding guidance',
    'Inflexible guidance',
    'Frequency bias',
    'Divergent self-consistency',
    'Curvy trajectories',
)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, one_device):
    config = runpy.run_path(ROOT / 'configs/quickstart.py')['get_config']('runlocal')
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


def test_averages_of_a_checkpoint(workdir):
    workdir, (online, target, infer) = workdir
    run = trained_network.load(workdir)
    averages = diagnose.load_averages(workdir, run)
    assert list(averages) == ['online', 'target', 'infer']
    jax.tree.map(
        np.testing.assert_array_equal,
        averages,
        {'online': online, 'target': target, 'infer': infer},
    )
    lag = diagnostics.parameter_distance(averages['target'], averages['online'])
    assert 1e-4 < lag < 0.5


def test_the_command_writes_a_whole_report(workdir, tmp_path):
    workdir, _ = workdir
    out = tmp_path / 'page.html'
    done = subprocess.run(
        [
            sys.executable, '-m', 'ism_jax.diagnose', '--workdir', str(workdir),
            '--out', str(out), '--samples', '16',
        ],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {'XLA_FLAGS': ''},
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


def _subject(objective, name, network):
    """A subject around any function in place of a network."""
    apply = lambda params, *inputs: params * network(*inputs)
    size = 32
    noise, data = _normal(2, size, *SHAPE)
    params = jnp.ones(())
    return diagnose.Subject(
        name=name, objective=objective,
        sampler=Sampler(objective, apply, SHAPE, batch_size=size), params=params,
        velocity=jax.jit(
            lambda params, *inputs: objective.velocity(apply, params, *inputs)
        ),
        noise=noise, data=data, label=np.arange(size, dtype=np.int32) % NULL,
        pairs=size, coupling='independent',
        averages={'online': params, 'target': 0.9 * params, 'infer': params}, seed=0,
    )  # fmt: skip


def _network(x, t, d, w, label):
    del d
    push = (1 + w) * jnp.where(label == NULL, 0.0, label + 1.0)
    return push[:, None, None, None] - 0.5 * x


def _objective(name, **options):
    return objectives.load(name)(num_classes=NULL, **options)


def test_methods_without_steps_or_guidance_say_so():
    closed = _compounding(_affine_field, 'all', base=4)
    for name, guidance in (('flow_matching', True), ('consistency', False)):
        subject = _subject(_objective(name), name, _network)
        compounding = diagnose.diagnose_compounding(subject, {'SM': closed})
        consistency = diagnose.diagnose_consistency(subject)
        for section in (compounding, consistency):
            assert section.grade == 'none' and 'does not apply' in section.number
            assert name in section.verdict and section.figure
        # The lag is there all the same.
        assert '10 % in parameters, 10 % in outputs' in consistency.number
        response = diagnose.diagnose_response(subject)
        assert ('does not apply' in response.number) != guidance
        if guidance:
            assert response.grade == 'good', response
        page = report.page('a < b', 'about', [compounding, response], 'notes')
        assert 'a &lt; b' in page and len(_Page(page).text['td']) == 8
    paths = diagnose.diagnose_paths(subject)
    assert 'adds noise' in paths.verdict and '(same class)' in paths.number


def test_baked_guidance_is_inflexible_and_its_compounding_is_found():
    """A network whose long steps have the guidance that proposition 1 predicts."""
    base, w = 8, 0.5
    objective = _objective('shortcut', base_steps=base, guidance=w, cfg_levels='all')

    def network(x, t, d, _, label):
        push = jnp.where(label == NULL, 0.0, label + 1.0)
        doublings = jnp.where(d > 0, jnp.log2(jnp.maximum(d, 1 / base) * base), 0.0)
        return (push * (1 + w) ** doublings)[:, None, None, None] + 0 * x

    subject = _subject(objective, 'shortcut', network)
    scales = diagnose.measure_compounding(subject, w)
    # The sampler guides the smallest step itself.
    expected = {1: 1.5, 2: 1.5, 4: 1.5**2, 8: 1.5**3}
    for steps, value in expected.items():
        assert scales[steps].scale == pytest.approx(value, rel=5e-3)
    section = diagnose.diagnose_compounding(subject, {'SM': scales})
    assert section.grade == 'poor' and 'at N = 8, asked for 1.5' in section.number
    assert '2.2 times the one asked for' in section.verdict
    response = diagnose.diagnose_response(subject)
    assert response.grade == 'poor' and 'baked in' in response.number


def test_intrinsic_guidance_keeps_its_scale():
    objective = _objective('ism', base_steps=8, guidance_interval=0.0)

    def network(x, t, d, w, label):
        del t, d
        push = (1 + w) * jnp.where(label == NULL, 0.0, label + 1.0)
        return push[:, None, None, None] + 0 * x

    subject = _subject(objective, 'ism', network)
    scales = diagnose.measure_compounding(subject, 1.5)
    assert all(e.scale == pytest.approx(2.5, rel=5e-3) for e in scales.values())
    assert diagnose.diagnose_compounding(subject, {'SM': scales}).grade == 'good'
    response = diagnose.diagnose_response(subject)
    assert response.grade == 'good' and '100 % as far' in response.number
    paths = diagnose.diagnose_paths(subject)
    assert paths.grade == 'good' and 'length 1.000, S = 0.000' in paths.number
    consistency = diagnose.diagnose_consistency(subject)
    assert consistency.number.startswith('error 0.000; target lags by 10 %')


def test_guidance_that_the_smallest_step_has_is_counted():
    objective = _objective('meanflow', guidance=1.0)
    subject = _subject(
        objective, 'meanflow', lambda x, t, d, w, label: _network(x, t, d, 1 + w, label)
    )
    assert subject.field_scale() == 2
    with_cfg = _subject(_objective('shortcut', guidance=1.0), 'shortcut', _network)
    assert with_cfg.field_scale() == 1
