"""A flow whose velocity and flow map are known: Gaussian data, guidance included.

Data of class c are N(mu_c, s^2 I), data of no class N(0, S^2 I), noise is N(0, I), and
pairs are independent. (The two agree where class means are drawn from
N(0, (S^2 - s^2) I).) On x_t = (1 - t) x0 + t x1, with

    sigma_s(t)^2 = (1 - t)^2 + t^2 s^2,    a_s = d/dt log sigma_s
                                               = (t s^2 - (1 - t)) / sigma_s^2,

x_t and v = x1 - x0 are jointly Gaussian, and regression gives the velocity

    E[v | x_t = x, c] = mu_c + a_s (x - t mu_c),    E[v | x_t = x] = a_S x.

**Guidance.** v_w = (1 + w) v_c - w v_null is affine in x. With z = x - t mu_c,

    dz/dt = ((1 + w) a_s - w a_S) z + w mu_c (1 - t a_S),
    1 - t a_S = (1 - t) / sigma_S^2.

The homogeneous part is Phi(t) = sigma_s^(1 + w) / sigma_S^w, so that with e = t + d

    x_e = e mu_c + Phi(e)/Phi(t) (x_t - t mu_c)
          + w mu_c integral_t^e Phi(e)/Phi(r) (1 - r) / sigma_S(r)^2 dr.

Without guidance the integral falls away and the map is elementary. Otherwise it is
smooth and one-dimensional, and is left to Gauss-Legendre quadrature.

**Small steps.** The mean velocity (x_e - x_t) / d is never computed as a difference.
sigma_s(e)^2 = sigma_s(t)^2 (1 + d r_s) with r_s = ((2 t + d) (1 + s^2) - 2) /
sigma_s(t)^2, so log Phi(e)/Phi(t) is d times a smooth function of d, and so is
Phi(e)/Phi(t) - 1. At d = 0 the mean velocity is the velocity, and its derivatives are
right there as well: a JVP through `GaussianFlow.apply` may be taken at any d.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

NODES = 32  # Of the quadrature: float64's precision for s above about 0.2.
# Below it series replace log1p(z)/z and expm1(z)/z, to full precision at float32.
SERIES_RADIUS = 0.02


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianFlow:
    """Noise N(0, I) to class data N(mu_c, class_std^2 I) along straight paths.

    Arguments of all methods: x [B, H, W, C]; t, d, w, label [B], 0 <= t <= t + d <= 1.
    `label` may be the null label, num_classes: there w has no effect.

    Attributes:
      means: [num_classes, H, W, C], mu_c.
      class_std: s, deviation of a class around its mean; above 0.
      data_std: S, deviation of all data around 0; at least class_std.

    Raises:
      ValueError: no such data exist.
    """

    means: jax.Array
    class_std: float
    data_std: float

    def __post_init__(self):
        object.__setattr__(self, 'means', np.asarray(self.means, float))
        if self.means.ndim != 4:
            raise ValueError(
                f'means have the shape {self.means.shape}; it must be '
                '[num_classes, H, W, C]'
            )
        if not self.class_std > 0:
            raise ValueError(
                f'class_std = {self.class_std} must be above 0, so that the flow can '
                'be inverted; 0.5 is usual'
            )
        if not self.data_std >= self.class_std:
            raise ValueError(
                f'data_std = {self.data_std} must be at least class_std = '
                f'{self.class_std}: all data spread no less than those of one class'
            )

    @property
    def num_classes(self) -> int:
        """Number of classes, which is also the null label."""
        return self.means.shape[0]

    def velocity(self, x, t, w, label) -> jax.Array:
        """(1 + w) E[v | x, c] - w E[v | x], [B, H, W, C]; E[v | x] for no class."""
        mean, variance, w = self._of_class(w, label)
        slope = _slope(t, variance)
        conditional = mean + _expand(slope) * (x - _expand(t) * mean)
        unconditional = _expand(_slope(t, self.data_std**2)) * x
        return conditional + _expand(w) * (conditional - unconditional)

    def flow_map(self, x, t, d, w, label) -> jax.Array:
        """x_{t+d} of the guided flow that passes through x at time t."""
        return x + _expand(d) * self.mean_velocity(x, t, d, w, label)

    def mean_velocity(self, x, t, d, w, label) -> jax.Array:
        """(flow_map - x) / d, and `velocity` where d is 0."""
        mean, variance, w = self._of_class(w, label)
        rate = self._log_rate(t, d, w, variance)
        growth = rate * _expm1_ratio(d * rate)  # (Phi(e) / Phi(t) - 1) / d

        def source(node):
            """The integrand at r = t + node d."""
            place, rest = t + node * d, (1 - node) * d
            carried = jnp.exp(rest * self._log_rate(place, rest, w, variance))
            return carried * (1 - place) / _variance(place, self.data_std**2)

        nodes, weights = np.polynomial.legendre.leggauss(NODES)
        nodes, weights = (jnp.asarray(a / 2, t.dtype) for a in (nodes + 1, weights))
        drift = jnp.sum(weights[:, None] * jax.vmap(source)(nodes), axis=0)
        moved = _expand(growth) * (x - _expand(t) * mean)
        return mean + moved + _expand(w * drift) * mean

    def apply(self, params, x, t, d, w, label) -> jax.Array:
        """The ideal network, `mean_velocity`; it has no parameters."""
        del params
        return self.mean_velocity(x, t, d, w, label)

    def sample_data(self, key, label) -> jax.Array:
        """Data of the given classes [B], or of no class: [B, H, W, C]."""
        mean, variance, _ = self._of_class(jnp.zeros(label.shape), label)
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return mean + _expand(jnp.sqrt(variance)) * noise

    def _of_class(self, w, label):
        """Mean [B, H, W, C], variance [B] and the guidance [B] that acts."""
        null = label == self.num_classes
        mean = jnp.asarray(self.means, w.dtype)[jnp.where(null, 0, label)]
        mean = jnp.where(_expand(null), 0.0, mean)
        variance = jnp.where(null, self.data_std**2, self.class_std**2)
        return mean, variance.astype(w.dtype), jnp.where(null, 0.0, w)

    def _log_rate(self, t, d, w, variance):
        """(1/d) log Phi(t + d) / Phi(t), [B]; its limit where d is 0."""
        conditional = _log_sigma_rate(t, d, variance)
        unconditional = _log_sigma_rate(t, d, self.data_std**2)
        return conditional + w * (conditional - unconditional)


def _expand(array):
    return array[:, None, None, None]


def _variance(t, variance):
    """sigma(t)^2 = (1 - t)^2 + t^2 variance."""
    return (1 - t) ** 2 + t**2 * variance


def _slope(t, variance):
    """a(t) = d/dt log sigma(t)."""
    return (t * variance - (1 - t)) / _variance(t, variance)


def _log_sigma_rate(t, d, variance):
    """(1/d) log sigma(t + d) / sigma(t); `_slope` where d is 0."""
    relative = ((2 * t + d) * (1 + variance) - 2) / _variance(t, variance)
    return 0.5 * relative * _log1p_ratio(d * relative)


def _log1p_ratio(z):
    """log(1 + z) / z, smooth through z = 0."""
    near = jnp.abs(z) < SERIES_RADIUS
    safe = jnp.where(near, 1.0, z)  # Else the unused branch's derivative is NaN.
    series = jnp.where(near, z, 0.0)
    series = 1 - series * (1 / 2 - series * (1 / 3 - series * (1 / 4 - series / 5)))
    return jnp.where(near, series, jnp.log1p(safe) / safe)


def _expm1_ratio(z):
    """(exp(z) - 1) / z, smooth through z = 0."""
    near = jnp.abs(z) < SERIES_RADIUS
    safe = jnp.where(near, 1.0, z)
    series = jnp.where(near, z, 0.0)
    series = 1 + series / 2 * (1 + series / 3 * (1 + series / 4 * (1 + series / 5)))
    return jnp.where(near, series, jnp.expm1(safe) / safe)
