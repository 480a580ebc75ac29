"""A guided flow with a closed-form velocity: Gaussian data.

Data of class c are N(mu_c, s^2 I), data of the null label are N(0, S^2 I), noise is
N(0, I), and pairs are independent. (The null label is the mixture of the classes if
their means are drawn from N(0, (S^2 - s^2) I).) On x_t = (1 - t) x0 + t x1, with

    sigma_s(t)^2 = (1 - t)^2 + t^2 s^2,    a_s = d/dt log sigma_s
                                               = (t s^2 - (1 - t)) / sigma_s^2,

x_t and v = x1 - x0 are jointly Gaussian, so regression gives the velocity

    E[v | x_t = x, c] = mu_c + a_s (x - t mu_c),    E[v | x_t = x] = a_S x.

**Guidance.** v_w = (1 + w) v_c - w v_null.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianFlow:
    """The flow from noise N(0, I) to class data N(mu_c, class_std^2 I).

    Arguments of all methods: x [B, H, W, C]; t, w, label [B], 0 <= t <= 1.
    `label` may be the null label, num_classes, for which w has no effect.

    Attributes:
      means: [num_classes, H, W, C], mu_c.
      class_std: s > 0, standard deviation of a class around its mean.
      data_std: S >= s, standard deviation of all data around 0.
    """

    means: jax.Array
    class_std: float
    data_std: float

    def __post_init__(self):
        object.__setattr__(self, 'means', np.asarray(self.means, float))
        chex.assert_rank(self.means, 4)

    @property
    def num_classes(self) -> int:
        """Number of classes, which is also the index of the null label."""
        return self.means.shape[0]

    def velocity(self, x, t, w, label) -> jax.Array:
        """(1 + w) E[v | x, c] - w E[v | x], or E[v | x] for null; [B, H, W, C]."""
        mean, variance, w = self._of_class(w, label)
        slope = _slope(t, variance)
        conditional = mean + _expand(slope) * (x - _expand(t) * mean)
        unconditional = _expand(_slope(t, self.data_std**2)) * x
        return conditional + _expand(w) * (conditional - unconditional)

    def sample_data(self, key, label) -> jax.Array:
        """Data of the labels [B], [B, H, W, C]."""
        mean, variance, _ = self._of_class(jnp.zeros(label.shape), label)
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return mean + _expand(jnp.sqrt(variance)) * noise

    def _of_class(self, w, label):
        """Mean [B, H, W, C], variance [B] and effective w [B] for each label."""
        null = label == self.num_classes
        mean = jnp.asarray(self.means, w.dtype)[jnp.where(null, 0, label)]
        mean = jnp.where(_expand(null), 0.0, mean)
        variance = jnp.where(null, self.data_std**2, self.class_std**2)
        return mean, variance.astype(w.dtype), jnp.where(null, 0.0, w)


def _expand(array):
    return array[:, None, None, None]


def _variance(t, variance):
    """sigma(t)^2 = (1 - t)^2 + t^2 variance."""
    return (1 - t) ** 2 + t**2 * variance


def _slope(t, variance):
    """a(t) = d/dt log sigma(t)."""
    return (t * variance - (1 - t)) / _variance(t, variance)
