"""The paper's ablation ladder and other methods, on Fashion-MNIST at 16x16.

    python -m ism_jax.ablation --config configs/ablation.py --out results/ladder.json
    python -m ism_jax.train --config configs/ablation.py:+sot
    python -m ism_jax.ablation --config configs/ablation.py --search

The first command trains every recipe with three seeds and writes the table of
`docs/results.md`, in two to three hours on two CPU cores; the second trains one recipe.
The third searches for better recipes among those of `SEARCH`.
All recipes have the same network, budget, data and evaluation. Measured: `ism` has a
Frechet distance of 20.0 in 1 step and 9.37 in 4 steps (`results/ladder.md` has all).
"""

from ism_jax import config as config_lib

SYSTEMS = config_lib.small_systems(data_std=0.63)
RUNGS = config_lib.RUNGS
RECIPES = config_lib.recipes(SYSTEMS)
# The rungs, trained with guidance scales up to the largest that is sampled.
CHANGED_RUNGS = *RUNGS[:2], *(f'{r}/objective.guidance_max=1.5' for r in RUNGS[2:])

# The recipes of `--search`: `SEARCH_BASE`, changed by one option of each choice. An
# option is what follows the name in a recipe: changes joined by slashes, '' for none.
# One that is listed twice is drawn twice as often. Invalid combinations are skipped.
SEARCH_BASE = 'ism'
SEARCH = {
    'consistency': (
        '',
        *(
            f'objective.consistency={name}/objective.step_draw=ends'
            '/model.step_embedding=size/model.time_scale=1.0'
            for name in ('derivative', 'difference')
        ),
    ),
    'batch split': (
        '',
        'objective.batch_split=(1,1,2)',
        'objective.batch_split=(4,1,3)',
    ),
    'loss weights': ('', 'objective.loss_weights=(1.0,0.5,4.0)'),
    'guidance scales': ('', 'objective.guidance_max=1.5'),
    'guidance draw': ('', 'objective.guidance_draw=log_uniform'),
    'guidance target': ('', 'objective.guidance_target=guided'),
    'guidance interval': ('', 'objective.guidance_interval=0.0'),
    'step weight': ('', 'objective.step_power=1.0'),
    'times': ('', 'objective.time_draw=logit_normal'),
    'target EMA': ('', 'ema.target_decay=0.9', 'ema.target_decay=0.99'),
    'distance': ('', 'wavelet.enabled=False'),
    'learning rate': ('', 'optimizer.learning_rate=0.0015'),
}


def get_config(arg: str = ''):
    c = config_lib.default()
    c.data.update(source='fashion_mnist', image_size=16)
    c.model.update(hidden_size=64, depth=3, num_heads=2, patch_size=4, unroll=3)
    c.wavelet.levels = 4
    config_lib.use_small_ladder(c, learning_rate=3e-3)
    return config_lib.use_recipe(c, arg, SYSTEMS, guidance_max=1.5)
