"""Device meshes and shardings: axis `data` splits batches, `fsdp` also parameters.

| arrays | sharding |
|---|---|
| parameters, optimizer state, both EMAs, gradients | `leaf_spec` of their shape |
| pool | `POOL` |
| batch, activations | `BATCH` |
| weights while a layer uses them | a copy on each device: `BatchSharding.copies` |

`leaf_spec` splits the largest dimension that `fsdp` divides over `fsdp`, and replicates
small arrays.

XLA's partitioner decides what is not stated. With sharded parameters it then gathers
the activations and splits their features, which moves far more data than gathering the
weights, and sums the gradients of bfloat16 products over devices in bfloat16. So the
network states the sharding of each layer, through a `BatchSharding`.
"""

import dataclasses
import functools
import math

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

# Smaller arrays (in elements) are replicated: gathering them costs more than a copy.
MIN_SIZE_TO_SHARD = 2**12

# Devices that share a state if the number is left open: the GPUs of most machines, and
# neighbours on a TPU slice.
MAX_GROUP = 8

BATCH = P(('data', 'fsdp'))  # [B, ...]
POOL = P(None, ('data', 'fsdp'))  # [K, M, ...]: each of the K batches is split.


def mesh_shape(data: int, fsdp: int, devices: int) -> tuple[int, int]:
    """Returns the sizes of the axes of a mesh; their product may not be `devices`.

    Args:
      data: size of the axis `data`; -1 for the number of devices divided by `fsdp`.
      fsdp: size of the axis `fsdp`; -1 for the devices that `data` leaves, or, if that
        is -1 as well, for up to `MAX_GROUP`.
      devices: number of devices.
    """
    if fsdp == -1:
        fsdp = math.gcd(devices, MAX_GROUP) if data == -1 else max(1, devices // data)
    return devices // fsdp if data == -1 else data, fsdp


def make_mesh(data: int = -1, fsdp: int = 1, devices=None) -> jax.sharding.Mesh:
    """Returns a `(data, fsdp)` mesh over all of `devices`, in the order of processes.

    Args:
      data, fsdp: see `mesh_shape`.
      devices: None for all devices of all processes.
    """
    devices = jax.devices() if devices is None else devices
    data, fsdp = mesh_shape(data, fsdp, len(devices))
    assert data * fsdp == len(devices), (data, fsdp, len(devices))
    # A group may be part of an axis of a slice, such as 8 chips of 4x4.
    placed = mesh_utils.create_device_mesh(
        (data, fsdp), devices, allow_split_physical_axes=True
    )
    if not _is_in_process_order(placed):
        # JAX orders devices by their interconnect. Each process feeds consecutive rows
        # of a batch, so the order of processes takes precedence.
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        placed = np.array(devices).reshape(data, fsdp)
    return jax.sharding.Mesh(placed, ('data', 'fsdp'), (AxisType.Auto, AxisType.Auto))


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


@dataclasses.dataclass(frozen=True)
class BatchSharding:
    """How a network splits its batch over devices, for use under jit.

    Where the devices do not divide a batch, such as that of an initialisation, the
    sharding is left to XLA. It changes no value beyond rounding.

    Attributes:
      mesh: `(data, fsdp)`; None for one device.
      axes: axes of the mesh that split the batch.
    """

    mesh: jax.sharding.Mesh | None = None
    axes: tuple[str, ...] = ('data', 'fsdp')

    @property
    def size(self) -> int:
        """Number of devices that split a batch."""
        if self.mesh is None:
            return 1
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def platform(self) -> str:
        """The platform of the devices: 'cpu', 'gpu' or 'tpu'."""
        if self.mesh is None:
            return jax.default_backend()
        return self.mesh.devices.flat[0].platform

    def splits(self, batch_size: int) -> bool:
        """Whether a batch of this size is split over several devices."""
        return self.size > 1 and batch_size % self.size == 0

    def constrain(self, x: jax.Array) -> jax.Array:
        """Returns `x` [B, ...] with its batch split over the devices."""
        if not self.splits(x.shape[0]):
            return x
        return _constrain(x, self.mesh, P(self.axes))

    def copies(self, weight: jax.Array, dtype) -> jax.Array:
        """Returns a copy in `dtype` on each device that splits the batch, [N, ...].

        A sharded weight is gathered in `dtype`. Its gradient is the sum over the copies
        in float32: an all-reduce over `data`, and with `fsdp` before it a
        reduce-scatter where the compiler has that (TPU and GPU; XLA's CPU backend
        reduces and then slices).

        Args:
          weight: float32, with the sharding of `leaf_spec`.
          dtype: of the copies.
        """
        return _copies(weight, jnp.dtype(dtype), self)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _copies(weight, dtype, split: BatchSharding):
    gathered = _constrain(weight.astype(dtype), split.mesh, P())
    copies = jnp.broadcast_to(gathered[None], (split.size, *weight.shape))
    return _constrain(copies, split.mesh, P(split.axes))


def _copies_forward(weight, dtype, split):
    return _copies(weight, dtype, split), None


def _copies_backward(dtype, split, _, cotangent):
    shape, mesh = cotangent.shape[1:], split.mesh
    spec = leaf_spec(shape, mesh.shape['fsdp'])
    gradient = cotangent.astype(jnp.float32)
    if split.axes == ('data', 'fsdp') and spec != P():
        # In one sum, XLA for TPUs would reduce over all devices before it slices.
        gradient = gradient.reshape(*mesh.devices.shape, *shape).sum(1)
        gradient = _constrain(gradient, mesh, P('data', *spec))
    return (_constrain(gradient.sum(0), mesh, spec),)


_copies.defvjp(_copies_forward, _copies_backward)


def _constrain(x, mesh, spec):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def group_copies(tree, mesh: jax.sharding.Mesh | None):
    """Returns a copy of parameters [...] for each group of devices, [data, ...].

    A group is a position on the axis `data`. It takes no memory or communication: the
    parameters are replicated over this axis. Gradients with respect to the copies do
    not cross groups, so that parts of a batch can be accumulated before they do.
    Without a mesh, the tree is returned as it is.
    """
    if mesh is None:
        return tree

    def copy(leaf):
        copies = jnp.broadcast_to(leaf[None], (mesh.shape['data'], *leaf.shape))
        return _constrain(copies, mesh, _group_spec(leaf.shape, mesh))

    return jax.tree.map(copy, tree)


def constrain_groups(tree, mesh: jax.sharding.Mesh):
    """Returns arrays [data, ...] that stay on the groups of `group_copies`."""
    return jax.tree.map(
        lambda leaf: _constrain(leaf, mesh, _group_spec(leaf.shape[1:], mesh)), tree
    )


def sum_groups(tree, mesh: jax.sharding.Mesh):
    """Returns the sum over groups of gradients [data, ...], sharded as parameters."""
    return jax.tree.map(
        lambda leaf: _constrain(
            leaf.sum(0), mesh, leaf_spec(leaf.shape[1:], mesh.shape['fsdp'])
        ),
        tree,
    )


def _group_spec(shape, mesh):
    return P('data', *leaf_spec(shape, mesh.shape['fsdp']))


def apply_padded(apply, multiple: int):
    """Returns a network that is applied to multiples of `multiple` samples.

    Args:
      apply: the network, (params, *inputs, **options) -> outputs, whose inputs and
        outputs start with the batch axis.
      multiple: number of devices that split a batch.
    """

    def padded(params, *inputs, **options):
        size = len(inputs[0])
        missing = -size % multiple
        if not missing:
            return apply(params, *inputs, **options)

        pad = lambda a: jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1))
        outputs = apply(params, *map(pad, inputs), **options)
        return jax.tree.map(lambda array: array[:size], outputs)

    return padded


def apply_in_groups(apply, mesh: jax.sharding.Mesh):
    """Returns a network whose parameters are `group_copies`.

    Args:
      apply: the network, (params, *inputs, **options) -> outputs, whose inputs and
        outputs start with the batch axis; it splits a batch over `fsdp` alone.
      mesh: the devices.
    """
    groups = mesh.shape['data']

    def grouped(params, *inputs, **options):
        split = lambda array: array.reshape(groups, -1, *array.shape[1:])
        one_group = functools.partial(apply, **options)
        outputs = jax.vmap(one_group, spmd_axis_name='data')(
            params, *map(split, inputs)
        )
        join = lambda array: array.reshape(-1, *array.shape[2:])
        return jax.tree.map(join, outputs)

    return apply_padded(grouped, mesh.size)


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
