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

# As in `configs/ablation.py`.
SYSTEMS = {
    'flow_matching': {},
    'consistency': {},
    'imm': {'data_std': 0.55},
    'meanflow': {'guidance': 0.5},
    'imf': {'guidance_max': 1.5},
    'alpha_flow': {'guidance': 0.5},
}
RUNGS = config_lib.RUNGS
RECIPES = config_lib.recipes(SYSTEMS)


def get_config(arg: str = ''):
    c = config_lib.default()
    c.data.update(source='folder:data/glyphs', channels=3)
    c.model.update(hidden_size=96, depth=4, num_heads=3, patch_size=4, unroll=4)
    c.train.update(batch_size=64, steps=3000)
    c.optimizer.update(
        learning_rate=2e-3, schedule='cosine', warmup_steps=100, clip_norm=1.0
    )
    c.log.update(every=500, grid_every=0)
    c.checkpoint.every = 1000
    c.sample.update(
        steps=(1, 2, 4, 8, 128),
        guidance=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5),
        batch_size=250,
    )
    c.scores.update(enabled=False, samples=5000)  # ism_jax.ablation scores the runs.
    return config_lib.use_recipe(c, arg, SYSTEMS, guidance_max=1.5)
