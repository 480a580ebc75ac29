"""The autoencoder of Stable Diffusion 1 and 2 (AutoencoderKL, sd-vae-ft-mse and -ema).

    encode: images [B, H, W, 3] in [-1, 1] -> mean, log-variance [B, H/8, W/8, 4]
    decode: latents [B, h, w, 4]           -> images [B, 8h, 8w, 3], about in [-1, 1]

(Rombach et al., arXiv 2112.10752; the factor of 8 is 2 to the number of levels less 1.)
`encode` and `decode` speak the autoencoder's own latents. What diffusion models are
trained on is `scaling_factor` times a sample of the posterior (0.18215, so that its
deviation is about 1); `Autoencoder.sample` multiplies by it and `images` divides.

Parameters are named as in the published files, so that a file is read by its names:
`encoder.down_blocks.0.resnets.1.conv1.weight` is `encoder / down_blocks_0 / resnets_1 /
conv1 / kernel`. Normalisation is in float32 whatever `dtype`, and products of float32
are taken in full (TPUs would round them to bfloat16).
"""

from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import json
import math
from pathlib import Path
import re
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from ism_jax.interchange import hub, tensor_file
from ism_jax.runtime import files, sharding

WEIGHTS = 'diffusion_pytorch_model.safetensors'
EPSILON = 1e-6  # Of every normalisation.
LOG_VARIANCE_RANGE = (-30.0, 20.0)
# What a config may say; anything else would be another network.
SUPPORTED = {
    'act_fn': ('silu',),
    'mid_block_add_attention': (True,),
    'use_quant_conv': (True,),
    'use_post_quant_conv': (True,),
    'shift_factor': (None,),
    'latents_mean': (None,),
    'latents_std': (None,),
}
# Attention's names in files of diffusers before 0.12.
OLD_NAMES = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}


@dataclasses.dataclass(frozen=True)
class Config:
    """The numbers of `config.json`; the defaults are Stable Diffusion's.

    Attributes:
      in_channels, out_channels: of images.
      latent_channels: of latents.
      block_out_channels: width of each level, finest first.
      layers_per_block: residual blocks of a level (the decoder has one more).
      norm_num_groups: groups of a normalisation.
      scaling_factor: see the module.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def to_json(self) -> dict[str, Any]:
        """What `read_config` reads, and diffusers."""
        levels = len(self.block_out_channels)
        return dataclasses.asdict(self) | {
            '_class_name': 'AutoencoderKL',
            'act_fn': 'silu',
            'down_block_types': ['DownEncoderBlock2D'] * levels,
            'up_block_types': ['UpDecoderBlock2D'] * levels,
        }


def read_config(path) -> Config:
    """The config of a folder's `config.json`.

    Raises:
      ValueError: the file is missing or damaged, or asks for what is not here.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'{path} does not exist; an autoencoder folder needs it')
    try:
        content = json.loads(path.read_text())
        kind = content.get('_class_name', 'AutoencoderKL')
    except (ValueError, AttributeError) as error:
        raise ValueError(f'{path} is damaged ({error}); fetch it again') from error
    if kind != 'AutoencoderKL':
        raise ValueError(f'{path} is of a {kind}; an AutoencoderKL is expected')
    for name, block in (
        ('down_block_types', 'DownEncoderBlock2D'),
        ('up_block_types', 'UpDecoderBlock2D'),
    ):
        others = set(content.get(name, ())) - {block}
        if others:
            raise ValueError(
                f'{path}: {name} has {", ".join(sorted(others))}; only {block} is here'
            )
    for name, values in SUPPORTED.items():
        if name in content and content[name] not in values:
            raise ValueError(
                f'{path}: {name} = {content[name]!r} is another network; only '
                f'{" or ".join(map(repr, values))} is here'
            )
    known = {field.name for field in dataclasses.fields(Config)}
    given = {name: value for name, value in content.items() if name in known}
    if 'block_out_channels' in given:
        given['block_out_channels'] = tuple(given['block_out_channels'])
    config = Config(**given)
    odd = [c for c in config.block_out_channels if c % config.norm_num_groups]
    if odd:
        raise ValueError(
            f'{path}: block_out_channels = {config.block_out_channels} must be '
            f'multiples of norm_num_groups = {config.norm_num_groups}'
        )
    return config


# The network.


def _precision(dtype):
    """Full products in float32; bfloat16's are exact as they are."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _conv(features, name, dtype, kernel=3, **options):
    return nn.Conv(
        features, (kernel, kernel), dtype=dtype, precision=_precision(dtype),
        name=name, **options,
    )  # fmt: skip


def _norm(x, groups, name):
    """Group normalisation, in float32, of the type of x."""
    out = nn.GroupNorm(groups, epsilon=EPSILON, dtype=jnp.float32, name=name)(x)
    return out.astype(x.dtype)


class Residual(nn.Module):
    """Two convolutions, each after a normalisation and a SiLU, added to the input."""

    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        h = x
        for number in '12':
            h = nn.silu(_norm(h, self.groups, f'norm{number}'))
            h = _conv(self.features, f'conv{number}', self.dtype)(h)
        if x.shape[-1] != self.features:
            x = _conv(self.features, 'conv_shortcut', self.dtype, kernel=1)(x)
        return x + h


class Attention(nn.Module):
    """Self-attention of one head over all places, added to the input."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        batch, height, width, features = x.shape
        dense = functools.partial(
            nn.Dense, features, dtype=self.dtype, precision=_precision(self.dtype)
        )
        h = _norm(x, self.groups, 'group_norm').reshape(batch, -1, features)
        q, k, v = (dense(name=f'to_{name}')(h) for name in 'qkv')
        products = functools.partial(
            jnp.einsum, precision=_precision(self.dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        weights = products('bqc,bkc->bqk', q, k) / math.sqrt(features)
        weights = jax.nn.softmax(weights).astype(self.dtype)
        h = products('bqk,bkc->bqc', weights, v).astype(self.dtype)
        return x + dense(name='to_out_0')(h).reshape(x.shape)


class Middle(nn.Module):
    """The blocks at the coarsest level."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        block = functools.partial(Residual, x.shape[-1], self.groups, self.dtype)
        x = block(name='resnets_0')(x)
        x = Attention(self.groups, self.dtype, name='attentions_0')(x)
        return block(name='resnets_1')(x)


class Level(nn.Module):
    """Residual blocks of one size, and then a change of size."""

    features: int
    layers: int
    change: str  # 'halve', 'double' or ''.
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        for number in range(self.layers):
            block = Residual(
                self.features, self.groups, self.dtype, name=f'resnets_{number}'
            )
            x = block(x)
        if self.change == 'halve':
            # Padded on one side only, as PyTorch's network is.
            options = dict(strides=2, padding=((0, 1), (0, 1)))
            x = Resize(self.features, self.dtype, options, name='downsamplers_0')(x)
        elif self.change == 'double':
            x = x.repeat(2, axis=1).repeat(2, axis=2)
            x = Resize(self.features, self.dtype, {}, name='upsamplers_0')(x)
        return x


class Resize(nn.Module):
    """The convolution of a change of size."""

    features: int
    dtype: Any
    options: Mapping[str, Any]

    @nn.compact
    def __call__(self, x):
        return _conv(self.features, 'conv', self.dtype, **self.options)(x)


class Encoder(nn.Module):
    """Images to the moments of the posterior, before `quant_conv`."""

    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, x):
        c = self.config
        x = _conv(c.block_out_channels[0], 'conv_in', self.dtype)(x)
        last = len(c.block_out_channels) - 1
        for number, features in enumerate(c.block_out_channels):
            level = Level(
                features, c.layers_per_block, 'halve' if number < last else '',
                c.norm_num_groups, self.dtype, name=f'down_blocks_{number}',
            )  # fmt: skip
            x = level(x)
        x = Middle(c.norm_num_groups, self.dtype, name='mid_block')(x)
        x = nn.silu(_norm(x, c.norm_num_groups, 'conv_norm_out'))
        return _conv(2 * c.latent_channels, 'conv_out', self.dtype)(x)


class Decoder(nn.Module):
    """Latents, after `post_quant_conv`, to images."""

    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, x):
        c = self.config
        x = _conv(c.block_out_channels[-1], 'conv_in', self.dtype)(x)
        x = Middle(c.norm_num_groups, self.dtype, name='mid_block')(x)
        last = len(c.block_out_channels) - 1
        for number, features in enumerate(reversed(c.block_out_channels)):
            level = Level(
                features, c.layers_per_block + 1, 'double' if number < last else '',
                c.norm_num_groups, self.dtype, name=f'up_blocks_{number}',
            )  # fmt: skip
            x = level(x)
        x = nn.silu(_norm(x, c.norm_num_groups, 'conv_norm_out'))
        return _conv(c.out_channels, 'conv_out', self.dtype)(x)


class Network(nn.Module):
    """Both halves, so that all parameters are one tree."""

    config: Config
    dtype: Any

    def setup(self):
        latents = self.config.latent_channels
        self.encoder = Encoder(self.config, self.dtype)
        self.quant_conv = _conv(2 * latents, None, self.dtype, kernel=1)
        self.post_quant_conv = _conv(latents, None, self.dtype, kernel=1)
        self.decoder = Decoder(self.config, self.dtype)

    def encode(self, images):
        return self.quant_conv(self.encoder(images))

    def decode(self, latents):
        return self.decoder(self.post_quant_conv(latents))

    def __call__(self, images):
        moments = self.encode(images)
        return self.decode(moments[..., : self.config.latent_channels])


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Functions of parameters; see the module.

    Attributes:
      config: of the weights.
      dtype: of the computation, 'float32' or 'bfloat16'. Results are float32.
    """

    config: Config = Config()
    dtype: str = 'float32'

    @property
    def _network(self) -> Network:
        return Network(self.config, jnp.dtype(self.dtype))

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(h, w, c) of the latents of square images.

        Raises:
          ValueError: a side that the autoencoder cannot halve often enough.
        """
        factor = self.config.factor
        if image_size < factor or image_size % factor:
            raise ValueError(
                f'images of {image_size} pixels: the autoencoder takes sides that are '
                f'multiples of {factor}; crop or resize them'
            )
        side = image_size // factor
        return side, side, self.config.latent_channels

    def encode(self, params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance of the posterior, both [B, H/8, W/8, c] float32.

        Args:
          params: of `load` or `init`.
          images: [B, H, W, 3] in [-1, 1], H and W multiples of 8.

        Raises:
          ValueError: sides that are no such multiples.
        """
        for side in images.shape[1:3]:
            self.latent_shape(side)
        images = images.astype(self.dtype)
        moments = self._network.apply({'params': params}, images, method='encode')
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)

    def decode(self, params, latents: jax.Array) -> jax.Array:
        """Images [B, 8h, 8w, 3] float32 of the autoencoder's latents [B, h, w, c]."""
        latents = latents.astype(self.dtype)
        images = self._network.apply({'params': params}, latents, method='decode')
        return images.astype(jnp.float32)

    def sample(self, params, images: jax.Array, key: jax.Array) -> jax.Array:
        """Latents as diffusion models take them: a scaled draw of the posterior."""
        mean, log_variance = self.encode(params, images)
        noise = jax.random.normal(key, mean.shape)
        return self.config.scaling_factor * (mean + jnp.exp(log_variance / 2) * noise)

    def images(self, params, latents: jax.Array) -> jax.Array:
        """Images of latents as diffusion models make them; inverse of `sample`."""
        return self.decode(params, latents / self.config.scaling_factor)

    def decode_tiled(
        self, params, latents: jax.Array, *, tile: int = 64, overlap: int = 16
    ) -> jax.Array:
        """`decode` in tiles, for images that do not fit into memory whole.

        Tiles overlap and fade into each other. Where one tile covers everything this is
        `decode`; otherwise tiles do not see each other's statistics and attention, and
        differ from the whole by a little (`tests/models/test_vae.py` measures it).

        Args:
          params, latents: of `decode`.
          tile: side of a tile, in latents.
          overlap: of neighbouring tiles, in latents.

        Raises:
          ValueError: an overlap that leaves no way forward.
        """
        if not 0 <= overlap < tile:
            raise ValueError(f'overlap = {overlap} must lie in 0 .. {tile - 1}')
        decode, factor = jax.jit(self.decode), self.config.factor
        rows, columns = (_tiles(n, tile, overlap) for n in latents.shape[1:3])
        shape = (len(latents), *(factor * n for n in latents.shape[1:3]))
        total = np.zeros((*shape, self.config.out_channels), np.float32)
        weight = np.zeros((1, *shape[1:], 1), np.float32)
        for top, bottom in rows:
            for left, right in columns:
                part = np.asarray(decode(params, latents[:, top:bottom, left:right]))
                fade = np.outer(
                    *(
                        _fade(n, factor * overlap, start > 0, end < size)
                        for n, start, end, size in (
                            (part.shape[1], top, bottom, latents.shape[1]),
                            (part.shape[2], left, right, latents.shape[2]),
                        )
                    )
                )[None, :, :, None]
                place = np.s_[
                    :,
                    factor * top : factor * bottom,
                    factor * left : factor * right,
                ]
                total[place] += fade * part
                weight[place] += fade
        return jnp.asarray(total / weight)

    def init(self, key: jax.Array):
        """Random parameters."""
        side = self.config.factor
        images = jnp.zeros((1, side, side, self.config.in_channels))
        return self._network.init(key, images)['params']

    def abstract_params(self):
        """Shapes of the parameters."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))


def _tiles(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Where tiles begin and end; the last one ends with the image."""
    if tile >= size:
        return [(0, size)]
    starts = [*range(0, size - tile, tile - overlap), size - tile]
    return [(start, start + tile) for start in starts]


def _fade(size: int, overlap: int, before: bool, after: bool) -> np.ndarray:
    """[size] weights: 1, but for ramps towards the neighbours there are."""
    weights = np.ones(size, np.float32)
    ramp = (np.arange(overlap, dtype=np.float32) + 0.5) / max(overlap, 1)
    if before and overlap:
        weights[:overlap] *= ramp
    if after and overlap:
        weights[-overlap:] *= ramp[::-1]
    return weights


# Files.


def load(path: str, dtype: str = 'float32') -> tuple[Autoencoder, Any]:
    """An autoencoder and its parameters, float32.

    Args:
      path: a folder in the layout of diffusers (`config.json` and
        `diffusion_pytorch_model.safetensors`), such a safetensors file (beside its
        `config.json`, or of Stable Diffusion's autoencoder), or the id of one on the
        Hugging Face hub, such as 'stabilityai/sd-vae-ft-mse'.
      dtype: of the computation.

    Raises:
      ValueError: nothing is there, the file is damaged or a pickle, or its tensors are
        not those of the network, by name.
    """
    config_path, weights_path = locate(path)
    config = read_config(config_path) if config_path else Config()
    autoencoder = Autoencoder(config, dtype)
    tensors, _ = tensor_file.read(weights_path)
    return autoencoder, from_tensors(tensors, autoencoder, str(weights_path))


def locate(path: str) -> tuple[Path | None, Path]:
    """The files of an autoencoder: config (None if there is none) and weights.

    Raises:
      ValueError: nothing is there.
    """
    given = Path(path).expanduser()
    if given.is_file():
        config = given.with_name('config.json')
        return config if config.is_file() else None, given
    folder = hub.folder(path, ('config.json', WEIGHTS), 'stabilityai/sd-vae-ft-mse')
    if not (folder / WEIGHTS).is_file():
        found = sorted(p.name for p in folder.iterdir())
        raise ValueError(
            f'{folder} has no {WEIGHTS}; it holds {", ".join(found) or "nothing"}. '
            'Save the autoencoder with safe_serialization=True'
        )
    return folder / 'config.json', folder / WEIGHTS


def digest(path: str) -> str:
    """SHA-256 of the weights' file, in hexadecimal."""
    with open(locate(path)[1], 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def make_decoder(path: str, mesh, mean=(), std=()):
    """The compiled function from latents as they are trained on to images.

    Args:
      path: see `load`.
      mesh: that latents may be divided over.
      mean, std: by which they were normalised, see `sources.LatentSource`.
    """
    autoencoder, params = load(path)
    params = jax.device_put(params, sharding.replicated(mesh))
    mean = jnp.float32(mean or [0.0]).reshape(1, 1, 1, -1)
    std = jnp.float32(std or [1 / autoencoder.config.scaling_factor])
    std = std.reshape(1, 1, 1, -1)

    @jax.jit
    def decode(params, latents):
        return autoencoder.decode(params, latents * std + mean)

    return functools.partial(decode, params)


def from_tensors(tensors, autoencoder: Autoencoder, where: str = 'the file'):
    """Parameters from tensors under their published names.

    Args:
      tensors: {name: array}, as PyTorch has them.
      autoencoder: whose parameters they shall be.
      where: for messages.

    Raises:
      ValueError: tensors that are missing, of another shape, or unknown.
    """
    tensors = {_new_name(name): array for name, array in tensors.items()}
    shapes = traverse_util.flatten_dict(autoencoder.abstract_params())
    names = {tensor_name(path): path for path in shapes}
    missing, unknown = sorted(names.keys() - tensors), sorted(tensors.keys() - names)
    if missing or unknown:
        raise ValueError(
            f'{where} does not fit the autoencoder of its config: '
            + '; '.join(
                f'{len(found)} {kind}, such as {", ".join(found[:3])}'
                for kind, found in (('missing', missing), ('unknown', unknown))
                if found
            )
        )
    params = {}
    for name, path in names.items():
        array, shape = tensors[name], shapes[path].shape
        if path[-1] == 'kernel':
            if len(shape) == 2 and array.ndim == 4:  # A convolution of 1 x 1.
                array = array.reshape(array.shape[:2])
            array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        if array.shape != shape:
            raise ValueError(
                f'{where}: {name} has the shape {tensors[name].shape}, which is not '
                'that of its config'
            )
        params[path] = jnp.asarray(array, jnp.float32)
    return traverse_util.unflatten_dict(params)


def to_tensors(params) -> dict[str, np.ndarray]:
    """Inverse of `from_tensors`, with the newer names."""
    tensors = {}
    for path, array in traverse_util.flatten_dict(params).items():
        array = np.asarray(array, np.float32)
        if path[-1] == 'kernel':
            array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
        tensors[tensor_name(path)] = np.ascontiguousarray(array)
    return tensors


def save(folder, autoencoder: Autoencoder, params) -> None:
    """Writes a folder that `load` and diffusers read."""
    folder = Path(folder)
    config = json.dumps(autoencoder.config.to_json(), indent=1) + '\n'
    # PyTorch's tag, which diffusers asks for.
    weights = safetensors.numpy.save(to_tensors(params), {'format': 'pt'})
    files.write_bytes(folder / 'config.json', config.encode())
    files.write_bytes(folder / WEIGHTS, weights)


def tensor_name(path: tuple[str, ...]) -> str:
    """Published name of a parameter: ('resnets_0', 'kernel') is 'resnets.0.weight'."""
    *modules, leaf = path
    leaf = {'kernel': 'weight', 'scale': 'weight'}.get(leaf, leaf)
    modules = [re.sub(r'^(.*[a-z])_(\d+)$', r'\1.\2', module) for module in modules]
    return '.'.join([*modules, leaf])


def _new_name(name: str) -> str:
    module, _, leaf = name.rpartition('.')
    parent, _, last = module.rpartition('.')
    if parent.endswith('attentions.0') and last in OLD_NAMES:
        return f'{parent}.{OLD_NAMES[last]}.{leaf}'
    return name
