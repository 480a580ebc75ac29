r"""Shortcut Models on ImageNet 256x256, the baseline of iSM: SiT-XL/2.

    python -m ism_jax.train --config configs/imagenet256_sm_xl2.py \
        --config.data.source=latents:/data/imagenet256

The latents are those of `configs/imagenet256_ism_xl2.py`. The authors' code (arXiv
2410.12557) reports FID-50K 10.6 / 7.8 / 3.8 in 1 / 4 / 128 steps after 800K iterations.
It uses AdamW with weight decay 0.1, one EMA with decay 0.999 for targets and samples,
and a guidance scale of 1.5 (w = 0.5) in the targets of the finest level. We have not
run it. `:B/2` is a smaller network (the authors' DiT-B/2: 40.3 / 28.3 / 15.5);
`:runlocal` runs in one minute on a CPU.
"""

from ism_jax import config as config_lib


def get_config(arg: str = ''):
    c = config_lib.default()
    config_lib.use_objective(c, 'shortcut')
    config_lib.use_imagenet_latents(c, 256)
    c.optimizer.weight_decay = 0.1
    c.ema.update(infer_decay=0.999, warmup=False)
    return config_lib.with_argument(c, arg)
