"""SiT: the adaLN-zero transformer that predicts the velocity of a flow.

Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with
Scalable Interpolant Transformers" (arXiv 2401.08740), after DiT (Peebles and Xie,
arXiv 2212.09748), with two more conditions as improved shortcut models need them
(arXiv 2510.21250): the step size `d` and the guidance strength `w`.

Both enter as additions to the time and class embedding which vanish exactly at
`d = 0` and `w = 0`, whatever the parameters, and whose last layers start at zero.
So at `d = 0, w = 0` the network always *is* a SiT, before and after training, and a
pretrained SiT can be loaded without changing what it computes.

The computation runs in `dtype` (bfloat16 on accelerators); parameters are float32,
and so are layer norms, conditioning features and the output.
"""

import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Table 1 of SiT (the same as DiT's): width, depth, heads. Keys of `preset` add the
# patch size: 'XL/2' is the network of the paper's main table.
SIZES = {
    'S': dict(hidden_size=384, depth=12, num_heads=6),
    'B': dict(hidden_size=768, depth=12, num_heads=12),
    'L': dict(hidden_size=1024, depth=24, num_heads=16),
    'XL': dict(hidden_size=1152, depth=28, num_heads=16),
}
PATCHES = (2, 4, 8)
PRESETS = {
    f'{size}/{patch}': dict(numbers, patch_size=patch)
    for size, numbers in SIZES.items()
    for patch in PATCHES
}

REMAT_POLICIES = {
    # 'none' stores every activation, 'full' only the layers' inputs, 'dots' also the
    # results of the matrix products with parameters (attention is recomputed).
    'none': None,
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
ATTENTION_IMPLEMENTATIONS = {'auto': None, 'xla': 'xla', 'cudnn': 'cudnn'}

FREQUENCY_FEATURES = 256
MAX_PERIOD = 10_000.0
MAX_LEVELS = 16  # Of step sizes that are told apart: down to 1/32768.
MAX_TOKENS = 2**16  # Attention of more would take 16 GiB for each head.
STEP_EMBEDDINGS = ('level', 'size')
# The sinusoids were made for times of 0 to 1000 (DiT), hence `time_scale`. Guidance
# strengths, a quarter apart, are spread to be told apart while values in between (the
# user's slider) stay close to their neighbours.
GUIDANCE_SCALE = 10.0


def preset(name: str) -> dict[str, int]:
    """Width, depth, heads and patch size of a preset such as 'XL/2'.

    Raises:
      ValueError: the name is not in `PRESETS`.
    """
    if name not in PRESETS:
        raise ValueError(
            f'model preset {name!r} is unknown; choose one of {", ".join(PRESETS)}, '
            'or set hidden_size, depth, num_heads and patch_size themselves'
        )
    return dict(PRESETS[name])


def frequencies() -> np.ndarray:
    """Of the sinusoidal features, [128] float64, in radians per unit."""
    half = FREQUENCY_FEATURES // 2
    return np.exp(-np.log(MAX_PERIOD) * np.arange(half) / half)


def frequency_features(x: jax.Array) -> jax.Array:
    """Sinusoidal features of a scalar per sample, [B] -> [B, 256] (as in DiT)."""
    angles = x.astype(jnp.float32)[:, None] * frequencies()[None].astype(np.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_embedding(hidden_size: int, side: int) -> np.ndarray:
    """Fixed 2-D sin-cos positions, [side * side, hidden_size] (MAE, DiT).

    The first half of the channels encodes the column, the second the row.
    """
    quarter = hidden_size // 4
    frequencies = 1.0 / MAX_PERIOD ** (np.arange(quarter, dtype=np.float64) / quarter)

    def encode(position):
        angles = position.reshape(-1)[:, None] * frequencies[None]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.meshgrid(np.arange(side), np.arange(side), indexing='ij')
    return np.concatenate([encode(column), encode(row)], axis=1).astype(np.float32)


def _dense(features, name, dtype, kernel_init=nn.initializers.xavier_uniform()):
    """A linear layer on the last axis."""
    dense = nn.Dense(features, dtype=dtype, kernel_init=kernel_init, name=name)

    def apply(x):
        # As one matrix product: with batch and tokens as two contracted axes, XLA's
        # CPU backend takes three times as long for the gradient of the kernel.
        return dense(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], features)

    return apply


def _zero_dense(features, name, dtype):
    return _dense(features, name, dtype, kernel_init=nn.initializers.zeros)


def _layer_norm(x, dtype):
    """Layer norm without affine parameters, in float32 whatever the compute dtype."""
    norm = nn.LayerNorm(
        epsilon=1e-6, use_bias=False, use_scale=False, dtype=jnp.float32
    )
    return norm(x).astype(dtype)


def _modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class ScalarEmbedding(nn.Module):
    """Two-layer embedding of a scalar condition, [B] -> [B, hidden_size], float32."""

    hidden_size: int
    zero_init: bool = False

    @nn.compact
    def __call__(self, x):
        small = nn.initializers.normal(0.02)
        x = _dense(self.hidden_size, 'hidden', jnp.float32, small)(
            frequency_features(x)
        )
        last = nn.initializers.zeros if self.zero_init else small
        return _dense(self.hidden_size, 'out', jnp.float32, last)(nn.silu(x))


class Block(nn.Module):
    """Self-attention and MLP, each gated and modulated by the condition."""

    num_heads: int
    mlp_ratio: float
    dtype: Any
    attention: str

    @nn.compact
    def __call__(self, x, condition):
        batch, tokens, width = x.shape
        modulation = _zero_dense(6 * width, 'modulation', self.dtype)(condition)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(
            modulation, 6, axis=-1
        )
        h = _modulate(_layer_norm(x, self.dtype), shift_a, scale_a)
        qkv = _dense(3 * width, 'qkv', self.dtype)(h)
        qkv = qkv.reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        h = jax.nn.dot_product_attention(
            qkv[:, :, 0],
            qkv[:, :, 1],
            qkv[:, :, 2],
            implementation=ATTENTION_IMPLEMENTATIONS[self.attention],
        )
        h = _dense(width, 'projection', self.dtype)(h.reshape(batch, tokens, width))
        x = x + gate_a[:, None] * h
        h = _modulate(_layer_norm(x, self.dtype), shift_m, scale_m)
        h = _dense(int(self.mlp_ratio * width), 'mlp_in', self.dtype)(h)
        h = nn.gelu(h, approximate=True)
        h = _dense(width, 'mlp_out', self.dtype)(h)
        # The second result is what nn.scan stacks over the layers: nothing.
        return x + gate_m[:, None] * h, None


class SiT(nn.Module):
    """Velocity network s(x_t, t, c, d, w).

    Attributes:
      num_classes: labels are 0 .. num_classes - 1; `num_classes` itself is `null`.
      patch_size, hidden_size, depth, num_heads, mlp_ratio: see `PRESETS`.
      dtype: of the computation, 'float32' or 'bfloat16'; parameters are float32.
      remat: what the backward pass keeps, a key of `REMAT_POLICIES`.
      attention: a key of `ATTENTION_IMPLEMENTATIONS`.
      unroll: layers per iteration of the scan; more compile longer and, on a CPU, run
        faster.
      step_embedding: how `d` is shown: 'level', its -log2, for steps that are powers
        of two; 'size', a smooth function of any d, for methods that draw or
        differentiate it.
      time_scale: what times (and sizes) are multiplied with before their sinusoids;
        MeanFlow's network has 1, so that derivatives in t are gentle.
    """

    num_classes: int
    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    dtype: str = 'float32'
    remat: str = 'none'
    attention: str = 'auto'
    unroll: int = 1
    step_embedding: str = 'level'
    time_scale: float = 1000.0

    @nn.compact
    def __call__(self, x, t, d, w, label):
        """Predicts the velocity.

        Args:
          x: [B, H, H, C] noisy images or latents; H a multiple of the patch size.
          t: [B] time in [0, 1]; 0 is noise, 1 is data.
          d: [B] step size in [0, 1]; 0 asks for the instantaneous velocity.
          w: [B] guidance strength, 0 for none.
          label: [B] int32 in [0, num_classes], `num_classes` for no class.

        Returns:
          [B, H, H, C] float32.

        Raises:
          ValueError: the image is not square, or a size does not divide another.
        """
        batch, side, width, channels = x.shape
        check_sizes(side, width, self.patch_size, self.hidden_size, self.num_heads)
        dtype = jnp.dtype(self.dtype)
        grid, patch = side // self.patch_size, self.patch_size

        # A convolution with stride = kernel = patch, written as a product.
        x = x.reshape(batch, grid, patch, grid, patch, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid**2, patch**2 * channels)
        x = _dense(self.hidden_size, 'patch_embedding', dtype)(x.astype(dtype))
        x = x + position_embedding(self.hidden_size, grid)[None].astype(dtype)

        condition = self._condition(t, d, w, label)
        condition = nn.silu(condition).astype(dtype)

        block = Block
        if self.remat != 'none':
            block = nn.remat(
                Block, prevent_cse=False, policy=REMAT_POLICIES[self.remat]
            )
        x, _ = nn.scan(
            block,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=nn.broadcast,
            length=self.depth,
            unroll=self.unroll,
        )(
            self.num_heads, self.mlp_ratio, dtype, self.attention, name='blocks'
        )(x, condition)

        modulation = _zero_dense(2 * self.hidden_size, 'final_modulation', dtype)
        shift, scale = jnp.split(modulation(condition), 2, axis=-1)
        x = _modulate(_layer_norm(x, dtype), shift, scale)
        x = _zero_dense(patch**2 * channels, 'final', dtype)(x)
        x = x.reshape(batch, grid, grid, patch, patch, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side, side, channels)
        return x.astype(jnp.float32)

    def _condition(self, t, d, w, label):
        """Time + class + step size + guidance, [B, hidden_size] float32."""
        classes = nn.Embed(
            self.num_classes + 1,
            self.hidden_size,
            embedding_init=nn.initializers.normal(0.02),
            name='class_embedding',
        )
        condition = ScalarEmbedding(self.hidden_size, name='time_embedding')(
            t * self.time_scale
        ) + classes(label)
        if self.step_embedding == 'size':
            step = ScalarEmbedding(
                self.hidden_size, zero_init=True, name='step_embedding'
            )
            condition += d[:, None] * step(d * self.time_scale)
        else:
            # Row 0 for d = 1, 1 for d = 1/2, ...: a table and no sinusoids, of which
            # most are constant over the few levels. They add up to steps of a
            # hundred learning rates, and embeddings that drown the class.
            table = nn.Embed(
                MAX_LEVELS,
                self.hidden_size,
                embedding_init=nn.initializers.zeros,
                name='step_embedding',
            )
            level = jnp.round(-jnp.log2(jnp.where(d > 0, d, 1.0))).astype(jnp.int32)
            condition += jnp.where(d[:, None] > 0, table(level), 0.0)
        guidance = ScalarEmbedding(
            self.hidden_size, zero_init=True, name='guidance_embedding'
        )
        return condition + w[:, None] * guidance(w * GUIDANCE_SCALE)


def check_sizes(height, width, patch_size, hidden_size, num_heads) -> None:
    """Raises ValueError where sizes do not fit; what to change is in the message."""
    if height != width:
        raise ValueError(
            f'image of {height}x{width} is not square; crop or pad it, SiT takes '
            'square inputs'
        )
    if height % patch_size:
        raise ValueError(
            f'model.patch_size = {patch_size} does not divide data.image_size = '
            f'{height}; choose a divisor of {height}'
        )
    if (tokens := (height // patch_size) ** 2) > MAX_TOKENS:
        raise ValueError(
            f'data.image_size = {height} in patches of model.patch_size = {patch_size} '
            f'makes {tokens} tokens, more than {MAX_TOKENS}; use larger patches, or '
            'latents'
        )
    if hidden_size % num_heads:
        raise ValueError(
            f'model.num_heads = {num_heads} does not divide model.hidden_size = '
            f'{hidden_size}; choose a divisor of {hidden_size}'
        )
    if hidden_size % 4:
        raise ValueError(
            f'model.hidden_size = {hidden_size} must be a multiple of 4 for the 2-D '
            'sin-cos positions'
        )


def num_parameters(model: SiT, image_shape: tuple[int, int, int]) -> int:
    """Number of parameters for images of [H, W, C], without allocating any."""
    params = abstract_params(model, image_shape)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def init_params(model: SiT, image_shape: tuple[int, int, int], key: jax.Array):
    """Fresh float32 parameters for images of [H, W, C]."""
    zeros = jnp.zeros((1,))
    x, label = jnp.zeros((1, *image_shape)), jnp.zeros((1,), jnp.int32)
    return model.init(key, x, zeros, zeros, zeros, label)['params']


def abstract_params(model: SiT, image_shape: tuple[int, int, int]):
    """Shapes of the parameters (jax.ShapeDtypeStruct), without allocating any."""
    # attention='xla': the count does not depend on the kernel, which may not exist
    # on the machine that counts.
    model = dataclasses.replace(model, attention='xla')
    return jax.eval_shape(
        lambda key: init_params(model, image_shape, key), jax.random.key(0)
    )
