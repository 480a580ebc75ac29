"""iSM on ImageNet 256x256, the paper's main row: SiT-XL/2, 675M parameters.

    python -m ism_jax.train --config configs/imagenet256_ism_xl2.py \\
        --config.data.source=folder:/data/imagenet/train

The paper (arXiv 2510.21250) trains 800K iterations on latents of sd-vae-ft-mse and
reports FID-50K 5.27 / 2.44 / 2.05 / 1.93 / 1.88 at 1 / 2 / 4 / 8 / 128 steps. We have
not run it. This config has the paper's network and method and works on any source;
the latents' source comes with the autoencoder, and until then images of 32x32 with
three channels take their place. A TPU pod or several nodes of GPUs.
`configs/imagenet256_ism_xl2.py:runlocal` shrinks it to a minute on a CPU.
"""

from ism_jax import config as config_lib
from ism_jax.models import sit


def get_config(arg: str = ''):
    c = config_lib.default()
    c.data.update(source='tfds:imagenet2012', image_size=32, channels=3, flip=True)
    c.model.update(sit.preset('XL/2'), dtype='bfloat16', remat='dots')
    c.train.update(batch_size=256, steps=800_000)
    # A pool of 8,192 holds eight images of a class: too few for a coupling per class.
    c.transport.update(batches=32, per_class=False)
    c.scores.enabled = False  # The small classifier is for small data.
    return config_lib.with_argument(c, arg)
