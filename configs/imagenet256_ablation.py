r"""The paper's ablation on ImageNet 256x256: SiT-XL/2, 250K iterations per rung.

    python -m ism_jax.train --config configs/imagenet256_ablation.py:+sot \
        --config.data.source=latents:/data/imagenet256

The latents are those of `configs/imagenet256_ism_xl2.py`. The rungs, with the paper's
FID-50K (arXiv 2510.21250) in 1 and 4 steps:

    sm                    21.38  13.46
    +intrinsic_guidance    9.62   3.17
    +interval              8.49   2.81
    +wavelet               8.12   2.64
    +sot                   7.97   2.23
    ism                    6.56   2.16

`ism-intrinsic_guidance` and the other `ism-` rungs are iSM without one part; the paper
does not report them. We have not run any of these; `configs/ablation.py` is the same
ladder for two CPU cores. `:+sot,B/2` is a smaller network, `:+sot,runlocal` takes one
minute on a CPU.
"""

from ism_jax import config as config_lib


def get_config(arg: str = ''):
    c = config_lib.default()
    config_lib.use_imagenet_latents(c, 256)
    # Not in the paper; every run that we have measured had both.
    c.optimizer.update(warmup_steps=10_000, clip_norm=1.0)
    c.train.steps = 250_000
    # The scale of `best` is that of configs/imagenet256_best.py.
    return config_lib.use_recipe(c, arg, {}, guidance_max=3.5)
