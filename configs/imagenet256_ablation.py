"""The paper's ablation on ImageNet 256x256: SiT-XL/2, 250K iterations for each rung.

    python -m ism_jax.train --config configs/imagenet256_ablation.py:+sot \\
        --config.data.source=latents:/data/imagenet256

Latents as in `configs/imagenet256_ism_xl2.py`. The rungs, and the paper's FID-50K
(arXiv 2510.21250) at 1 and 4 steps:

    sm                    21.38  13.46
    +intrinsic_guidance    9.62   3.17
    +interval              8.49   2.81
    +wavelet               8.12   2.64
    +sot                   7.97   2.23
    ism                    6.56   2.16

`ism-intrinsic_guidance` and so on are iSM without one part, which the paper does not
have. We have run none of them here; `configs/ablation.py` is the same ladder for two
CPU cores. `:+sot,B/2` is smaller, `:+sot,runlocal` takes a minute on a CPU.
"""

from ism_jax import config as config_lib


def get_config(arg: str = ''):
    c = config_lib.default()
    config_lib.use_imagenet_latents(c, 256)
    c.train.steps = 250_000
    recipe, _, rest = arg.partition(',')
    if recipe == 'runlocal':
        recipe, rest = '', recipe
    config_lib.use_rung(c, recipe or 'ism')
    return config_lib.with_argument(c, rest)
