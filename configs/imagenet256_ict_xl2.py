r"""iCT on latents of ImageNet 256x256, a baseline of iSM: SiT-XL/2.

    python -m ism_jax.train --config configs/imagenet256_ict_xl2.py \
        --config.data.source=latents:/data/imagenet256

The latents are those of `configs/imagenet256_ism_xl2.py`. iSM's table reports FID-50K
34.24 / 20.3 in 1 / 2 steps for improved consistency training (arXiv 2310.14189) of this
network. Its settings are not published; ours are those of iCT, on the flow path
(`ism_jax/objectives/consistency.py`). We have not run it. `:B/2` is a smaller network;
`:runlocal` runs in one minute on a CPU.
"""

from ism_jax import config as config_lib


def get_config(arg: str = ''):
    c = config_lib.default()
    config_lib.use_objective(c, 'consistency')
    config_lib.use_imagenet_latents(c, 256)
    return config_lib.with_argument(c, arg)
