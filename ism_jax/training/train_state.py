"""What training carries from step to step, and its initialisation."""

import dataclasses
import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ism_jax.runtime import sharding


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes; all of it is in the checkpoint.

    Attributes:
      step: int32, steps taken, including skipped ones.
      params: online parameters, float32.
      opt_state: state of the optax optimizer.
      target: target EMA, or None without twin EMA.
      infer: inference EMA, used for sampling.
      skipped: int32, steps skipped for a non-finite loss or gradient.
      skipped_in_row: int32, skipped steps since the last finite one.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    target: Any
    infer: Any
    skipped: jax.Array
    skipped_in_row: jax.Array

    def target_params(self):
        """The parameters that make the targets."""
        return self.infer if self.target is None else self.target


def create(
    init_params, tx: optax.GradientTransformation, mesh, *, twin_ema: bool
) -> tuple[TrainState, Any]:
    """A fresh state, initialised on its devices, and its shardings.

    Args:
      init_params: function without arguments that returns the parameters.
      tx: optimizer.
      mesh: see `sharding.make_mesh`.
      twin_ema: whether there is a target EMA.
    """
    init = functools.partial(_fresh, init_params, tx, twin_ema)
    shardings = sharding.tree_shardings(jax.eval_shape(init), mesh)
    # Without partitionable keys the values would depend on the sharding.
    with jax.threefry_partitionable(True):
        return jax.jit(init, out_shardings=shardings)(), shardings


def abstract(
    init_params, tx: optax.GradientTransformation, mesh, *, twin_ema: bool
) -> TrainState:
    """The shapes of a train state, with shardings, to compile with; see `create`."""
    shapes = jax.eval_shape(functools.partial(_fresh, init_params, tx, twin_ema))
    return jax.tree.map(
        lambda leaf, split: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=split
        ),
        shapes,
        sharding.tree_shardings(shapes, mesh),
    )


def _fresh(init_params, tx, twin_ema) -> TrainState:
    params = init_params()
    zero = jnp.zeros((), jnp.int32)
    copy = lambda tree: jax.tree.map(jnp.copy, tree)
    return TrainState(
        step=zero,
        params=params,
        opt_state=tx.init(params),
        target=copy(params) if twin_ema else None,
        infer=copy(params),
        skipped=zero,
        skipped_in_row=zero,
    )


def start_from(state: TrainState, modules: dict[str, Any], shardings) -> TrainState:
    """The fresh state with its parameters and EMAs replaced.

    Args:
      state, shardings: see `create`.
      modules: NumPy arrays by module; missing modules keep their values.
    """

    def put(leaf, sharding):
        return jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: np.array(leaf[index])
        )

    def replace(params, shardings):
        chosen = {name: shardings[name] for name in modules}
        return {**params, **jax.tree.map(put, modules, chosen)}

    return dataclasses.replace(
        state,
        **{
            name: replace(getattr(state, name), getattr(shardings, name))
            for name in ('params', 'target', 'infer')
            if getattr(state, name) is not None
        },
    )
