"""iSM on Fashion-MNIST: 60,000 images of 10 classes, 32x32.

    apt-get install dataset-fashion-mnist
    python -m ism_jax.train --config configs/fashion_mnist.py

For one GPU; with internet and without Debian's package, add
`--config.data.source=tfds:fashion_mnist`. No paper reports this row and we have not
measured it: no number is claimed. `configs/fashion_mnist.py:runlocal` shrinks it to
a minute on a CPU.

Another method trains with the same network and budget, by its name:

    python -m ism_jax.train --config configs/fashion_mnist.py:shortcut

and so do flow_matching, consistency, imm, meanflow, alpha_flow and any file that is
added to `ism_jax/objectives/`; `configs/fashion_mnist.py:shortcut,runlocal` is small.
"""

from ism_jax import config as config_lib


def get_config(arg: str = ''):
    c = config_lib.default()
    c.data.update(source='fashion_mnist', flip=True)
    c.model.update(hidden_size=384, depth=12, num_heads=6, patch_size=2)
    c.train.update(batch_size=256, steps=50_000)
    c.optimizer.update(warmup_steps=1000, learning_rate=3e-4, clip_norm=1.0)
    c.log.grid_every = 2500
    c.checkpoint.every = 2500
    c.scores.update(samples=5000, checkpoint_samples=1000)
    return config_lib.with_argument(c, arg)
