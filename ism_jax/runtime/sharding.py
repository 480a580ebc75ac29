"""Meshes and shardings: axis `data` splits batches, axis `fsdp` parameters too.

Parameters, optimizer state and both averages follow one rule on shapes: the largest
axis that the `fsdp` axis divides is split, small arrays are copied to every device.
Batches are split over both axes.
"""

import math

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

# Arrays of fewer elements than this are cheaper to copy than to gather.
MIN_SIZE_TO_SHARD = 2**12

# A pool is [K, M, ...]: each batch in it is split over the devices.
POOL = P(None, ('data', 'fsdp'))


def make_mesh(data: int = -1, fsdp: int = 1, devices=None) -> jax.sharding.Mesh:
    """A `(data, fsdp)` mesh; `data = -1` takes all devices that are left.

    Raises:
      ValueError: the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(
            f'mesh.fsdp = {fsdp} does not divide the {len(devices)} devices; choose a '
            'divisor'
        )
    data = len(devices) // fsdp if data == -1 else data
    if data * fsdp != len(devices):
        raise ValueError(
            f'mesh.data = {data} times mesh.fsdp = {fsdp} is not the number of devices '
            f'{len(devices)}; set mesh.data = -1 to take what is left'
        )
    auto = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((data, fsdp), ('data', 'fsdp'), auto, devices=devices)
    if _is_in_process_order(mesh.devices):
        return mesh
    # JAX orders them by how they are wired. Rows of a batch belong to processes, which
    # is worth more: collectives know the wires anyway.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    devices = np.array(devices).reshape(data, fsdp)
    return jax.sharding.Mesh(devices, ('data', 'fsdp'), auto)


def local_mesh() -> jax.sharding.Mesh:
    """All devices of this process, for work that it does by itself."""
    return make_mesh(devices=jax.local_devices())


def _is_in_process_order(devices: np.ndarray) -> bool:
    """Whether the rows of a batch lie in the order of the processes."""
    processes = [device.process_index for device in devices.flat]
    return processes == sorted(processes)


def leaf_spec(shape: tuple[int, ...], fsdp: int) -> P:
    """How one array is split over the `fsdp` axis."""
    if fsdp == 1 or math.prod(shape) < MIN_SIZE_TO_SHARD:
        return P()
    for axis in np.argsort(shape, kind='stable')[::-1]:
        if shape[axis] % fsdp == 0:
            return P(*(None,) * int(axis), 'fsdp')
    return P()


def tree_shardings(tree, mesh):
    """`NamedSharding` of each array (or shape) of a tree."""
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, leaf_spec(leaf.shape, mesh.shape['fsdp'])),
        tree,
    )


def replicated(mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def replicate(tree, mesh):
    """Puts what all processes have alike on all devices of the mesh."""
    return jax.jit(_same, out_shardings=replicated(mesh))(tree)


def _same(tree):
    return tree


def shard_pool(array: np.ndarray, mesh) -> jax.Array:
    """Puts this process's part of a pool, [K, M / processes, ...], on the devices."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, POOL), array)
