r"""The ladder and the systems on letters and digits in colour, 32x32, 36 classes.

    python launch/draw_glyphs.py --out data/glyphs
    python -m ism_jax.ablation --config configs/ablation_glyphs.py \
        --out results/ladder_glyphs.json
    python -m ism_jax.train --config configs/ablation_glyphs.py:best

A second, harder data set beside `configs/ablation.py`, with the same recipes: colour,
four times the tokens, and many classes. The images are drawn from fonts, which
`launch/draw_glyphs.py` names.
"""

from ism_jax import config as config_lib

SYSTEMS = config_lib.small_systems(data_std=0.55)
RUNGS = config_lib.RUNGS
RECIPES = config_lib.recipes(SYSTEMS)


def get_config(arg: str = ''):
    c = config_lib.default()
    c.data.update(source='folder:data/glyphs', channels=3)
    c.model.update(hidden_size=96, depth=4, num_heads=3, patch_size=4, unroll=4)
    config_lib.use_small_ladder(c, learning_rate=2e-3)
    return config_lib.use_recipe(c, arg, SYSTEMS, guidance_max=1.5)
