"""A first run: iSM on the 5,000 MNIST digits that come with the installation.

    python -m ism_jax.train --config configs/quickstart.py

A demonstration, not a benchmark: it uses all five parts of the method, with a network
small enough for two CPU cores. Measured on two cores: about eight minutes of training;
class accuracy 88 % in 1 step and 92 % in 4 steps at w = 2.5.
`configs/quickstart.py:runlocal` runs in one minute.
"""

from ism_jax import config as config_lib


def get_config(arg: str = ''):
    c = config_lib.default()
    c.data.source = 'mnist'
    c.model.update(hidden_size=192, depth=6, num_heads=3, patch_size=8, unroll=6)
    c.train.batch_size = 64
    c.train.steps = 2400
    c.optimizer.update(
        learning_rate=1.5e-3, schedule='cosine', warmup_steps=100, clip_norm=1.0
    )
    c.transport.batches = 32
    c.log.update(every=100, grid_every=400)
    c.checkpoint.every = 800
    c.sample.update(steps=(1, 2, 4, 8, 32), batch_size=250)
    c.scores.samples = 1000
    return config_lib.with_argument(c, arg)
