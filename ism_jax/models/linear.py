"""Linear layers whose weights are float32 and whose products are of any dtype."""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from ism_jax.runtime.sharding import BatchSharding

# Name of the products for policies of `jax.checkpoint`.
PRODUCT = 'product'


class Linear(nn.Module):
    """A linear layer on the last axis, with the parameters of `nn.Dense`.

    The product and the output are in `dtype`; the sums over devices of the gradient of
    the parameters are in float32.

    Attributes:
      features: size of the last axis of the output.
      dtype: 'float32' or 'bfloat16'.
      kernel_init: initialiser of the kernel [inputs, features].
      use_bias: whether to add a bias.
      precision: of the product; 'highest' for a true float32 product on a GPU or TPU.
      batch_sharding: devices that the batch is split over.
    """

    features: int
    dtype: Any = jnp.float32
    kernel_init: Callable[..., jax.Array] = nn.initializers.xavier_uniform()
    use_bias: bool = True
    precision: str | None = None
    batch_sharding: BatchSharding = BatchSharding()

    @nn.compact
    def __call__(self, x):
        """Maps x [B, ..., inputs] to [B, ..., features]."""
        shape = (x.shape[-1], self.features)
        kernel = self.param('kernel', self.kernel_init, shape)
        # One 2-D product per device: with batch and tokens as two contracted axes, the
        # gradient of the kernel takes three times as long on XLA's CPU backend.
        if self.batch_sharding.splits(x.shape[0]):
            rows = x.reshape(self.batch_sharding.size, -1, x.shape[-1])
            product = _product_with_copies
        else:
            rows, product = x.reshape(-1, x.shape[-1]), _product
        rows = rows.astype(self.dtype)
        out = product(rows, kernel, self.batch_sharding, self.precision)
        out = checkpoint_name(out, PRODUCT)
        out = out.reshape(*x.shape[:-1], self.features)
        if not self.use_bias:
            return out
        bias = self.param('bias', nn.initializers.zeros, (self.features,))
        bias = bias.reshape((1,) * (out.ndim - 1) + bias.shape)
        # In float32, so that the gradient of the bias is summed in float32.
        return (out.astype(jnp.float32) + bias).astype(self.dtype)


def _product(rows, kernel, split, precision):
    del split
    return jnp.matmul(rows, kernel.astype(rows.dtype), precision=precision)


# Without `checkpoint` the backward pass would keep every gathered kernel.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
def _product_with_copies(rows, kernel, split, precision):
    copies = split.copies(kernel, rows.dtype)
    return jnp.matmul(rows, copies, precision=precision)
