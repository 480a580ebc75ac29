"""Letters and digits in colour, 36 classes: the best recipe, for two CPU cores or more.

    python launch/draw_glyphs.py --out data/glyphs
    python -m ism_jax.train --config configs/glyphs.py

The first command draws the images, 32x32, from fonts that are installed already. The
second takes 46 minutes on one core, less on two (`docs/results.md` has the scores).
`configs/glyphs.py:64` trains at 64x64, with the same network on patches twice as large,
from images drawn with `--size 64 --out data/glyphs64`. `configs/glyphs.py:large`, or
`:64,large`, is for a GPU or TPU; it has not been measured.
"""

from ism_jax import config as config_lib


def get_config(arg: str = ''):
    c = config_lib.default()
    c.data.update(source='folder:data/glyphs', channels=3)
    config_lib.use_small_unet(c, steps=7000)
    choices = arg.split(',')
    if '64' in choices:
        c.data.update(source='folder:data/glyphs64', image_size=64)
        c.model.patch_size = 4
    if 'large' in choices:
        c.model.update(hidden_size=128, channel_multipliers=(1, 2, 2), num_heads=4)
        c.model.patch_size //= 2
        c.train.update(batch_size=256, steps=20_000)
        c.optimizer.update(learning_rate=1e-3, warmup_steps=1000)
    rest = [choice for choice in choices if choice not in ('64', 'large')]
    return config_lib.with_argument(c, ','.join(rest))
