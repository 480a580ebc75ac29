"""What XLA compiled: memory, FLOPs, bytes and collectives of a program on each chip.

    shapes = compiled_program.parameter_shapes(params)
    program = compiled_program.read(jitted.lower(params).compile(), shapes)
    program.collective_bytes('all-gather', 'activations')

`cost_analysis` of JAX counts the body of a loop once. Here a body counts as often as it
runs, such as once per layer of a scanned network.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import math
import re

import jax
import numpy as np

from ism_jax.runtime import hlo

COLLECTIVES = (
    'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute',
    'collective-broadcast', 'ragged-all-to-all',
)  # fmt: skip
# Instructions that move no data: names for data of others, and ends of transfers.
FREE = (
    'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'call',
    'conditional', 'after-all', 'partition-id', 'replica-id', 'async-update',
    'optimization-barrier',
)  # fmt: skip
FREE_CALLS = ('ConcatBitcast', 'AllocateBuffer', 'AssumeGatherIndicesInBound')
# Parts of a train step by the names in the Python program; the first that matches.
PARTS = (
    ('MLP products', r'mlp_(in|out)/.*dot_general'),
    ('attention scores and values', r'BTNH|BNTS|BSNH|dot_product_attention|vmap\(\)/'),
    ('qkv and projection products', r'(qkv|projection)/.*dot_general'),
    ('modulation products', r'modulation/.*dot_general'),
    ('other work of the blocks', r'/blocks/|checkpoint|while/body'),
    ('embeddings, last layer, loss', r'SiT|jvp'),
    ('optimizer, EMAs, metrics', r'train_step'),
    ('copies', r''),
)
SLICES = ('slice', 'dynamic-slice', 'gather')


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind and content in a run of the program.

    Attributes:
      kind: an opcode of XLA such as 'all-gather'.
      content: 'parameters', 'gradients', 'activations', 'integers' or 'scalars', see
        `content_of`.
      dtype: of the arrays.
      count: number of arrays, each as often as it is sent.
      bytes: size of the arrays on each chip: the larger of input and output.
      wire_bytes: bytes that each chip sends with a ring, for example
        2 (n - 1) / n times the array for an all-reduce among n chips.
    """

    kind: str
    content: str
    dtype: str
    count: int
    bytes: int
    wire_bytes: int


@dataclasses.dataclass(frozen=True)
class Operation:
    """What an instruction costs in a run of the program, all its executions together.

    Attributes:
      name: its name in the program.
      source: the operation of the Python program that XLA made it of.
      times: number of executions.
      flops: FLOPs of its matrix products.
      bytes: read from and written to the chip's main memory.
      cycles: what the compiler for TPUs assumes that it takes; 0 on other chips. A rule
        of thumb of the compiler: good for shares of a program, not for times.
    """

    name: str
    source: str
    times: int
    flops: int
    bytes: int
    cycles: int = 0


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program; all figures are those of one chip.

    Attributes:
      memory: bytes by part, see `memory_parts`; empty if XLA does not report them.
      operations: what takes time, without collectives.
      collectives: see `Collective`.
      unknown_loops: number of loops whose trip count is not known before they run;
        their bodies count once.
    """

    memory: dict[str, int]
    operations: list[Operation]
    collectives: list[Collective]
    unknown_loops: int

    @property
    def flops(self) -> int:
        """FLOPs of the matrix products and convolutions."""
        return sum(o.flops for o in self.operations)

    @property
    def bytes(self) -> int:
        """Bytes read from and written to the chip's main memory."""
        return sum(o.bytes for o in self.operations)

    def collective_bytes(self, kind: str = '', content: str = '') -> int:
        """Bytes of the collectives of a kind and content; by default of all."""
        return sum(c.bytes for c in self.select(kind, content))

    def collective_count(self, kind: str = '', content: str = '') -> int:
        """Number of executions of collectives; by default of all."""
        return sum(c.count for c in self.select(kind, content))

    def cycles_by_part(self) -> dict[str, float]:
        """Shares of the cycles by part of a transformer's train step, largest first.

        Empty on chips whose compiler gives no cycles.
        """
        total = sum(o.cycles for o in self.operations)
        parts = {}
        for o in self.operations:
            names = (part for part, pattern in PARTS if re.search(pattern, o.source))
            part = next(names)
            parts[part] = parts.get(part, 0) + o.cycles
        rows = sorted(parts.items(), key=lambda row: -row[1])
        return {part: cycles / total for part, cycles in rows if cycles}

    def record(self) -> dict:
        """The figures as JSON can hold them, without those of each operation."""
        return {
            'memory': self.memory,
            'flops': self.flops,
            'bytes': self.bytes,
            'cycles_by_part': self.cycles_by_part(),
            'collectives': [dataclasses.asdict(c) for c in self.collectives],
            'unknown_loops': self.unknown_loops,
        }

    def select(self, kind: str = '', content: str = '') -> list[Collective]:
        """The collectives of a kind and content; '' for all."""
        return [
            c
            for c in self.collectives
            if kind in ('', c.kind) and content in ('', c.content)
        ]


def read(compiled, shapes: Iterable[tuple[int, ...]] = ()) -> Program:
    """Reads a compiled program.

    Args:
      compiled: result of `jax.jit(f).lower(...).compile()`, for any kind of devices.
      shapes: shapes of the network's parameters, to recognise them in collectives; see
        `parameter_shapes`.
    """
    program = read_text(compiled.as_text(), shapes)
    return dataclasses.replace(program, memory=memory_parts(compiled))


def read_text(text: str, shapes: Iterable[tuple[int, ...]] = ()) -> Program:
    """`read`, from the text of a compiled program; its memory is unknown."""
    module = hlo.Module(text)
    executions = list(module.executions())
    return Program(
        memory={},
        operations=list(_operations(module, executions)),
        collectives=_collectives(module, executions, set(map(tuple, shapes))),
        unknown_loops=len(module.unknown_loops),
    )


def parameter_shapes(params) -> set[tuple[int, ...]]:
    """Shapes of the parameters, and of the part of each that a chip holds.

    Args:
      params: tree of arrays, or of their shapes with shardings.
    """
    leaves = jax.tree.leaves(params)
    parts = {leaf.sharding.shard_shape(leaf.shape) for leaf in leaves}
    return parts | {leaf.shape for leaf in leaves}


def memory_parts(compiled) -> dict[str, int]:
    """Bytes on each chip: 'arguments', 'outputs', 'temporaries', 'code' and 'peak'.

    Outputs that reuse the memory of donated arguments are not counted again. The peak
    is the largest amount in use at one time, as XLA reports it for TPUs and GPUs. For
    CPUs its report leaves out temporaries, so there the peak is the sum of the parts.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return {}
    parts = {
        'arguments': memory.argument_size_in_bytes,
        'outputs': memory.output_size_in_bytes - memory.alias_size_in_bytes,
        'temporaries': memory.temp_size_in_bytes,
        'code': memory.generated_code_size_in_bytes,
    }
    (device, *_) = jax.tree.leaves(compiled.output_shardings)[0].device_set
    peak = sum(parts.values())
    if device.platform != 'cpu':
        peak = memory.peak_memory_in_bytes or peak
    return parts | {'peak': peak}


def _operations(module: hlo.Module, executions) -> Iterator[Operation]:
    """The instructions outside fusions that compute or move data."""
    for execution in executions:
        instruction = execution.instruction
        if execution.fused or not _moves_data(instruction):
            continue
        computation = module.computations[execution.computation]
        yield Operation(
            name=instruction.name,
            source=instruction.attribute(r'op_name="([^"]*)"') or '',
            times=execution.times,
            flops=execution.times * _flops(module, computation, instruction),
            bytes=execution.times * _bytes(module, computation, instruction),
            cycles=execution.times
            * int(instruction.attribute(r'estimated_cycles":"(\d+)"') or 0),
        )


def _moves_data(instruction: hlo.Instruction) -> bool:
    opcode = instruction.opcode
    if (
        opcode in FREE
        or opcode.endswith('-done')
        or _opcode(instruction) in COLLECTIVES
    ):
        return False
    return instruction.attribute(r'custom_call_target="([^"]*)"') not in FREE_CALLS


def _flops(module, computation, instruction) -> int:
    """FLOPs of the matrix products in an instruction, with those that it calls."""
    opcode = instruction.opcode
    if opcode in hlo.FUSIONS:
        inner = module.computations[instruction.called]
        return sum(_flops(module, inner, i) for i in inner.values())
    if opcode == 'dot':
        dimensions = instruction.attribute(r'lhs_contracting_dims=\{([\d,]*)\}')
        return _dot_flops(computation, instruction, dimensions.split(','))
    if opcode == 'convolution':
        return _convolution_flops(computation, instruction)
    if opcode == 'custom-call' and 'dot_dimension_numbers' in instruction.attributes:
        # The library calls of GPUs and CPUs; a second output is their workspace.
        listed = instruction.attribute(r'lhs_contracting_dimensions":\[([^\]]*)\]')
        return _dot_flops(computation, instruction, re.findall(r'\d+', listed))
    return 0


def _dot_flops(computation, instruction, contracted) -> int:
    left = computation[instruction.operands[0]].outputs[0]
    depth = math.prod(left.dims[int(axis)] for axis in contracted if axis)
    return 2 * instruction.outputs[0].size * depth


def _convolution_flops(computation, instruction) -> int:
    """2 x pairs of an output and a kernel element that meet an element of the input.

    On TPUs a matrix product is a convolution, and a batch of them is one whose dilation
    makes most pairs meet padding.
    """
    left, kernel = (computation[n].outputs[0] for n in instruction.operands[:2])
    (output,) = instruction.outputs[:1]
    labels = instruction.attribute(r'dim_labels=([\w?]+_[\w?]+->[\w?]+)')
    of_input, of_kernel, of_output = re.split('_|->', labels)
    window = _window(instruction)
    pairs = 1
    for axis in (label for label in of_output if label.isdigit()):
        pairs *= _meeting_pairs(
            left.dims[of_input.index(axis)],
            kernel.dims[of_kernel.index(axis)],
            output.dims[of_output.index(axis)],
            *window[int(axis)],
        )
    batch = output.dims[of_output.index('b')]
    features = output.dims[of_output.index('f')]
    return 2 * batch * features * pairs * kernel.dims[of_kernel.index('i')]


def _window(instruction) -> dict[int, tuple[int, int, int, int]]:
    """(stride, padding before, dilation of the input, of the kernel) of each axis."""
    text = instruction.attribute(r'window=\{([^}]*)\}') or ''
    fields = dict(field.split('=') for field in text.split())
    if 'size' not in fields:
        return {}
    axes = fields['size'].count('x') + 1

    def numbers(name, default):
        return fields[name].split('x') if name in fields else [default] * axes

    pads = [pad.split('_')[0] for pad in numbers('pad', '0_0')]
    dilations = numbers('lhs_dilate', '1'), numbers('rhs_dilate', '1')
    rows = zip(numbers('stride', '1'), pads, *dilations, strict=True)
    return {i: tuple(map(int, row)) for i, row in enumerate(rows)}


def _meeting_pairs(size, kernel, outputs, stride, padding, dilation, kernel_dilation):
    """Pairs of an output and a kernel position whose input is not padding."""
    position = np.arange(outputs)[:, None] * stride - padding
    position = position + np.arange(kernel) * kernel_dilation
    inside = (position >= 0) & (position <= (size - 1) * dilation)
    return int((inside & (position % dilation == 0)).sum())


def _bytes(module, computation, instruction) -> int:
    """Bytes that an instruction reads from and writes to main memory."""
    opcode = instruction.opcode
    outputs = sum(array.main_bytes for array in instruction.outputs)
    operands = [computation[name].outputs for name in instruction.operands]
    if opcode in ('copy-start', 'slice-start', 'dynamic-slice-start'):
        # (Destination, source, ...) or ((source), destination, ...).
        moved = min(array.bytes for array in instruction.outputs[:2])
        return moved * sum(array.space == 0 for array in instruction.outputs[:2])
    if opcode in SLICES:
        return outputs + min(outputs, sum(a.main_bytes for a in operands[0]))
    if opcode == 'dynamic-update-slice':
        return 2 * sum(array.main_bytes for array in operands[1])
    if opcode in hlo.FUSIONS:
        inner = module.computations[instruction.called]
        read = [
            min(
                sum(a.main_bytes for a in arrays), _read_bytes(module, inner, parameter)
            )
            for arrays, parameter in zip(operands, inner.parameters, strict=True)
        ]
        return sum(read) + min(outputs, _written_bytes(module, inner, inner.root))
    return outputs + sum(array.main_bytes for arrays in operands for array in arrays)


def _read_bytes(module, computation, value) -> float:
    """Bytes of a parameter of a fusion that the fusion reads: all, or some slices."""
    total = 0
    for user in computation.users.get(value.name, []):
        first = user.operands[0] == value.name
        if user.opcode in SLICES and first:
            total += user.outputs[0].bytes
        elif user.opcode == 'dynamic-update-slice' and first:
            continue  # Updated in place.
        elif user.opcode == 'bitcast':
            total += _read_bytes(module, computation, user)
        elif user.opcode == 'fusion':
            inner = module.computations[user.called]
            for name, parameter in zip(user.operands, inner.parameters, strict=True):
                if name == value.name:
                    total += _read_bytes(module, inner, parameter)
        else:
            return math.inf
    return total


def _written_bytes(module, computation, root) -> float:
    """Bytes that a fusion writes: less than its output if it updates a slice."""
    if root.opcode == 'tuple':
        parts = (computation[name] for name in root.operands)
        return sum(_written_bytes(module, computation, part) for part in parts)
    if root.opcode == 'bitcast':
        return _written_bytes(module, computation, computation[root.operands[0]])
    if root.opcode == 'dynamic-update-slice':
        return computation[root.operands[1]].outputs[0].bytes
    if root.opcode == 'fusion':
        inner = module.computations[root.called]
        return _written_bytes(module, inner, inner.root)
    return sum(array.bytes for array in root.outputs)


def _collectives(module, executions, shapes) -> list[Collective]:
    """The collectives of a program, summed by kind, content and dtype."""
    sizes = {math.prod(shape) for shape in shapes}
    # A scanned network computes with one layer of a stack at a time.
    sizes |= {math.prod(s[1:]) for s in shapes if len(s) > 1}
    totals = {}
    for execution in _issued(module, executions):
        instruction = execution.instruction
        computation = module.computations[execution.computation]
        kind = _kind(execution)
        operands = [a for n in instruction.operands for a in computation[n].outputs]
        members = group_size(instruction)
        for result, operand in _pairs(instruction, operands):
            larger = max(result, operand, key=lambda array: array.bytes)
            smaller = min(result.size, operand.size)
            for part in _parts(module, computation, instruction, larger):
                content = content_of(kind, part, min(part.size, smaller), sizes)
                total = totals.setdefault((kind, content, part.dtype), [0, 0, 0])
                total[0] += execution.times
                total[1] += execution.times * part.bytes
                total[2] += execution.times * wire_bytes(kind, part.bytes, members)
    rows = [Collective(*key, *map(round, total)) for key, total in totals.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def _issued(module, executions) -> Iterator[hlo.Execution]:
    """Each collective once: on TPUs the fusions that overlap with one repeat it."""
    found = [e for e in executions if _opcode(e.instruction) in COLLECTIVES]
    started = set()
    for e in found:
        users = module.computations[e.computation].users.get(e.instruction.name, [])
        if e.fused and any('"AsyncCollectiveStart"' in u.attributes for u in users):
            started.add((e.computation, e.instruction.name))
    channels = {
        module.computations[c][name].attribute(r'channel_id=(\d+)')
        for c, name in started
    }
    for e in found:
        repeats = e.fused and e.instruction.attribute(r'channel_id=(\d+)') in channels
        if not repeats or (e.computation, e.instruction.name) in started:
            yield e


def _opcode(instruction) -> str:
    """The opcode without `-start`; the `-done` of an asynchronous one is not it."""
    return instruction.opcode.removesuffix('-start')


def _kind(execution) -> str:
    """The kind of a collective; TPUs fuse an all-reduce with the slice that is kept."""
    if execution.fused and execution.computation.startswith('all-reduce-scatter'):
        return 'reduce-scatter'
    return _opcode(execution.instruction)


def _pairs(instruction, operands) -> Iterator[tuple[hlo.Array, hlo.Array]]:
    """The (result, operand) of each array of a collective."""
    results = instruction.outputs
    if instruction.opcode.endswith('-start') and len(results) > len(operands):
        # (Operands, results) and, of a permute, two counters.
        results = results[len(operands) : 2 * len(operands)]
    return zip(results, operands, strict=True)


def _parts(module, computation, instruction, array) -> list[hlo.Array]:
    """The arrays that a collective moves as one; GPUs join many small ones first."""
    source = computation[instruction.operands[0]]
    if source.opcode == 'fusion':
        computation = module.computations[source.called]
        source = computation.root
    if source.opcode != 'concatenate' or len(instruction.operands) > 1:
        return [array]
    return [computation[name].outputs[0] for name in source.operands]


def group_size(instruction: hlo.Instruction) -> int:
    """Number of chips that take part in a collective together."""
    text = instruction.attributes
    if found := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', text):
        axes = dict(re.findall(r"'?([\w.\-]+)'?=(\d+)", found[1]))
        named = re.findall(r"'?([\w.\-]+)'?(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or axes[name]) for name, part in named)
    if found := re.search(r'replica_groups=\[\d+,(\d+)\]<=', text):
        return int(found[1])
    if found := re.search(r'replica_groups=\{\{([\d,]+)\}', text):
        return found[1].count(',') + 1
    return 2  # A permute has pairs.


def wire_bytes(kind: str, size: float, members: int) -> float:
    """Bytes that each chip sends for a collective of `size` bytes with a ring."""
    if kind == 'all-reduce':
        return 2 * size * (members - 1) / members
    if kind in ('collective-permute', 'collective-broadcast'):
        return size
    return size * (members - 1) / members


def content_of(kind: str, larger, smaller_size: int, parameter_sizes: set[int]) -> str:
    """What a collective carries, by the sizes of its arrays.

    An array with as many elements as a parameter, as one layer of a stack, or as a
    chip's part of either, carries gradients if the collective adds, else parameters.
    Partial sums of activations with as many elements would be mistaken for gradients.

    Args:
      kind: see `Collective`.
      larger: the larger array of input and output.
      smaller_size: number of elements of the other one.
      parameter_sizes: numbers of elements of the parameters, layers and parts.
    """
    if larger.size == 1:
        return 'scalars'
    if larger.dtype[0] in 'psu':
        return 'integers'
    if larger.size in parameter_sizes or smaller_size in parameter_sizes:
        adds = kind in ('all-reduce', 'reduce-scatter')
        return 'gradients' if adds else 'parameters'
    return 'activations'
