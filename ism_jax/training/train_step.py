"""One training step: objective -> gradients -> update -> both EMAs. A pure function.

Every random draw is a function of (seed, step): `seed_key` is constant, and the step
and pool numbers are folded into it. A resumed run therefore repeats the uninterrupted
one.
"""

from typing import Any, Callable

import jax
import jax.numpy as jnp
import optax

from ism_jax.method import random_streams
from ism_jax.method.training_batch import Batch
from ism_jax.runtime import sharding
from ism_jax.training import ema, paired_pool
from ism_jax.training.train_state import TrainState


def train_step(
    state: TrainState,
    pool: paired_pool.Pool,
    seed_key: jax.Array,
    *,
    apply: Callable[..., jax.Array],
    objective: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
    distance: Callable[[jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    tx: optax.GradientTransformation,
    accumulate: int,
    target_decay: float,
    infer_decay: float,
    ema_warmup: bool,
    num_steps: int,
    groups: jax.sharding.Mesh | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one step, on batch `state.step % K` of the pool.

    A step whose loss or gradient is not finite changes only the counters.

    Args:
      state: donated by the caller.
      pool: see `Pool`.
      seed_key: the run's key.
      apply: the network, `apply(params, x, t, d, w, label)`.
      objective, distance: see `ism_jax.objectives.base`.
      tx: optimizer.
      accumulate: number of equal parts of the batch whose gradients are averaged.
      target_decay, infer_decay, ema_warmup: see `ism_jax.training.ema`; only the
        inference EMA is warmed up.
      num_steps: number of training steps, for objectives with a curriculum.
      groups: mesh on which each group of devices accumulates its own gradient, so that
        gradients cross groups once per step; `apply` then takes the parameters of
        `sharding.apply_in_groups`. None for one gradient of all devices.

    Returns:
      The next state, and scalars by name.
    """
    batch = paired_pool.pool_batch(pool, state.step, seed_key)
    key = random_streams.stream(seed_key, random_streams.OBJECTIVE, state.step)

    params = sharding.group_copies(state.params, groups)
    target_params = sharding.group_copies(state.target_params(), groups)
    options = dict(distance=distance, progress=state.step / num_steps)

    def loss_fn(params, batch, key):
        return objective(apply, params, target_params, batch, key, **options)

    (loss, metrics), gradient = _accumulated(
        loss_fn, params, batch, key, accumulate, groups
    )
    gradient_norm = optax.global_norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)

    updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = infer_decay
    if ema_warmup:
        decay = ema.warmup_decay(infer_decay, state.step - state.skipped)
    infer = ema.update(state.infer, params, decay)
    target = state.target
    if target is not None:
        target = ema.update(target, params, target_decay)

    def keep_if_finite(new, old):
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    new_state = TrainState(
        step=state.step + 1,
        params=keep_if_finite(params, state.params),
        opt_state=keep_if_finite(opt_state, state.opt_state),
        target=keep_if_finite(target, state.target),
        infer=keep_if_finite(infer, state.infer),
        skipped=state.skipped + ~finite,
        skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
    )
    metrics |= {'loss': loss, 'norm/gradient': gradient_norm}
    metrics |= {'norm/update': optax.global_norm(updates)}
    metrics |= {n: getattr(new_state, n) for n in ('skipped', 'skipped_in_row')}
    return new_state, metrics


@jax.jit
def state_metrics(state: TrainState) -> dict[str, jax.Array]:
    """The norm of a state's parameters and the distances between its trees."""
    metrics = {
        'norm/params': optax.global_norm(state.params),
        'distance/online_infer': _distance(state.params, state.infer),
    }
    if state.target is not None:
        metrics['distance/online_target'] = _distance(state.params, state.target)
        metrics['distance/target_infer'] = _distance(state.target, state.infer)
    return metrics


def _accumulated(loss_fn, params, batch: Batch, key, parts: int, groups):
    """Mean loss, metrics and gradient over `parts` equal parts of the batch."""

    def gradient_fn(params, batch, key):
        out, gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
        if groups is not None:
            gradient = sharding.constrain_groups(gradient, groups)
        return out, gradient

    if parts == 1:
        return gradient_fn(params, batch, key)

    def part_of(array):
        # Strided, so that the samples of each device are spread over all parts.
        split = array.reshape(-1, parts, *array.shape[1:])
        return jnp.moveaxis(split, 1, 0)

    def body(total, xs):
        part, number = xs
        out = gradient_fn(params, part, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, total, out), None

    batches = jax.tree.map(part_of, batch)
    shapes = jax.eval_shape(
        gradient_fn, params, jax.tree.map(lambda a: a[0], batches), key
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, (batches, jnp.arange(parts)))
    out, gradient = jax.tree.map(lambda a: a / parts, total)
    if groups is not None:
        gradient = sharding.sum_groups(gradient, groups)
    return out, gradient


def _distance(a: Any, b: Any) -> jax.Array:
    """Euclidean distance between two parameter trees."""
    return optax.global_norm(jax.tree.map(jnp.subtract, a, b))
