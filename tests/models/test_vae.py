"""The autoencoder against diffusers, and its functions.

The comparison needs torch and diffusers (`tests/parity.txt`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_autoencoder
from tiny_autoencoder import images as _images

from ism_jax.interchange import autoencoder_weights
from ism_jax.models import vae


def _relative(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


@pytest.fixture(scope='module')
def tiny():
    return tiny_autoencoder.make()


@pytest.fixture(scope='module')
def torch():
    reason = 'parity needs torch and diffusers: PARITY=1 bash launch/test.sh'
    pytest.importorskip('diffusers', reason=reason)
    return pytest.importorskip('torch', reason=reason)


def _official(torch, config: vae.Config, seed=0):
    """diffusers' network with random parameters, also for biases and scales."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    levels = len(config.block_out_channels)
    official = AutoencoderKL(
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        scaling_factor=config.scaling_factor,
        down_block_types=['DownEncoderBlock2D'] * levels,
        up_block_types=['UpDecoderBlock2D'] * levels,
        latent_channels=config.latent_channels,
    ).eval()
    with torch.no_grad():
        for parameter in official.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return official


def _both(torch, official, autoencoder, params, images):
    """Outputs of both: moments, and images decoded from the means."""
    with torch.no_grad():
        posterior = official.encode(torch.tensor(images).permute(0, 3, 1, 2))
        mean = posterior.latent_dist.mean
        expected = mean, posterior.latent_dist.logvar, official.decode(mean).sample
    expected = [array.permute(0, 2, 3, 1).numpy() for array in expected]
    moments = jax.jit(autoencoder.encode)(params, images)
    return (*moments, jax.jit(autoencoder.decode)(params, expected[0])), expected


def _check_parity(torch, config, images, folder):
    official = _official(torch, config)
    official.save_pretrained(folder)
    autoencoder, params = autoencoder_weights.load(str(folder))
    assert autoencoder.config == config
    found, expected = _both(torch, official, autoencoder, params, images)
    errors = [_relative(*pair) for pair in zip(found, expected, strict=True)]
    print('largest relative errors of mean, log-variance, image:', errors)
    assert max(errors) < 1e-4
    # A clipped log-variance would be constant.
    assert all(array.std() > 1e-3 for array in expected)
    return params


def test_a_tiny_network_agrees_with_diffusers(torch, tmp_path):
    params = _check_parity(
        torch, tiny_autoencoder.CONFIG, _images(2, 24, 16, 3), tmp_path
    )
    # No tensor is left out.
    assert len(jax.tree.leaves(params)) == len(
        tiny_autoencoder.tensors_from_params(params)
    )


def test_the_full_network_agrees_with_diffusers(torch, tmp_path):
    params = _check_parity(torch, vae.Config(), _images(1, 64, 64, 3), tmp_path)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 83_653_863
    assert len(jax.tree.leaves(params)) == 248


def test_diffusers_reads_our_files(torch, tiny, tmp_path):
    from diffusers import AutoencoderKL

    autoencoder, params = tiny
    tiny_autoencoder.save(tmp_path, autoencoder, params)
    official = AutoencoderKL.from_pretrained(tmp_path).eval()
    assert official.config.scaling_factor == 0.3
    found, expected = _both(torch, official, autoencoder, params, _images(1, 16, 16, 3))
    assert max(_relative(*pair) for pair in zip(found, expected, strict=True)) < 1e-4


def test_log_variance_is_clipped(tiny):
    autoencoder, params = tiny
    bias = jnp.asarray([0.0] * 4 + [-100.0, 100.0, 0.0, 0.0])
    params = params | {'quant_conv': params['quant_conv'] | {'bias': bias}}
    _, log_variance = autoencoder.encode(params, _images(1, 16, 16, 3))
    assert (log_variance[..., 0] == -30).all() and (log_variance[..., 1] == 20).all()


def test_sides_must_be_multiples_of_the_factor(tiny):
    autoencoder, params = tiny
    for side in (18, 2):
        with pytest.raises(ValueError, match=f'{side} pixels .* multiple of 4'):
            autoencoder.latent_shape(side)
        for shape in ((1, side, 16, 3), (1, 16, side, 3)):
            with pytest.raises(AssertionError):
                autoencoder.encode(params, _images(*shape))


def test_bfloat16_is_close_to_float32(tiny):
    autoencoder, params = tiny
    half = vae.Autoencoder(tiny_autoencoder.CONFIG, 'bfloat16')
    images = _images(2, 16, 16, 3)
    exact, near = (a.encode(params, images) for a in (autoencoder, half))
    for expected, found in zip(exact, near, strict=True):
        assert found.dtype == jnp.float32
        assert 1e-5 < _relative(found, np.asarray(expected)) < 0.05
