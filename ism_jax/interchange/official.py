"""Checkpoints of the official SiT, DiT and shortcut-models code as our parameters.

What each network computes, in ours:

  SiT       github.com/willisma/SiT. The same function: times run from noise at 0 to
            data at 1 and enter the sinusoids as they are (`time_scale` 1), and the
            output is x1 - x0, with its defaults: the linear path and prediction of
            velocity. No tensor tells other ones. With `learn_sigma` there are twice
            the channels; the first half is the velocity, the second is dropped, as
            its own code does.
  DiT       github.com/facebookresearch/DiT. The same network, trained for another
            task: it predicts the noise of a variance-preserving path at timesteps
            0 .. 999, of which 0 is data. The time embedding is turned round, so that
            at our t the network computes what DiT computes at timestep 1000 (1 - t),
            with `time_scale` 1000; the half of the output that is the noise is kept.
            It is no velocity: a start for training, not a model to sample from.
            Its authors license their weights for non-commercial use (CC BY-NC).
  shortcut  github.com/kvfrans/shortcut-models, `train_type` shortcut. The same
            function at d = 1, 1/2, ..., 1/32768 and, as 1 / `base_steps`, at 0. Its
            sinusoidal embedding of log2(1/d) becomes rows of our table, the row of
            the finest step moves to the classes, queries take over another scale of
            the attention, and the log-variances, which it never uses, are dropped.
            It computes in bfloat16, and differs from float32 by that rounding. No
            tensor tells another `train_type`, which would not be the same function.

What ours adds, the embeddings of `d` (but for shortcut models) and `w`, has no values
in these files and starts afresh; at d = 0, w = 0 it has no effect.

In all three the last row of the class table is taken for `null`: they have one unless
they were trained without label dropout.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.models import sit

DIT_TIMESTEPS = 1000
# Sin-cos positions are float32 of another library at worst.
POSITION_TOLERANCE = 1e-5


class Converted(NamedTuple):
    """An official network, as ours.

    Attributes:
      params: parameters by module; those of `fresh` modules are missing.
      model: fields of `config.model` that make it.
      num_classes: without `null`.
      image_shape: (H, W, C).
      fresh: modules that the official network does not have.
    """

    params: dict[str, Any]
    model: dict[str, Any]
    num_classes: int
    image_shape: tuple[int, int, int]
    fresh: tuple[str, ...]


def from_sit(tensors: Mapping[str, Any], num_heads: int = 0) -> Converted:
    """The official SiT.

    Args:
      tensors: its state dict.
      num_heads: no shape says it; 0 where width and depth are those of a preset.

    Raises:
      ValueError: tensors are missing, unknown or of other shapes.
    """
    sizes, outputs = _torch_sizes(tensors, num_heads)
    side, channels = sizes.image_shape[0], sizes.image_shape[-1]
    _check_positions(tensors['pos_embed'], sizes.hidden_size, side // sizes.patch_size)

    def linear(name):
        return {
            'kernel': jnp.asarray(tensors[f'{name}.weight']).T,
            'bias': jnp.asarray(tensors[f'{name}.bias']),
        }

    patches = jnp.asarray(tensors['x_embedder.proj.weight']).transpose(2, 3, 1, 0)
    keep = lambda a: a.reshape(*a.shape[:-1], -1, outputs)[..., :channels].reshape(
        *a.shape[:-1], -1
    )
    blocks = {
        'modulation': 'adaLN_modulation.1',
        'qkv': 'attn.qkv',
        'projection': 'attn.proj',
        'mlp_in': 'mlp.fc1',
        'mlp_out': 'mlp.fc2',
    }
    params = {
        'patch_embedding': {
            'kernel': patches.reshape(-1, sizes.hidden_size),
            'bias': jnp.asarray(tensors['x_embedder.proj.bias']),
        },
        'time_embedding': {
            'hidden': linear('t_embedder.mlp.0'),
            'out': linear('t_embedder.mlp.2'),
        },
        'class_embedding': {
            'embedding': jnp.asarray(tensors['y_embedder.embedding_table.weight'])
        },
        'blocks': {
            ours: _stack([linear(f'blocks.{i}.{theirs}') for i in range(sizes.depth)])
            for ours, theirs in blocks.items()
        },
        'final_modulation': linear('final_layer.adaLN_modulation.1'),
        'final': jax.tree.map(keep, linear('final_layer.linear')),
    }
    return _converted(params, sizes, time_scale=1.0)


def from_dit(tensors: Mapping[str, Any], num_heads: int = 0) -> Converted:
    """The official DiT; arguments and errors as of `from_sit`."""
    converted = from_sit(tensors, num_heads)
    # cos and sin of 1000 w - s w are a rotation of those of s w, which the first
    # layer takes over.
    angles = DIT_TIMESTEPS * sit.frequencies()
    turn = lambda f: jnp.asarray(f(angles), jnp.float32)[:, None]
    hidden = converted.params['time_embedding']['hidden']
    by_cos, by_sin = jnp.split(hidden['kernel'], 2)
    hidden['kernel'] = jnp.concatenate(
        [
            by_cos * turn(np.cos) + by_sin * turn(np.sin),
            by_cos * turn(np.sin) - by_sin * turn(np.cos),
        ]
    )
    model = converted.model | {'time_scale': float(DIT_TIMESTEPS)}
    return converted._replace(model=model)


def from_shortcut(
    tensors: Mapping[str, Any],
    *,
    image_size: int,
    base_steps: int = 128,
    num_heads: int = 0,
) -> Converted:
    """The network of shortcut-models.

    Args:
      tensors: its parameters; names are the paths in the tree, joined with '/'.
      image_size: side of the images or latents, which no tensor says.
      base_steps: its `denoise_timesteps`.
      num_heads: see `from_sit`.

    Raises:
      ValueError: tensors are missing, unknown or of other shapes.
    """
    sizes = _flax_sizes(tensors, image_size, num_heads)

    def linear(name):
        return {
            leaf: jnp.asarray(tensors[f'{name}/{leaf}']) for leaf in ('kernel', 'bias')
        }

    def qkv(block):
        key, query, value = (linear(f'{block}/Dense_{i}') for i in (1, 2, 3))
        # It divides queries by the width of a head, we the products by its root.
        scale = (sizes.hidden_size // sizes.num_heads) ** -0.5
        query = jax.tree.map(lambda a: a * scale, query)
        join = lambda *parts: jnp.concatenate(parts, axis=-1)
        return jax.tree.map(join, query, key, value)

    def layers(make):
        return _stack([make(f'DiTBlock_{i}') for i in range(sizes.depth)])

    embedding = [linear(f'TimestepEmbedder_1/Dense_{i}') for i in (0, 1)]
    steps = _embed(*embedding, np.arange(sit.MAX_LEVELS))
    finest = _embed(*embedding, np.log2([base_steps]))
    classes = jnp.asarray(tensors['LabelEmbedder_0/Embed_0/embedding'])
    patches = linear('PatchEmbed_0/Conv_0')
    params = {
        'patch_embedding': {
            'kernel': patches['kernel'].reshape(-1, sizes.hidden_size),
            'bias': patches['bias'],
        },
        'time_embedding': {
            'hidden': linear('TimestepEmbedder_0/Dense_0'),
            'out': linear('TimestepEmbedder_0/Dense_1'),
        },
        'class_embedding': {'embedding': classes + finest},
        'step_embedding': {'embedding': steps - finest},
        'blocks': {
            'modulation': layers(lambda block: linear(f'{block}/Dense_0')),
            'qkv': layers(qkv),
            'projection': layers(lambda block: linear(f'{block}/Dense_4')),
            'mlp_in': layers(lambda block: linear(f'{block}/MlpBlock_0/Dense_0')),
            'mlp_out': layers(lambda block: linear(f'{block}/MlpBlock_0/Dense_1')),
        },
        'final_modulation': linear('FinalLayer_0/Dense_0'),
        'final': linear('FinalLayer_0/Dense_1'),
    }
    return _converted(params, sizes, time_scale=1.0)


class _Sizes(NamedTuple):
    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int
    mlp_width: int
    num_classes: int
    image_shape: tuple[int, int, int]


def _converted(params, sizes: _Sizes, *, time_scale: float) -> Converted:
    fresh = ('step_embedding', 'guidance_embedding')
    return Converted(
        params=params,
        model=dict(
            patch_size=sizes.patch_size,
            hidden_size=sizes.hidden_size,
            depth=sizes.depth,
            num_heads=sizes.num_heads,
            mlp_ratio=sizes.mlp_width / sizes.hidden_size,
            step_embedding='level',
            time_scale=time_scale,
        ),
        num_classes=sizes.num_classes,
        image_shape=sizes.image_shape,
        fresh=tuple(name for name in fresh if name not in params),
    )


def _torch_sizes(tensors, num_heads: int) -> tuple[_Sizes, int]:
    """Sizes of a SiT or DiT, all its shapes checked; and its output channels."""
    width, channels, patch, _ = _shape(tensors, 'x_embedder.proj.weight', 4)
    rows, _ = _shape(tensors, 'y_embedder.embedding_table.weight', 2)
    _, tokens, _ = _shape(tensors, 'pos_embed', 3)
    mlp, _ = _shape(tensors, 'blocks.0.mlp.fc1.weight', 2)
    (final,) = _shape(tensors, 'final_layer.linear.bias', 1)
    depth = _count(tensors, 'blocks.', '.mlp.fc1.weight')
    side = round(tokens**0.5) * patch
    outputs = final // patch**2
    if outputs not in (channels, 2 * channels):
        raise ValueError(
            f'final_layer.linear.bias is {(final,)}, {outputs} channels for patches of '
            f'{patch}; a network of {channels} channels has as many, or twice as many '
            'where it also predicts variances'
        )
    linear = lambda name, to, of: {f'{name}.weight': (to, of), f'{name}.bias': (to,)}
    expected = {
        'pos_embed': (1, (side // patch) ** 2, width),
        'x_embedder.proj.weight': (width, channels, patch, patch),
        'x_embedder.proj.bias': (width,),
        **linear('t_embedder.mlp.0', width, sit.FREQUENCY_FEATURES),
        **linear('t_embedder.mlp.2', width, width),
        'y_embedder.embedding_table.weight': (rows, width),
    }
    for i in range(depth):
        expected |= {
            **linear(f'blocks.{i}.attn.qkv', 3 * width, width),
            **linear(f'blocks.{i}.attn.proj', width, width),
            **linear(f'blocks.{i}.mlp.fc1', mlp, width),
            **linear(f'blocks.{i}.mlp.fc2', width, mlp),
            **linear(f'blocks.{i}.adaLN_modulation.1', 6 * width, width),
        }
    expected |= {
        **linear('final_layer.linear', patch**2 * outputs, width),
        **linear('final_layer.adaLN_modulation.1', 2 * width, width),
    }
    _check_shapes(tensors, expected)
    return _Sizes(
        width, depth, _num_heads(width, depth, num_heads), patch, mlp, rows - 1,
        (side, side, channels),
    ), outputs  # fmt: skip


def _flax_sizes(tensors, image_size: int, num_heads: int) -> _Sizes:
    """Sizes of a shortcut model, all its shapes checked."""
    patch, _, channels, width = _shape(tensors, 'PatchEmbed_0/Conv_0/kernel', 4)
    rows, _ = _shape(tensors, 'LabelEmbedder_0/Embed_0/embedding', 2)
    _, mlp = _shape(tensors, 'DiTBlock_0/MlpBlock_0/Dense_0/kernel', 2)
    depth = _count(tensors, 'DiTBlock_', '/MlpBlock_0/Dense_0/kernel')
    linear = lambda name, of, to: {f'{name}/kernel': (of, to), f'{name}/bias': (to,)}
    expected = {
        'PatchEmbed_0/Conv_0/kernel': (patch, patch, channels, width),
        'PatchEmbed_0/Conv_0/bias': (width,),
        'LabelEmbedder_0/Embed_0/embedding': (rows, width),
        'Embed_0/embedding': (256, 1),  # Log-variances, unused there too.
    }
    for i in (0, 1):  # Of the time, of the step size.
        expected |= linear(
            f'TimestepEmbedder_{i}/Dense_0', sit.FREQUENCY_FEATURES, width
        )
        expected |= linear(f'TimestepEmbedder_{i}/Dense_1', width, width)
    for i in range(depth):
        expected |= linear(f'DiTBlock_{i}/Dense_0', width, 6 * width)
        for part in (1, 2, 3, 4):  # Keys, queries, values, projection.
            expected |= linear(f'DiTBlock_{i}/Dense_{part}', width, width)
        expected |= linear(f'DiTBlock_{i}/MlpBlock_0/Dense_0', width, mlp)
        expected |= linear(f'DiTBlock_{i}/MlpBlock_0/Dense_1', mlp, width)
    expected |= linear('FinalLayer_0/Dense_0', width, 2 * width)
    expected |= linear('FinalLayer_0/Dense_1', width, patch**2 * channels)
    _check_shapes(tensors, expected)
    return _Sizes(
        width, depth, _num_heads(width, depth, num_heads), patch, mlp, rows - 1,
        (image_size, image_size, channels),
    )  # fmt: skip


def _num_heads(width: int, depth: int, num_heads: int) -> int:
    if num_heads:
        return num_heads
    for sizes in sit.SIZES.values():
        if (sizes['hidden_size'], sizes['depth']) == (width, depth):
            return sizes['num_heads']
    raise ValueError(
        f'a network of width {width} and depth {depth} is no preset, and the file does '
        'not say how many attention heads it has; give --num_heads'
    )


def _embed(hidden, out, x) -> jax.Array:
    """Two-layer embedding of scalars, [N] -> [N, width], as `sit.ScalarEmbedding`."""
    dot = lambda a, layer: (
        jnp.dot(a, layer['kernel'], precision='highest') + layer['bias'][None]
    )
    features = sit.frequency_features(jnp.asarray(x, jnp.float32))
    return dot(jax.nn.silu(dot(features, hidden)), out)


def _stack(layers):
    """A list of trees as one tree, the list's axis first, as `nn.scan` has it."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def _count(tensors, before: str, after: str) -> int:
    names = (name for name in tensors if name.startswith(before))
    return sum(name.endswith(after) for name in names)


def _shape(tensors, name: str, rank: int) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(
            f'there is no tensor {name}, which this kind of network has; it has '
            f'{", ".join(sorted(tensors)[:4]) or "none at all"}, ...'
        )
    if len(tensors[name].shape) != rank:
        raise ValueError(
            f'{name} is {tuple(tensors[name].shape)}; this kind of network has one of '
            f'{rank} axes'
        )
    return tuple(tensors[name].shape)


def _check_shapes(tensors, expected) -> None:
    missing, unknown = (
        expected.keys() - tensors.keys(),
        tensors.keys() - expected.keys(),
    )
    for word, names in (('misses', missing), ('has besides', unknown)):
        if names:
            listed = ', '.join(sorted(names)[:4]) + ', ...' * (len(names) > 4)
            raise ValueError(
                f'the file {word} {listed}; it is of another kind of network, which '
                'ours cannot stand for'
            )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f'{name} is {tuple(tensors[name].shape)}, expected {shape} from the '
                'other tensors of the file'
            )


def _check_positions(positions, width: int, side: int) -> None:
    expected = sit.position_embedding(width, side)
    error = float(np.abs(np.asarray(positions)[0] - expected).max())
    if not error < POSITION_TOLERANCE:
        raise ValueError(
            f'pos_embed differs from the fixed sin-cos positions by {error:.2g}; ours '
            'are fixed, so a network with others cannot be converted'
        )
