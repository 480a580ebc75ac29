"""The terms of iSM against its equations and a closed-form flow.

`Recorder` calls the objective with a function in place of the network and records every
call, so that targets are compared with the equations.
"""

import itertools

from ideal_networks import batch_of, flow
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.method import interpolant
from ism_jax.method.training_batch import Batch
from ism_jax.objectives import flow_matching, ism

NULL = 4
BATCH = 64


def _objective(**options):
    return ism.Objective(num_classes=NULL, **options)


def _batch(size=BATCH, seed=0):
    rng = np.random.default_rng(seed)
    noise, data = rng.normal(size=(2, size, 2, 2, 1)).astype(np.float32)
    label = (np.arange(size) % NULL).astype(np.int32)
    return Batch(jnp.asarray(noise), jnp.asarray(data), jnp.asarray(label))


def _network(params, x, t, d, w, label, interval=None):
    """An arbitrary function of all inputs."""
    if interval is not None:
        t = t + w * (interval[:, 0] - 2 * interval[:, 1])
    scalar = params + jnp.sin(3 * t) + 2 * d + 0.3 * w + 0.7 * label
    return jnp.cos(x) * scalar[:, None, None, None]


class Recorder:
    """Calls the objective and records the network's calls and the errors."""

    def __init__(self, objective, batch, *, network=_network, key=0):
        def run(batch, key):
            calls, errors = [], []

            def apply(*inputs):
                calls.append(inputs)
                return network(*inputs)

            def distance(error):
                errors.append(error)
                return jnp.mean(error**2, axis=(1, 2, 3)), {}

            options = dict(distance=distance, progress=0.0)
            loss, metrics = objective(apply, 1.0, 2.0, batch, key, **options)
            return calls, errors, loss, metrics

        # The inputs of a call within a derivative cannot leave a compiled function.
        transform = (lambda f: f) if objective.has_forward_derivative else jax.jit
        self.calls, self.errors, self.loss, self.metrics = transform(run)(
            batch, jax.random.key(key)
        )
        self.student = self.calls[-1][1:]

    def part(self, number):
        """The student's inputs of one term, see `_take`."""
        return [_take(a, (2, 1, 1), number) for a in self.student if a is not None]


def _parts(batch, split=(2, 1, 1)):
    """Indices of the samples of each term, by the documented pattern."""
    position = np.arange(len(batch.label)) % sum(split)
    bounds = itertools.pairwise(np.cumsum((0, *split)))
    return [np.flatnonzero((position >= a) & (position < b)) for a, b in bounds]


def _take(array, split, part):
    """Samples of one part of an interleaved call."""
    position = np.arange(len(array)) % sum(split)
    start = sum(split[:part])
    return np.asarray(array)[(position >= start) & (position < start + split[part])]


def test_one_student_pass_and_two_teacher_passes():
    record = Recorder(_objective(), _batch())
    params = [call[0] for call in record.calls]
    sizes = [len(call[2]) for call in record.calls]
    assert params == [2.0, 2.0, 1.0]  # Target, target, online.
    assert sizes == [48, 16, 64]  # Guidance twice + consistency, consistency, all.


def test_velocity_and_guidance_targets():
    batch = _batch()
    objective = _objective(label_dropout=0.5)
    record = Recorder(objective, batch)
    velocity, guided, _ = _parts(batch)
    student = record.calls[2]
    x, t, d, w, label = (_take(a, (2, 1, 1), 0) for a in student[1:])
    np.testing.assert_array_equal(d, 0)
    np.testing.assert_array_equal(w, 0)
    expected = (1 - t)[:, None, None, None] * batch.noise[velocity]
    expected += t[:, None, None, None] * batch.data[velocity]
    np.testing.assert_allclose(x, expected, atol=1e-6)
    dropped = label == NULL
    assert 4 < dropped.sum() < 28
    np.testing.assert_array_equal(label[~dropped], batch.label[velocity][~dropped])
    error = _network(1.0, x, t, d, w, label) - (batch.data - batch.noise)[velocity]
    np.testing.assert_allclose(record.errors[0], error, atol=1e-5)

    x, t, d, w, label = (_take(a, (2, 1, 1), 1) for a in student[1:])
    np.testing.assert_array_equal(d, 0)
    np.testing.assert_array_equal(label, batch.label[guided])
    assert w.min() >= 0.25 and w.max() <= 3.5 and len(set(w.tolist())) > 5
    zero, null = np.zeros_like(w), np.full_like(label, NULL)
    difference = _network(2.0, x, t, d, zero, label) - _network(
        2.0, x, t, d, zero, null
    )
    acting = np.where(t >= 0.3, w, 0.0)
    assert 0 < (acting == 0).sum() < len(acting)
    target = (batch.data - batch.noise)[guided] + acting[
        :, None, None, None
    ] * difference
    error = _network(1.0, x, t, d, w, label) - target
    np.testing.assert_allclose(record.errors[1], error, atol=1e-4)


@pytest.mark.parametrize('midpoint', ['target', 'online'])
def test_consistency_targets(midpoint):
    batch = _batch()
    record = Recorder(_objective(midpoint=midpoint), batch)
    assert [call[0] for call in record.calls].count(1.0) == (
        1 if midpoint == 'target' else 2
    )
    x, t, whole, w, label = (_take(a, (2, 1, 1), 2) for a in record.calls[-1][1:])
    d = whole / 2
    # Steps 2d are 1, 1/2, ..., 2/128 in equal numbers, and start at their multiples.
    levels = np.log2(1 / whole)
    assert (levels == levels.round()).all() and levels.min() == 0 and levels.max() == 6
    counts = np.bincount(levels.astype(int), minlength=7)
    assert counts.max() - counts.min() <= 1
    assert (t % whole == 0).all() and (t + whole <= 1).all()
    assert w.min() >= 0 and len(set(w.tolist())) > 4
    embedded = np.where(d == 1 / 128, 0, d)  # The finest step is the velocity.
    assert (embedded == 0).any() and (embedded > 0).any()
    first = _network(2.0, x, t, embedded, w, label)
    move = first if midpoint == 'target' else _network(1.0, x, t, embedded, w, label)
    second = _network(2.0, x + d[:, None, None, None] * move, t + d, embedded, w, label)
    error = _network(1.0, x, t, whole, w, label) - (first + second) / 2
    np.testing.assert_allclose(record.errors[2], error, atol=1e-4)
    total = sum(jnp.mean(e**2) for e in record.errors)
    np.testing.assert_allclose(record.loss, total, rtol=1e-5)


def test_no_gradient_flows_into_targets():
    batch = _batch()

    def loss(params, target_params, midpoint):
        apply = lambda p, *args: p * _network(1.0, *args)
        distance = lambda e: (jnp.mean(e**2, axis=(1, 2, 3)), {})
        return _objective(midpoint=midpoint)(
            apply,
            params,
            target_params,
            batch,
            jax.random.key(0),
            distance=distance,
            progress=0.0,
        )[0]

    for midpoint in ('target', 'online'):
        assert jax.grad(loss, argnums=1)(1.0, 2.0, midpoint) == 0
        assert jax.grad(loss)(1.0, 2.0, midpoint) != 0


def test_consistency_errors_have_a_pseudo_huber_loss():
    batch, c = _batch(), 0.5
    record = Recorder(_objective(loss_weights=(0.0, 0.0, 1.0)), batch)
    square = np.mean(np.asarray(record.errors[2]) ** 2, axis=(1, 2, 3))
    assert square.min() < c**2 < square.max()
    options = dict(loss_weights=(0.0, 0.0, 1.0), consistency_huber=c)
    huber = Recorder(_objective(**options), batch)
    expected = 2 * c**2 * (np.sqrt(1 + square / c**2) - 1)
    np.testing.assert_allclose(huber.loss, expected.mean(), rtol=1e-5)


def test_loss_weights_and_split():
    batch = _batch()
    errors = [jnp.mean(e**2) for e in Recorder(_objective(), batch).errors]
    weighted = Recorder(_objective(loss_weights=(1.0, 0.5, 3.0)), batch)
    expected = errors[0] + 0.5 * errors[1] + 3 * errors[2]
    np.testing.assert_allclose(weighted.loss, expected, rtol=1e-5)
    split = Recorder(_objective(batch_split=(1, 1, 2)), batch)
    assert [len(e) for e in split.errors] == [16, 16, 32]
    alone = Recorder(_objective(batch_split=(0, 0, 1)), batch)
    assert [len(e) for e in alone.errors] == [64] and len(alone.calls) == 3


def test_without_intrinsic_guidance_w_is_zero():
    record = Recorder(_objective(intrinsic_guidance=False), _batch())
    assert all((call[4] == 0).all() for call in record.calls)
    assert 'guidance/loss' not in record.metrics
    assert [len(e) for e in record.errors] == [48, 16]  # Velocity takes its samples.
    assert _objective(intrinsic_guidance=False).guidance_range == (0, 0)


def test_without_interval_guidance_acts_everywhere():
    batch = _batch()
    always = Recorder(_objective(guidance_interval=0.0), batch)
    late = Recorder(_objective(guidance_interval=0.3), batch)
    t = _take(late.calls[-1][2], (2, 1, 1), 1)
    changed = np.abs(always.errors[1] - late.errors[1]).max((1, 2, 3)) > 1e-6
    np.testing.assert_array_equal(changed, t < 0.3)


def _affine_flow(mean, scale):
    """Velocity and flow of N(0, I) to N(mean_c, scale_c^2), in closed form.

    With independent pairs x_t is Gaussian with mean t m and variance
    s_t^2 = (1 - t)^2 + t^2 scale^2, and the flow is affine:
    phi_{t -> u}(x) = u m + (s_u / s_t) (x - t m).
    """

    def deviation(t, c):
        return jnp.sqrt((1 - t) ** 2 + (t * scale[c]) ** 2)

    def velocity(x, t, c):
        m, s2 = mean[c], deviation(t, c) ** 2
        slope = (t * scale[c] ** 2 - (1 - t)) / s2
        expand = lambda a: a[:, None, None, None]
        return expand(m) + expand(slope) * (x - expand(t * m))

    def step(params, x, t, d, w, c):
        """Mean velocity over [t, t + d]; the velocity itself where d = 0."""
        del params, w
        expand = lambda a: a[:, None, None, None]
        end = jnp.minimum(t + d, 1.0)
        ratio = deviation(end, c) / deviation(t, c)
        moved = expand(end * mean[c]) + expand(ratio) * (x - expand(t * mean[c]))
        average = (moved - x) / expand(jnp.where(d > 0, d, 1.0))
        return jnp.where(expand(d) > 0, average, velocity(x, t, c))

    return velocity, step


def test_the_true_flow_map_is_self_consistent():
    """Targets are exact except at the finest step, which has d = 0 and errs by O(d)."""
    mean = jnp.array([1.0, -2.0, 0.5, 3.0, 0.0])
    scale = jnp.array([0.5, 1.0, 2.0, 0.7, 1.5])
    _, step = _affine_flow(mean, scale)
    record = Recorder(_objective(batch_split=(0, 0, 1)), _batch(256), network=step)
    whole = np.asarray(record.calls[-1][3])
    error = np.abs(record.errors[0]).max((1, 2, 3))
    assert error[whole > 2 / 128].max() < 1e-4
    finest = error[whole == 2 / 128]
    assert 1e-4 < finest.max() < 0.2
    coarse = Recorder(
        _objective(batch_split=(0, 0, 1), base_steps=32), _batch(256), network=step
    )
    larger = np.abs(coarse.errors[0]).max((1, 2, 3))
    larger = larger[np.asarray(coarse.calls[-1][3]) == 2 / 32]
    assert 2 < larger.mean() / finest.mean() < 8  # First order: four times the step.


def test_second_half_step_starts_at_t_plus_d():
    """With t, as on the poster, the true map would not be self-consistent."""
    _, step = _affine_flow(jnp.array([1.0, -2, 0.5, 3, 0]), jnp.full(5, 0.5))
    x, t = jnp.ones((1, 2, 2, 1)), jnp.zeros(1)
    d, w, c = jnp.full(1, 0.5), jnp.zeros(1), jnp.zeros(1, int)
    first = step(0, x, t, d, w, c)
    half = x + 0.5 * first
    whole = step(0, x, t, 2 * d, w, c)
    right = (first + step(0, half, t + d, d, w, c)) / 2
    wrong = (first + step(0, half, t, d, w, c)) / 2
    assert jnp.abs(whole - right).max() < 1e-5 < 0.1 < jnp.abs(whole - wrong).max()


def test_the_conditional_velocity_minimises_the_velocity_loss():
    mean, scale = jnp.array([1.0, -2.0, 0.5, 3.0, 0.0]), jnp.full(5, 0.5)
    velocity, step = _affine_flow(mean, scale)
    rng = np.random.default_rng(0)
    label = (np.arange(4096) % 4).astype(np.int32)
    noise = rng.normal(size=(4096, 1, 1, 1)).astype(np.float32)
    data = np.asarray(mean)[label][:, None, None, None]
    data = data + 0.5 * rng.normal(size=noise.shape).astype(np.float32)
    batch = Batch(jnp.asarray(noise), jnp.asarray(data), jnp.asarray(label))
    objective = flow_matching.Objective(num_classes=4, label_dropout=0.0)
    losses = [
        float(Recorder(objective, batch, network=network).loss)
        for network in (step, lambda *a: step(*a) + 0.1, lambda *a: 1.1 * step(*a))
    ]
    assert losses[0] < min(losses[1:])


def test_every_draw_depends_on_the_key():
    batch = _batch()
    first, same, other = (Recorder(_objective(), batch, key=k) for k in (0, 0, 1))
    assert first.loss == same.loss != other.loss


def test_metrics_per_level():
    record = Recorder(_objective(), _batch())
    counts = [
        float(record.metrics[f'consistency_samples/step_1_over_{2**k}'])
        for k in range(7)
    ]
    assert sum(counts) == 16
    errors = [
        float(record.metrics[f'consistency_error/step_1_over_{2**k}']) for k in range(7)
    ]
    mean = sum(c * e for c, e in zip(counts, errors, strict=True)) / 16
    np.testing.assert_allclose(mean, record.metrics['consistency/loss'], rtol=1e-5)


def test_the_smallest_batch_has_every_step_size():
    for split in ((2, 1, 1), (3, 0, 4), (0, 0, 1), (1, 2, 0)):
        objective = _objective(batch_split=split)
        size = objective.min_batch
        assert size % objective.batch_multiple == 0
        if split[2]:
            record = Recorder(objective, _batch(size))
            assert len(set(np.asarray(record.calls[-1][3]).tolist()) - {0.0}) == 7


def test_ism_targets_of_the_exact_guided_map():
    """Exact at any w, but not at the finest level: there a velocity replaces a step."""

    def errors(base_steps):
        objective = ism.Objective(
            num_classes=8,
            base_steps=base_steps,
            batch_split=(0, 0, 1),
            guidance_interval=0.0,
        )
        batch = batch_of(jax.random.key(0), 512)
        record = Recorder(objective, batch, network=flow, key=1)
        _, _, size, w, _ = record.student
        assert len(set(np.asarray(w).tolist())) == 15
        fine = np.asarray(size) == 2 / base_steps
        (error,) = record.errors
        error = np.abs(error).max((1, 2, 3))
        return error[~fine].max(), error[fine].mean()

    coarse, finest = zip(*map(errors, (64, 128)), strict=True)
    assert max(coarse) < 1e-4 < finest[1]
    assert 1.5 < finest[0] / finest[1] < 2.7


def test_the_guided_target_uses_the_network_at_w():
    batch = _batch()
    record = Recorder(_objective(guidance_target='guided'), batch)
    _, guided, _ = _parts(batch)
    x, t, d, w, label = record.part(1)
    null = np.full_like(label, NULL)
    difference = _network(2.0, x, t, d, w, label) - _network(2.0, x, t, d, 0 * w, null)
    acting = np.where(t >= 0.3, w / (1 + w), 0.0)[:, None, None, None]
    target = (batch.data - batch.noise)[guided] + acting * difference
    error = _network(1.0, x, t, d, w, label) - target
    np.testing.assert_allclose(record.errors[1], error, atol=1e-4)


def test_the_interval_is_an_input_and_bounds_the_guidance():
    batch = _batch(256)
    objective = _objective(interval='input')
    assert objective.conditions_on_interval
    assert objective.model_options == {'interval_input': True}
    record = Recorder(objective, batch)
    assert all(call[6] is not None for call in record.calls)
    x, t, d, w, label, interval = record.part(1)
    start, end = interval.T
    assert (start < 0.5).all() and (end > 0.5).all() and start.std() > 0.1
    network = lambda params, w, label: _network(
        params, x, t + w * (start - 2 * end), d, w, label
    )
    difference = network(2.0, 0 * w, label) - network(2.0, 0 * w, 0 * label + NULL)
    acting = np.where((t >= start) & (t <= end), w, 0.0)
    assert 0.2 < (acting == 0).mean() < 0.8
    _, guided, _ = _parts(batch)
    target = (batch.data - batch.noise)[guided]
    error = network(1.0, w, label) - target - acting[:, None, None, None] * difference
    np.testing.assert_allclose(record.errors[1], error, atol=1e-4)
    # The teacher of a step has the same interval as the student.
    *_, second = record.calls[-2]
    np.testing.assert_array_equal(second, record.part(2)[-1])


def test_null_labels_are_trained_without_guidance_in_all_terms():
    batch = _batch(256)
    record = Recorder(_objective(null_share=0.3), batch)
    for number in (1, 2):
        dropped = record.part(number)[4] == NULL
        assert 0.15 < dropped.mean() < 0.45
    x, t, d, w, label = record.part(1)
    _, guided, _ = _parts(batch)
    error = _network(1.0, x, t, d, w, label) - (batch.data - batch.noise)[guided]
    null = label == NULL
    np.testing.assert_allclose(record.errors[1][null], error[null], atol=1e-5)
    assert (Recorder(_objective(), batch).part(1)[4] != NULL).all()


@pytest.mark.parametrize('draw, median', [('uniform', 1.75), ('log_uniform', 1.12)])
def test_guidance_scales_are_drawn_continuously(draw, median):
    record = Recorder(_objective(guidance_draw=draw), _batch(1024))
    for number in (1, 2):
        w = record.part(number)[3]
        assert 0 <= w.min() and w.max() <= 3.5 and len(set(w.tolist())) > 250
        assert np.median(w) == pytest.approx(median, abs=0.3)


def test_errors_are_weighted_by_guidance_and_step_size():
    batch = _batch()
    weighted = Recorder(_objective(guidance_power=2.0, step_power=0.5), batch)
    squares = [np.mean(e**2, axis=(1, 2, 3)) for e in weighted.errors]
    expected = squares[0].mean()
    w = weighted.part(1)[3]
    expected += (squares[1] / (1 + w) ** 2).mean()
    d, w = weighted.part(2)[2:4]
    expected += (squares[2] * np.sqrt(d) / (1 + w) ** 2).mean()
    np.testing.assert_allclose(weighted.loss, expected, rtol=1e-5)


def test_times_may_be_logit_normal():
    options = dict(time_draw='logit_normal', time_mean=1.0, time_std=0.5)
    record = Recorder(_objective(**options), _batch(1024))
    for number in (0, 1):
        t = record.part(number)[1]
        logit = np.log(t / (1 - t))
        assert logit.mean() == pytest.approx(1.0, abs=0.1)
        assert logit.std() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize('step_draw, mean', [('ends', 1 / 3), ('uniform', 1 / 2)])
@pytest.mark.parametrize('consistency', ['bootstrap', 'derivative', 'difference'])
def test_steps_of_any_size_are_drawn(consistency, step_draw, mean):
    batch = _batch(1024)
    objective = _objective(consistency=consistency, step_draw=step_draw)
    assert not objective.dyadic and objective.min_batch == 4
    record = Recorder(objective, batch)
    _, t, d, w, label = record.part(2)
    assert (t >= 0).all() and (d > 0).all() and (t + d <= 1).all()
    assert len(set(d.tolist())) == len(d)
    assert d.mean() == pytest.approx(mean, abs=0.05)
    counts = sum(v for k, v in record.metrics.items() if 'consistency_samples' in k)
    assert 0.95 * len(d) < counts <= len(d)  # The rest is shorter than 1 / 64.


@pytest.mark.parametrize(
    'options, tolerance',
    [
        (dict(consistency='derivative', step_draw='ends'), 5e-5),
        (dict(consistency='difference', step_draw='ends'), 1e-2),
        (dict(step_draw='ends'), 5e-5),
        (dict(step_draw='uniform', bootstrap_split='random'), 5e-5),
    ],
)
def test_the_exact_map_is_the_target_of_steps_of_any_size(options, tolerance):
    """At any t, d and w, in contrast to the dyadic bootstrap with its finest step."""
    objective = ism.Objective(
        num_classes=8, batch_split=(0, 0, 1), guidance_interval=0.0, **options
    )
    batch = batch_of(jax.random.key(0), 512)
    record = Recorder(objective, batch, network=flow, key=1)
    assert np.abs(record.errors[0]).max() < tolerance


@pytest.mark.parametrize('consistency', ['derivative', 'difference'])
def test_the_derivative_is_that_of_the_online_network(consistency):
    """And the velocity is that of the target EMA."""
    batch = _batch()
    objective = _objective(consistency=consistency, step_draw='ends')
    record = Recorder(objective, batch)
    x, t, d, w, label = [_take(a, (2, 1, 1), 2) for a in record.calls[-1][1:]]
    target = _network(1.0, x, t, d, w, label) - np.asarray(record.errors[2])
    velocity = _network(2.0, x, t, np.zeros_like(d), w, label)

    def moved(params, h):
        move = h * np.ones_like(t)
        end = interpolant.step(x, velocity, move)
        return _network(params, end, t + h, d - h, w, label)

    slope = {p: (moved(p, 1e-2) - moved(p, -1e-2)) / 2e-2 for p in (1.0, 2.0)}
    expected = velocity + d[:, None, None, None] * slope[1.0]
    np.testing.assert_allclose(target, expected, atol=5e-3)
    assert np.abs(d[:, None, None, None] * (slope[2.0] - slope[1.0])).max() > 0.1
