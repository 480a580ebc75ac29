"""A first run: iSM on the 5,000 MNIST digits that come with the installation.

    python -m ism_jax.train --config configs/quickstart.py

A demonstration, not a benchmark: the best recipe that we have measured, with a U-Net
small enough for two CPU cores. Measured on two cores: ten minutes of training; class
accuracy 96 % in 1 step and 97 % in 4 steps at w = 0.75 (real digits: 97 %).
`configs/quickstart.py:runlocal` runs in one minute.
"""

from ism_jax import config as config_lib


def get_config(arg: str = ''):
    c = config_lib.default()
    c.data.update(source='mnist', image_size=28)
    config_lib.use_best(c, guidance_max=1.5)
    c.objective.guidance_interval = 0.0  # The default of samples.
    c.model.update(
        backbone='unet',
        hidden_size=32,
        patch_size=2,
        channel_multipliers=(1, 2),
        num_heads=2,
    )
    c.wavelet.levels = 2  # For `configs/quickstart.py:ism`.
    c.train.update(batch_size=32, steps=2800)
    c.optimizer.update(
        learning_rate=3e-3, schedule='cosine', warmup_steps=100, clip_norm=1.0
    )
    c.log.update(every=100, grid_every=1000)
    c.checkpoint.every = 1000
    c.sample.update(steps=(1, 2, 4, 8), guidance=(0.0, 0.75, 1.5), batch_size=250)
    c.scores.samples = 1000
    return config_lib.with_argument(c, arg)
