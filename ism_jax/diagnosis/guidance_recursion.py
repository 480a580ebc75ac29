"""Proposition 1: the guidance scale of large steps in perfectly trained networks.

A shortcut model whose targets apply guidance of scale g at every doubling (iSM, arXiv
2510.21250, section 3),

    s_2d(c) = 1/2 [ G(s_d)(x_t, t) + G(s_d)(x', t + d) ],  x' = x_t + d G(s_d)(x_t, t),
    G(s) = s(null) + g (s(c) - s(null)),  s_2d(null) the same without guidance,

moves in a step as long as N finest steps like the mean of N guided finest steps of
scale g ** log2(N).

*Where it is exact.* Let v(null) be affine in x, and v(c) - v(null) a function of t
alone. By induction each s_d(c) - s_d(null) is a function of t alone too, each doubling
multiplies it by g, and both sides are the null velocity plus g ** log2(N) times the
unguided difference. (The paper assumes that the difference is constant along the path,
a special case.) In the Gaussian flow of `ism_jax.method.gaussian_flow` that is
class_std = data_std.

*Where it is not.* With class_std < data_std the difference shrinks along a guided path.
Small steps follow that path. A large step extrapolates from its start and does not, so
small steps need an even larger scale to reach its end. Measured at g = 1.5 by
`python -m ism_jax.diagnose compounding`:

    N                          2      8      32     64      128
    g ** log2(N)               1.500  3.375  7.594  11.391  17.086
    class_std = data_std       1.500  3.375  7.594  11.391  17.086
    class_std = 0.9 data_std   1.500  3.381  7.820  12.236  24.93
    class_std = 0.5 data_std   1.500  3.414  8.030  14.689  none up to 64

There the proposition is a lower bound, 7% and 29% below at N = 64; in the last cell no
scale of small steps explains the whole step. With guidance in the finest targets only,
and in iSM, the scale is 1.500 at every N from 2 on in all three flows.
"""

from collections.abc import Mapping
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.diagnosis.compounding_guidance import (
    CLOSED_FORM_SCALE,
    Scales,
    effective_scale,
)
from ism_jax.diagnosis.subject import cfg_velocity, step_sizes, step_starts
from ism_jax.method import gaussian_flow, interpolant

# The closed-form flow.
NUM_CLASSES, SHAPE, NUM_SAMPLES = 4, (4, 4, 1), 64
DATA_STD = 0.5
RECURSIONS = {'SM, all levels': 'all', 'SM, finest': 'finest', 'iSM': 'velocity'}


def shortcut_velocity(field, x, t, label, null, steps, base_steps, scale, guided):
    """Mean velocity of one step of a perfectly trained shortcut model, [B, H, W, C].

    Evaluates the recursion of proposition 1, with 2 N log2(N) evaluations of the field
    for a step as long as N finest steps. N = `steps` is a power of two.

    `guided` is where guidance is applied: in the targets of 'all' doublings, in those
    of the 'finest' doubling only (as in the official code), or in the 'velocity' of
    the finest step and in no doubling (iSM).
    """
    null_label = jnp.full_like(label, null)

    def guide(conditional, unconditional):
        return unconditional + scale * (conditional - unconditional)

    def mean_velocity(x, t, label, steps):
        if steps == 1:
            velocity = field(x, t, label)
            if guided == 'velocity' and label is not null_label:
                return guide(velocity, field(x, t, null_label))
            return velocity
        half = steps // 2
        d = jnp.full_like(t, half / base_steps)
        guide_half = guided == 'all' or (guided == 'finest' and half == 1)

        def half_step(x, t):
            velocity = mean_velocity(x, t, label, half)
            if guide_half and label is not null_label:
                return guide(velocity, mean_velocity(x, t, null_label, half))
            return velocity

        first = half_step(x, t)
        return 0.5 * (first + half_step(interpolant.step(x, first, d), t + d))

    return mean_velocity(x, t, label, steps)


def closed_form_scales(class_std: float = DATA_STD) -> dict[str, Scales]:
    """Effective scales of perfectly trained networks in a Gaussian flow.

    Args:
      class_std: standard deviation of a class; that of all data is `DATA_STD`.

    Returns:
      {name in `RECURSIONS`: {N: its scale}}.
    """
    scale, base_steps, rng = CLOSED_FORM_SCALE, 128, np.random.default_rng(0)
    spread = math.sqrt(max(DATA_STD**2 - class_std**2, 0.01))
    means = spread * rng.normal(size=(NUM_CLASSES, *SHAPE))
    flow = gaussian_flow.GaussianFlow(
        means.astype(np.float32), class_std=class_std, data_std=DATA_STD
    )
    label = jnp.arange(NUM_SAMPLES, dtype=jnp.int32) % NUM_CLASSES
    data = flow.sample_data(jax.random.key(0), label)
    noise = jax.random.normal(jax.random.key(1), data.shape)
    field = jax.jit(lambda x, t, label: flow.velocity(x, t, jnp.zeros_like(t), label))

    @jax.jit
    def small_steps(x, t, d, steps, scale):
        return cfg_velocity(field, x, t, d, label, NUM_CLASSES, steps, scale)

    def scales(guided):
        rng, found = np.random.default_rng(0), {}
        for steps in step_sizes(base_steps):
            x, t, d = step_starts(rng, noise, data, steps, base_steps)
            large_step = shortcut_velocity(
                field, x, t, label, NUM_CLASSES, steps, base_steps, scale, guided
            )
            small = functools.partial(small_steps, x, t, d, steps)
            found[steps] = effective_scale(large_step, small)
        return found

    return {name: scales(guided) for name, guided in RECURSIONS.items()}


def scale_table(columns: Mapping[str, Scales], scale: float) -> str:
    """Text table of effective scales over N; '~' marks unclear ones."""
    rows = [['N', 'g ** log2 N', *columns]]
    for n in sorted(next(iter(columns.values()))):
        found = [column[n] for column in columns.values()]
        cells = [f'{"" if e.is_clear() else "~"}{e.scale:.3f}' for e in found]
        rows.append([str(n), f'{scale ** math.log2(n):.3f}', *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join(
        '  '.join(cell.rjust(w) for cell, w in zip(row, widths, strict=True))
        for row in rows
    )
