"""The autoencoder against diffusers' own, by files that one writes and the other reads.

The tests against diffusers need torch and diffusers (`tests/requirements.txt`) and are
skipped without; the others write and read our own files.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ism_jax.models import vae
from ism_jax.runtime import sharding

TINY = vae.Config(
    block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4,
    scaling_factor=0.3,
)  # fmt: skip


@pytest.fixture(scope='module')
def tiny():
    """A tiny autoencoder with parameters that are all at work."""
    autoencoder = vae.Autoencoder(TINY)
    params = autoencoder.init(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # Also biases and scales, which start at 0 and 1.
    leaves = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys)
    ]
    return autoencoder, jax.tree.unflatten(treedef, leaves)


def _images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def _relative(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


# Against diffusers.


@pytest.fixture(scope='module')
def torch():
    reason = 'parity needs torch and diffusers: PARITY=1 bash launch/test.sh'
    pytest.importorskip('diffusers', reason=reason)
    return pytest.importorskip('torch', reason=reason)


def _official(torch, config: vae.Config, seed=0):
    """diffusers' network with random parameters, all of them at work."""
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
        for name, parameter in official.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return official


def _both(torch, official, autoencoder, params, images):
    """Outputs of both: moments, and images of the means."""
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
    autoencoder, params = vae.load(str(folder))
    assert autoencoder.config == config
    found, expected = _both(torch, official, autoencoder, params, images)
    errors = [_relative(*pair) for pair in zip(found, expected)]
    print('largest relative errors of mean, log-variance, image:', errors)
    assert max(errors) < 1e-4
    # The log-variance is no constant, as it would be if it were cut off.
    assert all(array.std() > 1e-3 for array in expected)
    return params


def test_a_small_network_answers_as_that_of_diffusers(torch, tmp_path):
    params = _check_parity(torch, TINY, _images(2, 24, 16, 3), tmp_path)
    # Every tensor counts: the parity above would see one that is left out.
    assert len(jax.tree.leaves(params)) == len(vae.to_tensors(params))


def test_the_real_network_answers_as_that_of_diffusers(torch, tmp_path):
    params = _check_parity(torch, vae.Config(), _images(1, 64, 64, 3), tmp_path)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 83_653_863
    assert len(jax.tree.leaves(params)) == 248


def test_diffusers_reads_what_we_write(torch, tiny, tmp_path):
    from diffusers import AutoencoderKL

    autoencoder, params = tiny
    vae.save(tmp_path, autoencoder, params)
    official = AutoencoderKL.from_pretrained(tmp_path).eval()
    assert official.config.scaling_factor == 0.3
    found, expected = _both(torch, official, autoencoder, params, _images(1, 16, 16, 3))
    assert max(_relative(*pair) for pair in zip(found, expected)) < 1e-4


# Files.


def _older(tensors):
    """Attention as diffusers named it before 0.12, as convolutions of 1 x 1."""
    older = {}
    for name, array in tensors.items():
        for old, new in vae.OLD_NAMES.items():
            if f'attentions.0.{new}.' in name:
                name = name.replace(new, old)
                if array.ndim == 2:
                    array = array[:, :, None, None]
        older[name] = array
    return older


@pytest.mark.parametrize('change', [lambda t: t, _older], ids=['newer', 'older'])
def test_round_trip(tiny, tmp_path, change):
    autoencoder, params = tiny
    vae.save(tmp_path, autoencoder, params)
    path = tmp_path / vae.WEIGHTS
    tensors = safetensors.numpy.load_file(path)
    path.write_bytes(safetensors.numpy.save(change(tensors)))
    loaded, again = vae.load(str(tmp_path))
    assert loaded == autoencoder
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert vae.load(str(path))[0] == autoencoder  # The file alone.
    assert len(vae.digest(str(tmp_path))) == 64


def test_half_precision_files_are_read_as_float32(tiny, tmp_path):
    autoencoder, params = tiny
    vae.save(tmp_path, autoencoder, params)
    path = tmp_path / vae.WEIGHTS
    for kind in ('float16', jnp.bfloat16):
        tensors = {n: a.astype(kind) for n, a in vae.to_tensors(params).items()}
        path.write_bytes(safetensors.numpy.save(tensors))
        _, again = vae.load(str(tmp_path))
        for leaf, other in zip(jax.tree.leaves(again), jax.tree.leaves(params)):
            assert leaf.dtype == jnp.float32
            np.testing.assert_allclose(leaf, other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    'change,message',
    [
        (lambda t: t.pop('encoder.conv_in.bias'), '1 missing, .*encoder.conv_in.bias'),
        (lambda t: t.update(extra=np.ones(1, np.float32)), '1 unknown, such as extra'),
        (
            lambda t: t.update({'quant_conv.bias': np.ones(3, np.float32)}),
            r'quant_conv.bias has the shape \(3,\)',
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tiny, tmp_path, change, message):
    autoencoder, params = tiny
    tensors = vae.to_tensors(params)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        vae.from_tensors(tensors, autoencoder)


@pytest.mark.parametrize(
    'change,message',
    [
        ({'act_fn': 'relu'}, "act_fn = 'relu' is another network"),
        ({'use_quant_conv': False}, 'use_quant_conv = False'),
        ({'shift_factor': 0.1}, 'shift_factor = 0.1'),
        ({'down_block_types': ['AttnDownBlock2D'] * 3}, 'AttnDownBlock2D'),
        ({'_class_name': 'VQModel'}, 'is of a VQModel'),
        ({'norm_num_groups': 3}, 'must be multiples of norm_num_groups = 3'),
    ],
)
def test_configs_of_other_networks_are_refused(tiny, tmp_path, change, message):
    vae.save(tmp_path, *tiny)
    path = tmp_path / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        vae.load(str(tmp_path))


def test_what_is_no_autoencoder_says_so(tiny, tmp_path):
    with pytest.raises(ValueError, match='no folder and no hub id'):
        vae.load(str(tmp_path / 'nothing' / 'here'))
    with pytest.raises(ValueError, match='it holds nothing. Save'):
        vae.load(str(tmp_path))
    vae.save(tmp_path, *tiny)
    weights = tmp_path / vae.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match='cannot be read as safetensors'):
        vae.load(str(tmp_path))
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(ValueError, match='damaged'):
        vae.load(str(tmp_path))
    (tmp_path / 'config.json').unlink()
    with pytest.raises(ValueError, match='config.json does not exist'):
        vae.load(str(tmp_path))


def test_hub_ids_go_to_the_hub(tiny, tmp_path, monkeypatch):
    hub = pytest.importorskip('huggingface_hub')
    vae.save(tmp_path, *tiny)
    asked = []

    def download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, 'snapshot_download', download)
    assert vae.load('some/autoencoder')[0] == tiny[0]
    assert asked == [('some/autoencoder', ('config.json', vae.WEIGHTS))]

    def fail(repository, allow_patterns):
        raise OSError('no network')

    monkeypatch.setattr(hub, 'snapshot_download', fail)
    with pytest.raises(ValueError, match='could not be fetched .*no network'):
        vae.load('some/autoencoder')


# Functions.


def test_latents_of_diffusion_models_are_scaled_draws(tiny):
    autoencoder, params = tiny
    images = _images(4, 16, 16, 3)
    mean, log_variance = autoencoder.encode(params, images)
    assert mean.shape == log_variance.shape == (4, *autoencoder.latent_shape(16))
    key = jax.random.key(5)
    latents = autoencoder.sample(params, images, key)
    noise = jax.random.normal(key, mean.shape)
    expected = 0.3 * (mean + jnp.exp(0.5 * log_variance) * noise)
    np.testing.assert_allclose(latents, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        autoencoder.images(params, 0.3 * mean),
        autoencoder.decode(params, mean),
        atol=1e-5,
    )


def test_log_variance_is_cut_off(tiny):
    autoencoder, params = tiny
    bias = jnp.asarray([0.0] * 4 + [-100.0, 100.0, 0.0, 0.0])
    params = params | {'quant_conv': params['quant_conv'] | {'bias': bias}}
    _, log_variance = autoencoder.encode(params, _images(1, 16, 16, 3))
    assert (log_variance[..., 0] == -30).all() and (log_variance[..., 1] == 20).all()


def test_sides_that_cannot_be_halved_are_refused(tiny):
    autoencoder, params = tiny
    for shape in ((1, 18, 16, 3), (1, 16, 2, 3)):
        with pytest.raises(ValueError, match='multiples of 4'):
            autoencoder.encode(params, _images(*shape))


def test_bfloat16_is_near(tiny):
    autoencoder, params = tiny
    half = vae.Autoencoder(TINY, 'bfloat16')
    images = _images(2, 16, 16, 3)
    exact, near = (a.encode(params, images) for a in (autoencoder, half))
    for expected, found in zip(exact, near):
        assert found.dtype == jnp.float32
        assert 1e-5 < _relative(found, np.asarray(expected)) < 0.05


def test_tiles_fade_into_each_other(tiny):
    autoencoder, params = tiny
    latents = jax.random.normal(jax.random.key(2), (2, 24, 17, 4))
    whole = np.asarray(autoencoder.decode(params, latents))

    def error(**options):
        tiled = autoencoder.decode_tiled(params, latents, **options)
        assert tiled.shape == whole.shape
        return np.abs(tiled - whole).mean() / whole.std()

    assert error(tile=24) < 1e-6  # One tile.
    # Statistics of normalisation differ from tile to tile; more tiles, more so.
    assert 1e-4 < error(tile=16, overlap=8) < 0.2
    assert error(tile=16, overlap=8) < error(tile=8, overlap=2)
    with pytest.raises(ValueError, match='overlap = 8 must lie in 0 .. 7'):
        error(tile=8, overlap=8)


@pytest.mark.parametrize('size', [5, 16, 17, 24, 50])
@pytest.mark.parametrize('tile,overlap', [(16, 4), (8, 0), (7, 6)])
def test_tiles_cover_everything(size, tile, overlap):
    weights = np.zeros(size)
    tiles = vae._tiles(size, tile, overlap)
    for start, end in tiles:
        assert end - start == min(tile, size)
        fade = vae._fade(end - start, overlap, start > 0, end < size)
        assert (fade > 0).all()
        weights[start:end] += fade
    assert (weights > 0).all()
    if len(tiles) > 1:
        assert all(b[0] <= a[1] - overlap for a, b in zip(tiles, tiles[1:]))


def test_decoder_of_a_path_divides_by_the_scale(tiny, tmp_path):
    autoencoder, params = tiny
    vae.save(tmp_path, autoencoder, params)
    latents = jax.random.normal(jax.random.key(0), (1, 4, 4, 4))
    decode = vae.make_decoder(str(tmp_path), sharding.make_mesh())
    np.testing.assert_allclose(
        decode(latents), autoencoder.decode(params, latents / 0.3), atol=1e-5
    )


def test_decoder_of_a_path_undoes_the_normalisation(tiny, tmp_path):
    autoencoder, params = tiny
    vae.save(tmp_path, autoencoder, params)
    raw = jax.random.normal(jax.random.key(0), (1, 4, 4, 4))
    mean, std = (0.5, -1.0, 0.0, 2.0), (2.0, 3.0, 0.5, 4.0)
    decode = vae.make_decoder(str(tmp_path), sharding.make_mesh(), mean, std)
    latents = (np.asarray(raw) - mean) / std
    np.testing.assert_allclose(
        decode(latents), autoencoder.decode(params, raw), atol=1e-5
    )
