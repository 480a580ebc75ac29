"""What every network shares: its inputs, and the embeddings of its conditions.

A network is conditioned on the time t, the step size d, the guidance scale w, the
guidance interval and the label. The terms of d, w and the interval vanish at d = 0 and
w = 0 for any parameters, and their last layers are initialised to zero: there a network
*is* a plain velocity network of a flow, before and after training.
"""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.models.linear import PRODUCT, Linear
from ism_jax.runtime.sharding import BatchSharding

FREQUENCY_FEATURES = 256
MAX_PERIOD = 10_000.0
MAX_LEVELS = 16  # Distinct dyadic step sizes, from 1 down to 1/32768.
STEP_EMBEDDINGS = ('level', 'size')
GUIDANCE_EMBEDDINGS = ('scale', 'ratio')
REMAT_POLICIES = {
    # What the backward pass keeps: 'none' every activation, 'full' only the inputs of
    # the blocks, 'dots' also the products with parameters (attention is recomputed).
    'none': None,
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.save_only_these_names(PRODUCT),
}
# Factor on w, and on the ends of its interval, before their sinusoids: scales 1/4 apart
# get distinct features, and scales in between stay close to their neighbours.
GUIDANCE_SCALE = 10.0


def frequencies() -> np.ndarray:
    """Frequencies of the sinusoidal features, [128] float64, in radians per unit."""
    half = FREQUENCY_FEATURES // 2
    return np.exp(-np.log(MAX_PERIOD) * np.arange(half) / half)


def frequency_features(x: jax.Array) -> jax.Array:
    """Sinusoidal features of one scalar per sample (DiT), [B] -> [B, 256]."""
    angles = x.astype(jnp.float32)[:, None] * frequencies()[None].astype(np.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ScalarEmbedding(nn.Module):
    """Two-layer embedding of a scalar condition, [B] -> [B, hidden_size], float32."""

    hidden_size: int
    zero_init: bool = False
    batch_sharding: BatchSharding = BatchSharding()

    @nn.compact
    def __call__(self, x):
        small = nn.initializers.normal(0.02)
        last = nn.initializers.zeros if self.zero_init else small
        layer = functools.partial(
            Linear,
            self.hidden_size,
            precision='highest',
            batch_sharding=self.batch_sharding,
        )
        x = layer(kernel_init=small, name='hidden')(frequency_features(x))
        return layer(kernel_init=last, name='out')(nn.silu(x))


class ConditionedNetwork(nn.Module, kw_only=True):
    """The conditions of a velocity network s(x_t, t, c, d, w).

    Attributes:
      num_classes: labels are 0 .. num_classes - 1; `num_classes` is the null label.
      hidden_size: width of the network.
      dtype: dtype of the computation, 'float32' or 'bfloat16'; parameters are float32.
      remat: which activations the backward pass keeps, a key of
        `REMAT_POLICIES`.
      attention: one of `attention.IMPLEMENTATIONS`.
      step_embedding: how the network is conditioned on d: 'level' looks up -log2(d),
        for steps that are powers of two; 'size' embeds any d smoothly, for methods that
        draw d at random or differentiate with respect to it.
      time_scale: factor on t and d before their sinusoids, which DiT designed for times
        of 0 to 1000; MeanFlow uses 1, for small derivatives in t.
      guidance_embedding: how the network is conditioned on w: 'scale' embeds w, 'ratio'
        embeds w / (1 + w), which is less than 1 for any w.
      interval_input: whether the network is conditioned on the guidance interval.
      batch_sharding: devices that the batch is split over.
    """

    num_classes: int
    hidden_size: int
    dtype: str = 'float32'
    remat: str = 'none'
    attention: str = 'auto'
    step_embedding: str = 'level'
    time_scale: float = 1000.0
    guidance_embedding: str = 'scale'
    interval_input: bool = False
    batch_sharding: BatchSharding = BatchSharding()
    velocity_head = 0  # Blocks of a second output, which only transformers have.
    class_std = 0.02  # Of the class embeddings' initial values, as in DiT.

    @property
    def condition_size(self) -> int:
        """Width of the embeddings of the conditions."""
        return self.hidden_size

    def _linear(self, features, name, **options):
        """A layer outside of the blocks, in float32."""
        options |= dict(batch_sharding=self.batch_sharding, precision='highest')
        return Linear(features, name=name, **options)

    def _scalar_embedding(self, name, zero_init=False):
        return ScalarEmbedding(
            self.condition_size, zero_init, self.batch_sharding, name=name
        )

    def _condition(self, t, d, w, label, interval):
        """Sum of the embeddings of all conditions, [B, condition_size] float32."""
        condition = self._time(t) + self._class(label) + self._step(d)
        guidance = self._guidance(w)
        if self.interval_input:
            guidance += sum(self._interval(w, interval))
        return condition + guidance

    def _class(self, label):
        table = nn.Embed(
            self.num_classes + 1,
            self.condition_size,
            embedding_init=nn.initializers.normal(self.class_std),
            name='class_embedding',
        )
        return table(label)

    def _time(self, t):
        return self._scalar_embedding('time_embedding')(t * self.time_scale)

    def _step(self, d):
        """Embedding of the step size, 0 where d = 0."""
        if self.step_embedding == 'size':
            step = self._scalar_embedding('step_embedding', zero_init=True)
            return d[:, None] * step(d * self.time_scale)
        # Row k is for d = 2^-k. A table instead of sinusoids: over so few levels most
        # sinusoids are constant, so their updates add up (to about a hundred learning
        # rates per step) and the embedding outgrows that of the class.
        table = nn.Embed(
            MAX_LEVELS,
            self.condition_size,
            embedding_init=nn.initializers.zeros,
            name='step_embedding',
        )
        level = jnp.round(-jnp.log2(jnp.where(d > 0, d, 1.0))).astype(jnp.int32)
        return jnp.where(d[:, None] > 0, table(level), 0.0)

    def _guidance(self, w):
        """Embedding of the guidance scale, 0 where w = 0."""
        return self._guided_embedding('guidance_embedding', w, self._strength(w))

    def _interval(self, w, interval):
        """Embeddings of the start and the end of guidance, 0 where w = 0."""
        if interval is None:
            interval = jnp.tile(jnp.array([[0.0, 1.0]]), (w.shape[0], 1))
        return [
            self._guided_embedding(f'interval_{name}_embedding', w, interval[:, column])
            for column, name in enumerate(('start', 'end'))
        ]

    def _strength(self, w):
        return w / (1 + w) if self.guidance_embedding == 'ratio' else w

    def _guided_embedding(self, name, w, value):
        """Embedding of a value, times the guidance."""
        embedding = self._scalar_embedding(name, zero_init=True)
        return self._strength(w)[:, None] * embedding(value * GUIDANCE_SCALE)


def num_parameters(model: ConditionedNetwork, image_shape: tuple[int, int, int]) -> int:
    """Number of parameters for images [H, W, C], without allocating any."""
    params = abstract_params(model, image_shape)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def init_params(
    model: ConditionedNetwork, image_shape: tuple[int, int, int], key: jax.Array
):
    """Initial float32 parameters for images [H, W, C]."""
    zeros = jnp.zeros((1,))
    x, label = jnp.zeros((1, *image_shape)), jnp.zeros((1,), jnp.int32)
    options = dict(with_velocity=True) if model.velocity_head else {}
    # As one program; otherwise each operation is compiled alone.
    init = jax.jit(lambda *inputs: model.init(*inputs, **options))
    return init(key, x, zeros, zeros, zeros, label)['params']


def abstract_params(model: ConditionedNetwork, image_shape: tuple[int, int, int]):
    """Shapes of the parameters (`jax.ShapeDtypeStruct`), without allocating any."""
    # The shapes do not depend on the attention kernel, which may be missing here.
    model = dataclasses.replace(model, attention='xla')
    return jax.eval_shape(
        lambda key: init_params(model, image_shape, key), jax.random.key(0)
    )
