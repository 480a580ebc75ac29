r"""IMM on ImageNet 256x256, a baseline for iSM: SiT-XL/2.

    python -m ism_jax.train --config configs/imagenet256_imm_xl2.py \
        --config.data.source=latents:/data/imagenet256

Prepare the latents as in `configs/imagenet256_ism_xl2.py`, but with the authors'
autoencoder, stabilityai/sd-vae-ft-ema; they are normalised per channel with the
authors' numbers. The paper (arXiv 2503.07565) reports FID-50K 7.77 / 3.99 / 2.51 / 1.99
in 1 / 2 / 4 / 8 steps with batches of 4096 and 1.2M iterations. We have not run it.
`:B/2` is a smaller network; `:runlocal` runs in one minute on a CPU.
"""

from ism_jax import config as config_lib


def get_config(arg: str = ''):
    c = config_lib.default()
    # The authors scale noise and channels to a standard deviation of 0.5; here it is 1.
    config_lib.use_objective(c, 'imm', data_std=1.0)
    config_lib.use_imagenet_latents(c, 256)
    c.data.autoencoder = 'stabilityai/sd-vae-ft-ema'
    c.data.latent_mean = (0.86488, -0.27787343, 0.21616915, 0.3738409)
    c.data.latent_std = (4.85503674, 5.31922414, 3.93725398, 3.9870003)
    c.train.update(batch_size=4096, steps=1_200_000)
    return config_lib.with_argument(c, arg)
