"""The sampler on flows known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.method import interpolant, time_grid
from ism_jax.objectives import ism
from ism_jax.sampling.sampler import Sampler

SHAPE = (2, 2, 1)


def _sampler(apply, **options):
    objective = ism.Objective(num_classes=10)
    return Sampler(objective, apply, SHAPE, **dict(batch_size=4) | options)


def _run(sampler, params=0.0, labels=range(6), guidance=0.0, steps=1, key=0):
    batches = sampler.batches(
        params, jax.random.key(key), list(labels), guidance=guidance,
        schedule=time_grid.dyadic_schedule(steps),
    )  # fmt: skip
    images, labels = zip(*batches)
    return np.concatenate(images), np.concatenate(labels)


def _noise(count, key=0):
    return interpolant.sample_noise(jax.random.key(key), jnp.arange(count), SHAPE)


@pytest.mark.parametrize('steps', [1, 3, 8, 128])
def test_average_velocities_are_exact_in_any_number_of_steps(steps):
    """dx/dt = x: the average velocity over d is x (e^d - 1) / d."""

    def apply(params, x, t, d, w, label):
        del params, t, w, label
        d = jnp.where(d > 0, d, 1 / 128)[:, None, None, None]
        return x * (jnp.exp(d) - 1) / d

    images, _ = _run(_sampler(apply), steps=steps)
    np.testing.assert_allclose(images, np.e * _noise(6), rtol=2e-4)


def test_one_network_call_per_step_with_what_it_should_see():
    seen = []

    def apply(params, x, t, d, w, label):
        jax.debug.callback(lambda *a: seen.append(a), t, d, w, label)
        return params + 0 * x

    _run(_sampler(apply), labels=[3, 1, 2, 0], guidance=1.5, steps=3)
    assert len(seen) == 3
    assert sorted({(float(t[0]), float(d[0])) for t, d, *_ in seen}) == [
        (0, 0.5), (0.5, 0.25), (0.75, 0.25),
    ]  # fmt: skip
    assert all((w == 1.5).all() for _, _, w, _ in seen)
    np.testing.assert_array_equal(seen[0][3], [3, 1, 2, 0])


def test_noise_belongs_to_the_sample_not_to_the_batch():
    apply = lambda params, x, t, d, w, label: params + 0 * x
    small, labels = _run(_sampler(apply, batch_size=4), params=0.5)
    large, _ = _run(_sampler(apply, batch_size=100), params=0.5)
    np.testing.assert_array_equal(labels, range(6))
    np.testing.assert_array_equal(small, large)
    np.testing.assert_allclose(small, _noise(6) + 0.5, atol=1e-6)
    assert (small != _run(_sampler(apply), params=0.5, key=1)[0]).all()


def test_one_compilation_per_number_of_steps():
    traces = []

    def apply(params, x, t, d, w, label):
        traces.append(1)
        return params + 0 * x

    sampler = _sampler(apply)
    for steps, guidance in ((4, 0.0), (4, 2.0), (8, 0.0)):
        _run(sampler, steps=steps, guidance=guidance)
        _run(sampler, steps=steps, labels=range(9))
    assert len(traces) <= 2 * 2  # A scan's body may be traced twice.


def test_untrained_schedules_are_refused():
    sampler = _sampler(lambda params, x, *args: x)
    with pytest.raises(ValueError, match='0.3'):
        next(
            sampler.batches(0, jax.random.key(0), [0], guidance=0, schedule=(0.3, 0.7))
        )
