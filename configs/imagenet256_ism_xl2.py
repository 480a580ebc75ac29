r"""iSM on ImageNet 256x256, the paper's main row: SiT-XL/2, 675M parameters.

    python -m ism_jax.prepare_data --source tfds:imagenet2012 --image_size 256 \
        --autoencoder stabilityai/sd-vae-ft-mse --out /data/imagenet256
    python -m ism_jax.train --config configs/imagenet256_ism_xl2.py \
        --config.data.source=latents:/data/imagenet256

The paper (arXiv 2510.21250) trains 800K iterations and reports FID-50K 5.27 / 2.44 /
2.05 / 1.93 / 1.88 in 1 / 2 / 4 / 8 / 128 steps. We have not run it. It is for a TPU pod
or several GPU nodes. `configs/imagenet256_ism_xl2.py:B/2` is a network of 131M
parameters for one node; `:runlocal` runs in one minute on a CPU.
"""

from ism_jax import config as config_lib


def get_config(arg: str = ''):
    c = config_lib.default()  # The paper's method and network.
    config_lib.use_imagenet_latents(c, 256)
    # Not in the paper; every run that we have measured had both.
    c.optimizer.update(warmup_steps=10_000, clip_norm=1.0)
    return config_lib.with_argument(c, arg)
