"""The flow map of `ism_jax.method.gaussian_flow`, in closed form.

v_w = (1 + w) v_c - w v_null is affine in x. With z = x - t mu_c,

    dz/dt = ((1 + w) a_s - w a_S) z + w mu_c (1 - t a_S),
    1 - t a_S = (1 - t) / sigma_S^2.

The homogeneous part is Phi(t) = sigma_s^(1 + w) / sigma_S^w, so that with e = t + d

    x_e = e mu_c + Phi(e)/Phi(t) (x_t - t mu_c)
          + w mu_c integral_t^e Phi(e)/Phi(r) (1 - r) / sigma_S(r)^2 dr.

Without guidance the integral vanishes and the map is elementary. Otherwise the
integrand is smooth and one-dimensional; Gauss-Legendre quadrature evaluates it.

**Small steps.** The mean velocity (x_e - x_t) / d is never computed as a difference.
sigma_s(e)^2 = sigma_s(t)^2 (1 + d r_s) with r_s = ((2 t + d) (1 + s^2) - 2) /
sigma_s(t)^2, so log Phi(e)/Phi(t) is d times a smooth function of d, and so is
Phi(e)/Phi(t) - 1. At d = 0 the mean velocity is the velocity, with exact derivatives:
a JVP through `GaussianFlow.apply` may be taken at any d.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.method import gaussian_flow

# Quadrature nodes; they reach the precision of float64 for s above about 0.2.
NODES = 32
# For |z| below it, series replace log1p(z)/z and expm1(z)/z at full float32 precision.
SERIES_RADIUS = 0.02


class GaussianFlow(gaussian_flow.GaussianFlow):
    """The flow with its map over steps of size d [B], t + d <= 1."""

    def flow_map(self, x, t, d, w, label) -> jax.Array:
        """x_{t+d} of the guided flow through x at time t, [B, H, W, C]."""
        return x + _expand(d) * self.mean_velocity(x, t, d, w, label)

    def mean_velocity(self, x, t, d, w, label) -> jax.Array:
        """(flow_map - x) / d, or `velocity` where d is 0, [B, H, W, C]."""
        mean, variance, w = self._of_class(w, label)
        rate = self._log_rate(t, d, w, variance)
        growth = rate * _expm1_ratio(d * rate)  # (Phi(e) / Phi(t) - 1) / d

        def integrand(node):
            """Phi(e)/Phi(r) (1 - r) / sigma_S(r)^2 at r = t + node d."""
            r, rest = t + node * d, (1 - node) * d
            ratio = jnp.exp(rest * self._log_rate(r, rest, w, variance))
            return ratio * (1 - r) / _variance(r, self.data_std**2)

        nodes, weights = np.polynomial.legendre.leggauss(NODES)
        nodes, weights = (jnp.asarray(a / 2, t.dtype) for a in (nodes + 1, weights))
        drift = jnp.sum(weights[:, None] * jax.vmap(integrand)(nodes), axis=0)
        homogeneous = _expand(growth) * (x - _expand(t) * mean)
        return mean + homogeneous + _expand(w * drift) * mean

    def apply(self, params, x, t, d, w, label) -> jax.Array:
        """`mean_velocity` with the signature of a network; it has no parameters."""
        del params
        return self.mean_velocity(x, t, d, w, label)

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


def _log_sigma_rate(t, d, variance):
    """(1/d) log sigma(t + d) / sigma(t); `_slope` where d is 0."""
    relative = ((2 * t + d) * (1 + variance) - 2) / _variance(t, variance)
    return 0.5 * relative * _log1p_ratio(d * relative)


def _log1p_ratio(z):
    """log(1 + z) / z, smooth through z = 0."""
    near = jnp.abs(z) < SERIES_RADIUS
    safe = jnp.where(near, 1.0, z)  # The unused branch must not give NaN gradients.
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
