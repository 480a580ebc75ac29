"""A network from another project as parameters of our SiT."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ism_jax.models import sit

# Modules that have no effect at d = 0, w = 0, and that a network may lack.
OPTIONAL = ('step_embedding', 'guidance_embedding')


class ConvertedNetwork(NamedTuple):
    """An official network, converted to ours.

    Attributes:
      params: parameters by module, without the `fresh` modules.
      model: arguments of `sit.SiT`, except for `num_classes`.
      num_classes: without the null label.
      image_shape: (H, W, C).
    """

    params: dict[str, Any]
    model: dict[str, Any]
    num_classes: int
    image_shape: tuple[int, int, int]

    @property
    def fresh(self) -> tuple[str, ...]:
        """Modules that the official network does not have; they are initialised."""
        return tuple(name for name in OPTIONAL if name not in self.params)


def preset_heads(hidden_size: int, depth: int) -> int:
    """Number of attention heads of the preset with this width and depth.

    Raises:
      ValueError: no preset has them, and the shapes do not determine the heads.
    """
    for sizes in sit.SIZES.values():
        if (sizes['hidden_size'], sizes['depth']) == (hidden_size, depth):
            return sizes['num_heads']
    raise ValueError(
        f'no preset has width {hidden_size} and depth {depth}, and the file does not '
        'say how many attention heads the network has; give --num_heads'
    )


def stack_layers(layers):
    """Stacks trees into one, with the layers on the first axis (`nn.scan`)."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
