"""Chips by name: their public peaks, and devices to compile for without having them.

    devices = chips.devices('v5p:2x2x4')  # 16 chips; or 'h100:8'
    mesh = sharding.make_mesh(data=-1, fsdp=1, devices=devices)

The devices of a topology cannot run anything, but XLA compiles for them: for TPUs with
libtpu, for NVIDIA GPUs with JAX's CUDA plugin.
"""

import dataclasses
import importlib.util
import os
import re

import jax

GIB = 2**30
TPU_DOCS = 'https://docs.cloud.google.com/tpu/docs/'
NVIDIA = 'https://www.nvidia.com/en-us/data-center/'


@dataclasses.dataclass(frozen=True)
class Chip:
    """Public figures of one device as JAX counts them: half a chip of a TPU7x.

    Attributes:
      name: as in a topology, such as 'v5p'.
      memory: bytes that a program can use. On TPUs what libtpu 0.0.50 allows; on GPUs
        the 75 % of the memory that JAX reserves by default.
      tflops: peak TFLOP/s of products in bfloat16, without sparsity.
      memory_gbps: GB/s of the main memory.
      link_gbps: GB/s that a chip sends to the others of a slice or machine, with all
        its links in use.
      source: page with the peaks.
    """

    name: str
    memory: int
    tflops: float
    memory_gbps: float
    link_gbps: float
    source: str

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu compiles for it."""
        return self.name not in _GPUS


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """What XLA's compiler asks about a GPU, from NVIDIA's architecture papers."""

    description: str
    capability: int
    cores: int
    lanes: int  # Single-precision units per core.
    clock_ghz: float
    memory: int
    memory_gbps: float
    l2_cache: int
    shared_memory: int  # Bytes per core; a block gets 1 KiB less.


_GPUS = {
    'a100': _Gpu(
        'NVIDIA A100-SXM4-80GB', 8, 108, 64, 1.41, 85_100_068_864, 2039,
        l2_cache=40 << 20, shared_memory=164 << 10,
    ),
    'h100': _Gpu(
        'NVIDIA H100 80GB HBM3', 9, 132, 128, 1.98, 84_942_979_072, 3352,
        l2_cache=50 << 20, shared_memory=228 << 10,
    ),
    'h200': _Gpu(
        'NVIDIA H200', 9, 132, 128, 1.98, 150_754_820_096, 4800,
        l2_cache=50 << 20, shared_memory=228 << 10,
    ),
}  # fmt: skip

# The links are those of one direction: half of a page's "bidirectional bandwidth".
CHIPS = {
    chip.name: chip
    for chip in (
        Chip('v4', int(30.75 * GIB), 275, 1200, 300, TPU_DOCS + 'v4'),
        Chip('v5e', int(15.75 * GIB), 197, 819, 200, TPU_DOCS + 'v5e'),
        Chip('v5p', int(95.73 * GIB), 459, 2765, 600, TPU_DOCS + 'v5p'),
        Chip('v6e', int(31.24 * GIB), 918, 1638, 400, TPU_DOCS + 'v6e'),
        Chip('tpu7x', int(94.74 * GIB), 1153.5, 3690, 300, TPU_DOCS + 'tpu7x'),
        Chip('a100', _GPUS['a100'].memory * 3 // 4, 312, 2039, 300, NVIDIA + 'a100'),
        Chip('h100', _GPUS['h100'].memory * 3 // 4, 989, 3352, 450, NVIDIA + 'h100'),
        Chip('h200', _GPUS['h200'].memory * 3 // 4, 989, 4800, 450, NVIDIA + 'h200'),
    )
}
_TOPOLOGY = re.compile(r'(\w+):(\d+(?:x\d+)*)')
_LIBTPU = (
    'compiling for a TPU needs libtpu: python -m pip install "jax[tpu]" (it needs no '
    'TPU, and leaves JAX on the CPU with JAX_PLATFORMS=cpu)'
)
_CUDA = (
    'compiling for a GPU needs the CUDA plugin of the same version as JAX: python -m '
    'pip install "jax-cuda13-plugin=={version}" "jax-cuda13-pjrt=={version}"'
)


def parse(topology: str) -> Chip:
    """The chip of a topology such as 'v5p:2x2x4' or 'h100:8'.

    Raises:
      ValueError: not of this form, or an unknown chip.
    """
    found = _TOPOLOGY.fullmatch(topology)
    if not found or found[1] not in CHIPS:
        raise ValueError(
            f"'{topology}' is not CHIP:SHAPE, such as v5p:2x2x4 or h100:8; the chips "
            f'are {", ".join(CHIPS)}'
        )
    return CHIPS[found[1]]


def devices(topology: str) -> list:
    """Devices of a topology, to compile for.

    Args:
      topology: a TPU slice as libtpu names it, such as 'v5e:4x4'; or the GPUs of one
        machine, such as 'h100:8', or of several, such as 'h100:2x8'.

    Raises:
      ValueError: see `parse`; a slice that does not exist; or libtpu or the CUDA plugin
        is missing, with a message that says how to install it.
    """
    from jax.experimental import topologies

    chip = parse(topology)
    required = 'libtpu' if chip.is_tpu else 'jax_cuda13_plugin'
    if importlib.util.find_spec(required) is None:
        advice = _LIBTPU if chip.is_tpu else _CUDA.format(version=jax.__version__)
        raise ValueError(advice)
    if chip.is_tpu:
        platform, options = 'tpu', _tpu_options(chip)
    else:
        shape = topology.partition(':')[2]
        shape = f'1x{shape}' if 'x' in shape else f'1x1x{shape}'
        platform, topology = 'cuda', chip.name
        options = dict(target_config=_target_config(_GPUS[chip.name]), topology=shape)
    try:
        return topologies.get_topology_desc(
            platform=platform, topology_name=topology, **options
        ).devices
    except RuntimeError as error:
        raise ValueError(f"'{topology}' is not a topology: {error}") from error


def _tpu_options(chip: Chip) -> dict:
    """Options of a topology; sets what libtpu reads from the environment."""
    # Otherwise libtpu asks the machine's metadata server which TPU it has.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-16')
    os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
    # Otherwise only one process of a machine can compile.
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    if chip.name == 'v4':  # Its two cores are one device.
        return dict(chip_config_name='megacore', chips_per_host_bounds=(2, 2, 1))
    return {}


def _target_config(gpu: _Gpu) -> str:
    """XLA's description of a GPU, in the text format of protocol buffers."""
    extension = 'ACCELERATED_FEATURES' if gpu.capability >= 9 else 'NONE'
    return f"""
gpu_device_info {{
  core_count: {gpu.cores}
  fpus_per_core: {gpu.lanes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory}
  memory_bandwidth: {int(gpu.memory_gbps * 1e9)}
  l2_cache_size: {gpu.l2_cache}
  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block_optin: {gpu.shared_memory - 1024}
  shared_memory_per_block: {48 << 10}
  cuda_compute_capability {{ major: {gpu.capability} feature_extension: {extension} }}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.description}"
"""
