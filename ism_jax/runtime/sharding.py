"""Device meshes and shardings: axis `data` splits batches, `fsdp` also parameters.

Batches are split over both axes. Parameters, optimizer state and EMA weights follow
one rule on their shapes: the largest dimension that `fsdp` divides is split over
`fsdp`, and small arrays are replicated.
"""

import math

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

# Smaller arrays (in elements) are replicated: gathering them costs more than a copy.
MIN_SIZE_TO_SHARD = 2**12

BATCH = P(('data', 'fsdp'))  # [B, ...]
POOL = P(None, ('data', 'fsdp'))  # [K, M, ...]: each of the K batches is split.


def make_mesh(data: int = -1, fsdp: int = 1, devices=None) -> jax.sharding.Mesh:
    """Returns a `(data, fsdp)` mesh over all of `devices`, in the order of processes.

    Args:
      data: size of the axis `data`; -1 for the number of devices divided by `fsdp`.
      fsdp: size of the axis `fsdp`.
      devices: None for all devices of all processes.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1:
        data = len(devices) // fsdp
    assert data * fsdp == len(devices), (data, fsdp, len(devices))
    auto = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((data, fsdp), ('data', 'fsdp'), auto, devices=devices)
    if _is_in_process_order(mesh.devices):
        return mesh
    # JAX orders devices by their interconnect. Each process feeds consecutive rows of
    # a batch, so the order of processes takes precedence.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    devices = np.array(devices).reshape(data, fsdp)
    return jax.sharding.Mesh(devices, ('data', 'fsdp'), auto)


def local_mesh() -> jax.sharding.Mesh:
    """Returns a mesh of this process's devices, for work that it does alone."""
    return make_mesh(devices=jax.local_devices())


def _is_in_process_order(devices: np.ndarray) -> bool:
    processes = [device.process_index for device in devices.flat]
    return processes == sorted(processes)


def leaf_spec(shape: tuple[int, ...], fsdp: int) -> P:
    """Returns how an array of this shape is split over the `fsdp` axis."""
    if fsdp == 1 or math.prod(shape) < MIN_SIZE_TO_SHARD:
        return P()
    for axis in np.argsort(shape, kind='stable')[::-1]:
        if shape[axis] % fsdp == 0:
            return P(*(None,) * int(axis), 'fsdp')
    return P()


def tree_shardings(tree, mesh: jax.sharding.Mesh):
    """Returns the `NamedSharding` of each array (or shape) of a tree."""
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, leaf_spec(leaf.shape, mesh.shape['fsdp'])),
        tree,
    )


def constrain_batch(x: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
    """Returns `x` [B, ...] with its batch split over the mesh, for use under jit.

    With sharded parameters XLA's partitioner may otherwise gather the activations and
    split their features, which moves far more data than gathering the parameters.

    Args:
      x: any array whose first axis is the batch.
      mesh: `(data, fsdp)`; None for the identity. A batch that the mesh does not
        divide, such as that of an initialisation, is left to the partitioner.
    """
    if mesh is None or mesh.size == 1 or x.shape[0] % mesh.size:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, P())


def replicate(tree, mesh: jax.sharding.Mesh):
    """Copies a tree, the same in all processes, to all devices of the mesh."""
    return jax.jit(_identity, out_shardings=replicated(mesh))(tree)


def _identity(tree):
    return tree


def shard_pool(array: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
    """The pool [K, M, ...] of which each process holds [K, M / processes, ...]."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, POOL), array)
