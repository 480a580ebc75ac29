"""AdamW with a learning-rate schedule and gradient clipping, from optax."""

import jax
import optax

SCHEDULES = ('constant', 'cosine', 'linear')


def learning_rate(
    *, peak: float, schedule: str, warmup_steps: int, num_steps: int
) -> optax.Schedule:
    """Linear warm-up to `peak`, then constant, or decaying to 0 at `num_steps`."""
    rest = max(num_steps - warmup_steps, 1)
    after = {
        'constant': lambda: optax.constant_schedule(peak),
        'cosine': lambda: optax.cosine_decay_schedule(peak, rest),
        'linear': lambda: optax.linear_schedule(peak, 0.0, rest),
    }[schedule]()
    if not warmup_steps:
        return after
    # Starts at peak / warmup_steps, because a step with rate 0 would be wasted.
    warmup = optax.linear_schedule(peak / warmup_steps, peak, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def adamw(
    schedule: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """AdamW after clipping by global norm (`clip_norm = 0` for no clipping).

    Weight decay acts on matrices only, not on biases.
    """
    transforms = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    decay_mask = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ('kernel', 'embedding'), params
    )
    transforms.append(
        optax.adamw(
            schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask
        )
    )
    return optax.chain(*transforms)
