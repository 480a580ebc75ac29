"""DINOv2, whose class token FD-DINOv2 compares.

Oquab et al. 2023 (arXiv 2304.07193): a vision transformer with layer scale. Stein et
al. 2023 (arXiv 2306.04675) take the normed class token of ViT-L/14 at 224 x 224, after
Pillow's bicubic resize (their program dgm-eval with its default options). Learned
positions, 37 x 37, are brought to 16 x 16 as the authors' program does.
"""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.models import named_tensors, resize

SIDE = 224  # Pixels that FD-DINOv2 is defined at.
MEAN = (0.485, 0.456, 0.406)  # Of ImageNet, as are the deviations.
DEVIATION = (0.229, 0.224, 0.225)
# The authors' program interpolates positions by (16 + 0.1) / 37 where 16 / 37 would
# do. It reads positions that are shifted by up to a tenth of a place, and FD-DINOv2 is
# measured so; transformers has 0.
POSITION_OFFSET = 0.1
_ATTENTION = ('query', 'key', 'value')
_TORCH_SHARPNESS = -0.75  # Of PyTorch's bicubic interpolation.


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the network, by their names in config.json of transformers.

    Attributes:
      hidden_size: F, width of the features.
      num_hidden_layers, num_attention_heads, mlp_ratio: of the transformer.
      patch_size: side of a patch, in pixels.
      image_size: side of the images that positions were learned at.
      layer_norm_eps: epsilon of the layer norms.
      use_swiglu_ffn: gated layers, as the largest network has them.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    mlp_ratio: float = 4
    patch_size: int = 14
    image_size: int = 518
    layer_norm_eps: float = 1e-6
    use_swiglu_ffn: bool = False

    @property
    def mlp_width(self) -> int:
        width = int(self.hidden_size * self.mlp_ratio)
        if self.use_swiglu_ffn:
            return (int(width * 2 / 3) + 7) // 8 * 8
        return width


# What `Dinov2` does and no field says; another value is another network.
_FIXED = {
    'model_type': 'dinov2', 'hidden_act': 'gelu', 'num_channels': 3, 'qkv_bias': True,
}  # fmt: skip


def read_config(path) -> Config:
    """The sizes that a config.json of transformers says.

    Raises:
      ValueError: it is missing or damaged, lacks a size, or is of another network.
    """
    try:
        content = json.loads(Path(path).read_text())
        fields = [field.name for field in dataclasses.fields(Config)]
        config = Config(**{name: content[name] for name in fields if name in content})
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f'{path} is no config.json of a DINOv2 ({error}); give the folder of a '
            'network such as facebook/dinov2-large'
        ) from error
    for name, value in _FIXED.items():
        if content.get(name, value) != value:
            raise ValueError(
                f'{path}: {name} = {content[name]!r}, but only {value!r} is '
                'implemented; give a network such as facebook/dinov2-large'
            )
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f'{path}: num_attention_heads = {config.num_attention_heads} does not '
            f'divide hidden_size = {config.hidden_size}; the file is damaged'
        )
    if SIDE % config.patch_size or config.image_size % config.patch_size:
        raise ValueError(
            f'{path}: patch_size = {config.patch_size} must divide image_size = '
            f'{config.image_size} and {SIDE}, the side that images are resized to'
        )
    return config


class Dinov2(nn.Module):
    """The network, up to the class token after the last norm."""

    config: Config

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Features of images.

        Args:
          images: [B, H, W, 3], 0 .. 255, uint8 or floating; any H and W.

        Returns:
          `features`, [B, F] float32.

        Raises:
          ValueError: images of another shape.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f'images have shape {images.shape}; DINOv2 takes [B, H, W, 3]: repeat '
                'a grey channel three times'
            )
        config, batch = self.config, len(images)
        width, patch = config.hidden_size, config.patch_size
        grid = SIDE // patch
        x = resize.resize_as_pillow(images, SIDE) / 255.0
        mean, deviation = (np.array(m, np.float32) for m in (MEAN, DEVIATION))
        x = (x - mean[None, None, None]) / deviation[None, None, None]
        # A convolution with stride = kernel = patch, written as a product.
        x = x.reshape(batch, grid, patch, grid, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        x = _dense(width, 'patches')(x.reshape(batch, grid**2, 3 * patch**2))
        token = self.param('class_token', nn.initializers.zeros, (1, width))
        x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, width)), x], axis=1)
        shape = (grid**2 + 1, width)
        x = x + self.param('positions', nn.initializers.normal(0.02), shape)[None]
        x, _ = nn.scan(
            Block,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            length=config.num_hidden_layers,
        )(config, name='blocks')(x, None)
        norm = nn.LayerNorm(epsilon=config.layer_norm_eps, name='norm')
        return {'features': norm(x[:, 0])}


class Block(nn.Module):
    """One layer of the transformer, for nn.scan."""

    config: Config

    @nn.compact
    def __call__(self, x, _):
        config = self.config
        batch, tokens, width = x.shape

        def scaled(name, y):
            return y * self.param(name, nn.initializers.ones, (width,))[None, None]

        h = nn.LayerNorm(epsilon=config.layer_norm_eps, name='norm1')(x)
        shape = (batch, tokens, config.num_attention_heads, -1)
        query, key, value = (
            _dense(width, name)(h).reshape(shape) for name in _ATTENTION
        )
        scores = jnp.einsum('bqhd,bkhd->bhqk', query, key, precision='highest')
        weights = jax.nn.softmax(scores / query.shape[-1] ** 0.5, axis=-1)
        h = jnp.einsum('bhqk,bkhd->bqhd', weights, value, precision='highest')
        h = _dense(width, 'projection')(h.reshape(batch, tokens, width))
        x = x + scaled('scale1', h)

        h = nn.LayerNorm(epsilon=config.layer_norm_eps, name='norm2')(x)
        if config.use_swiglu_ffn:
            h = _dense(2 * config.mlp_width, 'mlp_in')(h)
            gate, h = jnp.split(h, 2, axis=-1)
            h = nn.silu(gate) * h
        else:
            h = nn.gelu(_dense(config.mlp_width, 'mlp_in')(h), approximate=False)
        h = _dense(width, 'mlp_out')(h)
        # The second result is what nn.scan stacks over the layers: nothing.
        return x + scaled('scale2', h), None


def params_from_tensors(
    tensors: Mapping[str, np.ndarray],
    config: Config,
    *,
    position_offset: float = POSITION_OFFSET,
) -> dict:
    """Parameters from the tensors of a `Dinov2Model` of transformers.

    Args:
      tensors: name to array, as `tensor_file.read` gives them.
      config: of the network.
      position_offset: see `POSITION_OFFSET`.

    Raises:
      ValueError: tensors of another network; one of them is named.
    """
    network = f'DINOv2 of {config}'
    expected = named_tensors.abstract_params(
        Dinov2(config), jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    )
    tensors = named_tensors.NamedTensors(tensors, network)
    # Of the training only: what masked patches are shown as.
    if 'embeddings.mask_token' in tensors:
        tensors.take('embeddings.mask_token')
    patches = tensors.convolution('embeddings.patch_embeddings.projection')
    kernel = patches['kernel'].reshape(-1, patches['kernel'].shape[-1])
    params = {
        'patches': {'kernel': kernel, 'bias': patches['bias']},
        'class_token': tensors.take('embeddings.cls_token')[0],
        'positions': interpolate_positions(
            tensors.take('embeddings.position_embeddings')[0],
            SIDE // config.patch_size,
            position_offset,
        ),
        'norm': tensors.layer_norm('layernorm'),
    }
    mlp = ('weights_in', 'weights_out') if config.use_swiglu_ffn else ('fc1', 'fc2')
    blocks = []
    for number in range(config.num_hidden_layers):
        layer = f'encoder.layer.{number}'
        attention = f'{layer}.attention.attention'
        block = {n: tensors.dense(f'{attention}.{n}') for n in _ATTENTION}
        block |= {n: tensors.layer_norm(f'{layer}.{n}') for n in ('norm1', 'norm2')}
        block |= {
            'projection': tensors.dense(f'{layer}.attention.output.dense'),
            'mlp_in': tensors.dense(f'{layer}.mlp.{mlp[0]}'),
            'mlp_out': tensors.dense(f'{layer}.mlp.{mlp[1]}'),
            'scale1': tensors.take(f'{layer}.layer_scale1.lambda1'),
            'scale2': tensors.take(f'{layer}.layer_scale2.lambda1'),
        }
        blocks.append(block)
    tensors.check_all_taken()
    params['blocks'] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    named_tensors.check_shapes(params, expected, network)
    return params


def interpolate_positions(
    positions: np.ndarray, grid: int, offset: float
) -> np.ndarray:
    """Positions of another number of patches, by PyTorch's bicubic interpolation.

    Args:
      positions: [1 + G^2, F], that of the class token first.
      grid: g, patches of a side.
      offset: see `POSITION_OFFSET`; the step between places read is G / (g + offset).

    Returns:
      [1 + g^2, F] float32; as they are where g = G.
    """
    count, width = positions.shape
    stored = round((count - 1) ** 0.5)
    if stored**2 != count - 1:
        raise ValueError(
            f'positions of shape {positions.shape} are not of a class token and a '
            'square of patches; the weights are damaged, fetch them again'
        )
    if stored == grid:
        return positions
    places = (np.arange(grid) + 0.5) * (stored / (grid + offset)) - 0.5
    low = np.floor(places).astype(int)
    weights = np.zeros((grid, stored))
    for tap in range(-1, 3):
        # Beyond the border it goes on as at it.
        at = np.clip(low + tap, 0, stored - 1)
        value = resize.keys_cubic(places - (low + tap), _TORCH_SHARPNESS)
        np.add.at(weights, (np.arange(grid), at), value)
    square = positions[1:].astype(np.float64).reshape(stored, stored, width)
    square = np.einsum('ai,bj,ijf->abf', weights, weights, square, optimize=True)
    square = square.reshape(grid**2, width).astype(np.float32)
    return np.concatenate([positions[:1], square])


def _dense(features, name):
    # An accelerator would round to bfloat16, and a metric must not.
    return nn.Dense(features, precision='highest', name=name)
