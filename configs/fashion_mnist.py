"""iSM on Fashion-MNIST: 60,000 images of 10 classes, 32x32.

    apt-get install dataset-fashion-mnist
    python -m ism_jax.train --config configs/fashion_mnist.py

For one GPU. Without Debian's package, add `--config.data.source=tfds:fashion_mnist`,
which downloads the data. No paper reports this experiment and we have not measured it,
so no result is claimed. `configs/fashion_mnist.py:runlocal` takes one minute on a CPU.

Other methods train with the same network and budget:

    python -m ism_jax.train --config configs/fashion_mnist.py:shortcut

So do flow_matching, consistency, imm, meanflow, imf, alpha_flow and any file that you
add to `ism_jax/objectives/`. `configs/fashion_mnist.py:shortcut,runlocal` combines
both.
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
