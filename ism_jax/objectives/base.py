"""The interface of an objective: what training and sampling need from a method."""

import abc
from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ism_jax.method import interpolant, time_grid
from ism_jax.method.loss_distance import Distance
from ism_jax.method.training_batch import Batch


def option(default, help: str) -> Any:
    """A field of an objective: an option with its default and one line of help."""
    return dataclasses.field(default=default, metadata={'help': help})


@dataclasses.dataclass(frozen=True)
class BaseObjective(abc.ABC):
    """The loss, the sampler and the properties of a method.

    The network is a function `apply(params, x, t, d, w, label)` of x [B, H, W, C] and
    t, d, w, label [B]; its output is a velocity [B, H, W, C]. If the method
    `conditions_on_interval`, the loss passes the guidance interval [B, 2] as another
    argument; for sampling, the interval is already a part of `apply`.

    Attributes:
      num_classes: number of classes, and the index of the null label.
    """

    num_classes: int

    @abc.abstractmethod
    def __call__(
        self,
        apply: Callable[..., jax.Array],
        params,
        target_params,
        batch: Batch,
        key: jax.Array,
        *,
        distance: Distance,
        progress: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and its metrics.

        Args:
          apply: the network.
          params: online parameters, with respect to which the loss is differentiated.
          target_params: the target EMA; no gradient flows into it.
          batch: see `Batch`.
          key: random key, used by this call alone.
          distance: error [B, H, W, C] -> values [B] and their parts {name: [B]}.
          progress: step / number of steps of the training, in [0, 1), for curricula.

        Returns:
          The scalar loss and a flat dict of scalars.
        """

    def velocity(self, apply, params, x, t, d, w, label) -> jax.Array:
        """Mean velocity over the step from t to t + d, which the sampler integrates."""
        return apply(params, x, t, *self.step_condition(d, w), label)

    def step_condition(self, d, w) -> tuple | None:
        """The d and w that the network is conditioned on in a step of size d.

        None if the step is not x + d s(x, t, c, d, w) with one network call, as with
        classifier-free guidance. Such a sampler cannot be written without the method.

        Args:
          d, w: step size and guidance scale, numbers or [B].
        """
        return (time_grid.embedded_step(d, self.base_steps) if self.dyadic else d), w

    def sample(self, apply, params, noise, label, w, times, steps, key) -> jax.Array:
        """Data from noise, by x_{t+d} = x_t + d velocity(x_t, t, d) along a schedule.

        Args:
          apply, params: the network, usually of the inference EMA.
          noise: x0, [B, H, W, C], standard normal.
          label, w: [B].
          times: start times of the steps, [N], see `time_grid.times_and_sizes`.
          steps: step sizes, [N]; those after the first of size 0 are not taken.
          key: random key, for samplers that add noise between steps.

        Returns:
          x1, [B, H, W, C], not clipped.
        """
        del key  # The common sampler is deterministic.

        def body(x, step):
            t, d = (jnp.full(label.shape, value) for value in self.clip_step(*step))
            velocity = self.velocity(apply, params, x, t, d, w, label)
            return interpolant.step(x, velocity, d)

        return time_grid.take_steps(body, noise, times, steps)

    def restart(self, jump, x, label, times, steps, key) -> jax.Array:
        """Data from x_t, by a jump to the data in each step and fresh noise after it.

        Args:
          jump: (x, t) -> data, [B, H, W, C]; t is [B].
          x: x_t at the first time, [B, H, W, C].
          label, times, steps, key: see `sample`.
        """

        def body(carry, step):
            x, key = carry
            key, key_noise = jax.random.split(key)
            t, d = (jnp.full(label.shape, value) for value in self.clip_step(*step))
            data = jump(x, t)
            fresh = jax.random.normal(key_noise, x.shape)
            return interpolant.interpolate(fresh, data, t + d), key

        return time_grid.take_steps(body, (x, key), times, steps)[0]

    def at_interval(self, apply, interval):
        """The network at a guidance interval, as a function of its other inputs.

        Args:
          apply: the network.
          interval: start and end time of guidance, such as `default_interval`.
        """
        if not self.conditions_on_interval:
            return apply

        def conditioned(params, x, *rest):
            interval_of_each = jnp.broadcast_to(jnp.asarray(interval), (len(x), 2))
            return apply(params, x, *rest, interval_of_each)

        return conditioned

    def schedule(self, steps: int | Sequence[float]) -> tuple[float, ...]:
        """Step sizes from noise to data.

        Args:
          steps: a number of steps, or step sizes that sum to 1.

        Raises:
          ValueError: the network was not trained for these steps.
        """
        if not isinstance(steps, int):
            time_grid.check_schedule(steps, self.base_steps, dyadic=self.dyadic)
            return tuple(steps)
        if self.dyadic:
            return time_grid.dyadic_schedule(steps, self.base_steps)
        return time_grid.equal_schedule(steps, self.base_steps)

    def network_calls(self, steps: int, w: float) -> int:
        """Network calls per sample, in equal steps at guidance scale w.

        A call on 2 B samples, with and without labels, counts as two.
        """
        del w
        return steps

    def clip_step(self, t, d):
        """Time and size of the part of a step after `start_time`."""
        start = jnp.maximum(t, self.start_time)
        return start, t + d - start

    @property
    def deterministic(self) -> bool:
        """Whether the sampler adds no noise between steps and so defines paths."""
        return True

    @property
    def start_time(self) -> float:
        """Time at which sampling starts; noise serves as x_t at this time."""
        return 0.0

    @property
    def base_steps(self) -> int:
        """The largest number of steps, and 1 / the finest size of dyadic steps."""
        return 128

    @property
    def guidance_range(self) -> tuple[float, float]:
        """Lowest and highest guidance scale w of the sampler.

        (0, 0) for a method without guidance, (w, w) where training fixes w.
        """
        return 0.0, 0.0

    @property
    def guidance_interval(self) -> float:
        """Time from which guidance acts, by default if `conditions_on_interval`."""
        return 0.0

    @property
    def default_interval(self) -> tuple[float, float]:
        """Start and end time of guidance, where the sampler is given none."""
        return self.guidance_interval, 1.0

    @property
    def conditions_on_interval(self) -> bool:
        """Whether the network is conditioned on the guidance interval."""
        return False

    @property
    def dyadic(self) -> bool:
        """Whether the step sizes are those of the dyadic grid; else any are."""
        return False

    @property
    def conditions_on_step(self) -> bool:
        """Whether the network is conditioned on the step size; else d = 0 always."""
        return True

    @property
    def uses_target_ema(self) -> bool:
        """Whether the target EMA makes targets; else the online network does."""
        return False

    @property
    def has_forward_derivative(self) -> bool:
        """Whether the loss takes a Jacobian-vector product of the network."""
        return False

    @property
    def has_curriculum(self) -> bool:
        """Whether the loss depends on the progress of the training."""
        return False

    @property
    def batch_multiple(self) -> int:
        """Batch sizes must be a multiple of this, so that the split is exact."""
        return 1

    @property
    def min_batch(self) -> int:
        """The smallest batch size that trains every term and every step size."""
        return 1

    @property
    def model_options(self) -> dict[str, object]:
        """Model options that the method overrides."""
        return {}
