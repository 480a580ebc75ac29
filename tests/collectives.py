"""The collectives of a compiled program, with the trip counts of its loops."""

import math
import re
from typing import NamedTuple

KINDS = (
    'all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'reduce-scatter',
)  # fmt: skip
BYTES = {
    'f64': 8,
    's64': 8,
    'u64': 8,
    'f32': 4,
    's32': 4,
    'u32': 4,
    'bf16': 2,
    'f16': 2,
}
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\{$', re.M)
_COLLECTIVE = re.compile(rf' = (.*?) ({"|".join(KINDS)})(?:-start)?\(')
_CALLED = re.compile(
    r'(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'known_trip_count\D*(\d+)')
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')


class Collective(NamedTuple):
    """One result of a collective.

    Attributes:
      kind: one of `KINDS`.
      dtype: such as 'f32'.
      shape: of the result on each device.
      runs: how often it runs in one call of the program.
      name: operation of the source code, `op_name` of the metadata.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    runs: int
    name: str

    @property
    def bytes(self) -> int:
        """Bytes of all runs."""
        return self.runs * math.prod(self.shape) * BYTES.get(self.dtype, 1)


def collectives(text: str) -> list[Collective]:
    """The collectives of `compiled.as_text()`; of a branch, each is counted."""
    starts = list(_COMPUTATION.finditer(text))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    bodies = {
        match[1]: text[match.end() : end].splitlines()
        for match, end in zip(starts, ends, strict=True)
    }
    entry = re.search(r'^ENTRY %?([\w.\-]+)', text, re.M)[1]
    found = []

    def visit(name, runs):
        for line in bodies[name]:
            if match := _COLLECTIVE.search(line):
                label = re.search(r'op_name="([^"]*)"', line)
                for dtype, dims in _ARRAY.findall(match[1]):
                    shape = tuple(int(n) for n in dims.split(',') if n)
                    found.append(
                        Collective(
                            match[2], dtype, shape, runs, label[1] if label else ''
                        )
                    )
                continue
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [b.strip().lstrip('%') for b in branches.split(',')]
            trips = _TRIPS.search(line) if ' while(' in line else None
            for other in called:
                visit(other, runs * (int(trips[1]) if trips else 1))

    visit(entry, 1)
    return found
