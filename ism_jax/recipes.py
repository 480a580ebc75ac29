"""The rungs of the paper's ablation, from Shortcut Models to iSM part by part."""

from ism_jax import config as config_lib

# The rows of the paper's table after `sm`, each the row before and one part more.
PARTS = {
    '+intrinsic_guidance': 'intrinsic_guidance',
    '+interval': 'interval',
    '+wavelet': 'wavelet',
    '+sot': 'sot',
    'ism': 'twin_ema',
}
RUNGS = ('sm', *PARTS)
# Full iSM without one part. Without intrinsic guidance it trains SM's loss.
REMOVALS = tuple(f'ism-{part}' for part in PARTS.values())


def use(config, recipe: str) -> None:
    """Makes `config`, of iSM, train a rung or a removal.

    Raises:
      ValueError: another name.
    """
    if recipe not in (*RUNGS, *REMOVALS):
        raise ValueError(
            f'recipe {recipe!r} is not one of {", ".join((*RUNGS, *REMOVALS))}'
        )
    if recipe == 'sm':
        config_lib.use_objective(config, 'shortcut')
        return
    parts = list(PARTS.values())
    if recipe in PARTS:
        active = parts[: list(PARTS).index(recipe) + 1]
    else:
        active = [part for part in parts if recipe != f'ism-{part}']
    if 'intrinsic_guidance' in active:
        config.objective.guidance_interval = 0.3 if 'interval' in active else 0.0
    else:
        config_lib.use_objective(config, 'shortcut')
    config.wavelet.enabled = 'wavelet' in active
    config.transport.enabled = 'sot' in active
    config.ema.twin = 'twin_ema' in active
