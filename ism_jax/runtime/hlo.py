"""The text of a compiled program, as instructions and how often each is executed.

XLA prints a program as computations: an entry, bodies of loops, insides of fusions.
Each instruction has a name, an output type, an opcode, operands and attributes.
"""

from collections.abc import Iterator
import dataclasses
import functools
import re

BITS = {
    'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 'f16': 16,
    'bf16': 16, 's32': 32, 'u32': 32, 'f32': 32, 's64': 64, 'u64': 64, 'f64': 64,
    'c64': 64, 'c128': 128,
}  # fmt: skip
# Groups of instructions that are compiled as one; GPUs run some beside others.
FUSIONS = ('fusion', 'fusion-start')
_ARRAY = re.compile(r'([a-z]+[0-9a-z]*)\[([0-9,<= ]*)\](\{[^}]*\})?')
_SPACE = re.compile(r'S\((\d+)\)')
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_LINE = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_CALLED = re.compile(r'(?:calls|body|to_apply|called_computations)=\{?%?([\w.\-]+)')
_BRANCHES = re.compile(
    r'(?:branch_computations=\{([^}]*)\}'
    r'|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+))'
)


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array; `space` is its memory, 0 for the chip's main memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @functools.cached_property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for dim in self.dims:
            size *= dim
        return size

    @property
    def bytes(self) -> int:
        """Bytes without padding; 0 for types without data, such as tokens."""
        bits = BITS.get(self.dtype, 8 if self.dtype.startswith('f8') else 0)
        return -(-self.size * bits // 8)

    @property
    def main_bytes(self) -> int:
        """Bytes in the chip's main memory: 0 for an array in a cache of a TPU."""
        return self.bytes if self.space == 0 else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `outputs` are the arrays of its (nested) tuple."""

    name: str
    opcode: str
    outputs: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @property
    def called(self) -> str | None:
        """The computation of a fusion, call or loop body."""
        return self.attribute(_CALLED.pattern)


class Computation(dict):
    """The instructions of a computation by name, in their order."""

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next(i for i in self.values() if i.is_root)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that have each one as an operand."""
        found = {}
        for instruction in self.values():
            for name in instruction.operands:
                found.setdefault(name, []).append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """The parameters by number."""
        found = [i for i in self.values() if i.opcode == 'parameter']
        return sorted(found, key=lambda i: int(i.arguments))


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction that runs `times` times, and how it is reached.

    Attributes:
      fused: whether it is inside a fusion.
      caller: the computation outside fusions that it is in or that has the fusion.
    """

    instruction: Instruction
    computation: str
    times: int
    fused: bool
    caller: str


class Module:
    """A compiled program.

    Attributes:
      computations: by name.
      entry: name of the first one.
      unknown_loops: names of the loops whose trip count is not known before they run,
        such as those that stop at a tolerance; they count once.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.unknown_loops: list[str] = []
        current, self.entry = None, None
        for line in text.splitlines():
            if found := _LINE.match(line):
                instruction = _parse(*found.groups())
                current[instruction.name] = instruction
            elif found := _HEAD.match(line):
                current = self.computations.setdefault(found[2], Computation())
                self.entry = found[2] if found[1] else self.entry

    def executions(self) -> Iterator[Execution]:
        """Every instruction that runs, loop bodies with their trip counts.

        Of a conditional all branches count. The scalar functions of reductions do not.
        """
        self.unknown_loops.clear()
        yield from self._executions(self.entry, 1, False, self.entry)

    def _executions(self, name, times, fused, caller):
        for instruction in self.computations[name].values():
            yield Execution(instruction, name, times, fused, caller)
            opcode, called = instruction.opcode, instruction.called
            if opcode == 'while':
                trips = self.trip_count(instruction, self.computations[name])
                if trips is None:
                    self.unknown_loops.append(instruction.name)
                trips = times * (1 if trips is None else trips)
                yield from self._executions(called, trips, fused, called)
            elif opcode in (*FUSIONS, 'async-start'):
                inside = opcode in FUSIONS or fused
                yield from self._executions(called, times, inside, caller)
            elif opcode == 'call':
                inner = caller if fused else called
                yield from self._executions(called, times, fused, inner)
            elif opcode == 'conditional':
                listed, *both = _BRANCHES.search(instruction.attributes).groups()
                branches = both if listed is None else listed.split(',')
                for branch in branches:
                    branch = branch.strip().lstrip('%')
                    yield from self._executions(branch, times, fused, branch)

    def trip_count(self, loop: Instruction, around: Computation) -> int | None:
        """How often the body of a `while` runs; None if only running it tells.

        XLA writes the number on CPUs and GPUs. On TPUs it follows from the comparison
        of a counter, which starts at 0 and grows by 1, with a constant.
        """
        known = loop.attribute(r'known_trip_count"?:\{"n":"(\d+)"')
        if known:
            return int(known)
        condition = self.computations[loop.attribute(r'condition=%?([\w.\-]+)')]
        root = condition.root
        if root.opcode == 'fusion':
            inner = self.computations[root.called]
            names = [p.name for p in inner.parameters]
            inputs = dict(zip(names, root.operands, strict=True))
            compared = inner.root
            names = [inputs.get(name, name) for name in compared.operands]
        else:
            inner, compared, names = condition, root, root.operands
        if compared.opcode != 'compare' or 'direction=LT' not in compared.attributes:
            return None
        counter, limit = (condition.get(n) or inner.get(n) for n in names)
        if counter.opcode != 'get-tuple-element' or limit.opcode != 'constant':
            return None
        return int(limit.arguments)


def _parse(root, name, rest) -> Instruction:
    rest = re.sub(r'/\*index=\d+\*/', '', rest)
    end = _closing(rest) if rest[0] == '(' else rest.index(' ')
    types, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index('(')
    end = opening + _closing(rest[opening:])
    arguments, attributes = rest[opening + 1 : end - 1], rest[end:]
    return Instruction(
        name=name,
        opcode=rest[:opening],
        outputs=tuple(_arrays(types)),
        operands=tuple(re.findall(r'%([\w.\-]+)', arguments)),
        arguments=arguments,
        attributes=attributes,
        is_root=bool(root),
    )


def _closing(text: str) -> int:
    """The index after the bracket that closes the first one."""
    depth = 0
    for found in re.finditer(r'[()]', text):
        depth += 1 if found[0] == '(' else -1
        if depth == 0:
            return found.end()
    raise ValueError(f'unbalanced brackets in {text[:80]!r}')


def _arrays(types: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(types):
        space = _SPACE.search(layout)
        numbers = tuple(int(d.strip(' <=')) for d in dims.split(',') if d.strip())
        yield Array(dtype, numbers, int(space[1]) if space else 0)
