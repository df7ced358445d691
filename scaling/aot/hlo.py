"""What a compiled program does, read off the text of its HLO: collectives by kind, and what passes through memory.

A compiler's own counts take the body of a loop once. Here each instruction counts as often as the loops around it turn; a loop whose end
is no constant of the program, such as that over the optimizer steps of one call, counts as one turn. Everything is of one device.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
}
BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
NO_TRAFFIC = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
}
NO_TRAFFIC |= {"partition-id", "replica-id", "opt-barrier", "domain"}
"""Of opcodes that move nothing themselves. Halves of asynchronous pairs count where they start."""


@dataclass(frozen=True)
class Instruction:
    """One line of a computation, as text: `%name = shape opcode(inside)rest`."""

    name: str
    shape: str
    opcode: str
    inside: str
    """Between its parentheses: operands, the value of a constant, the number of a parameter."""
    rest: str
    """Attributes behind them."""

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.inside)

    def called(self) -> Iterator[str]:
        """Computations that it names."""
        yield from re.findall(r"(?:calls|to_apply|condition|body|(?:true|false)_computation)=%?([\w.\-]+)", self.rest)
        for several in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", self.rest):
            yield from re.findall(r"%?([\w.\-]+)", several)


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Collective:
    """One exchange among devices, as often as it happens."""

    kind: str
    size: float
    """Bytes of the whole array: what a gather makes, what a reduction or an exchange reads."""
    group: int
    """Devices that take part in one."""
    times: float

    @property
    def received(self) -> float:
        """Bytes that each device must receive at least, all times: a reduction that all devices get is a scattered one and a gather."""
        share = (self.group - 1) / self.group
        return self.times * self.size * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


def size(shape: str) -> float:
    """Bytes of an array, or of all arrays of a tuple."""
    arrays = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape)
    return sum(BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in arrays)


def parse(text: str | None) -> tuple[dict[str, Computation], str]:
    """All computations by name, their instructions in order, and the name of the entry."""
    found: dict[str, Computation] = {}
    entry, current = "", None
    for line in (text or "").splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = found.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif current is not None and (one := _instruction(line)):
            current[one.name] = one
    return found, entry


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    end = _closing(line, head.end()) if line[head.end()] == "(" else line.index(" ", head.end())
    call = re.match(r"\s*([a-z][\w\-]*)\(", line[end:])
    if not call:
        return None
    start = end + call.end() - 1
    stop = _closing(line, start)
    return Instruction(head[1], line[head.end() : end], call[1], line[start + 1 : stop - 1], line[stop:])


def _closing(line: str, start: int) -> int:
    """Behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if depth == 0:
            return i + 1
    return len(line)


def trips(program: dict[str, Computation], loop: Instruction) -> int:
    """Turns of a while loop that counts from 0 to a constant; 1 where its end is no constant."""
    if known := re.search(r"known_trip_count[^\d]*(\d+)", loop.rest):
        return int(known[1])
    named = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    condition = program.get(named[1], {}) if named else {}
    ends = [
        int(value[1])
        for one in condition.values()
        if one.opcode == "compare" and "direction=LT" in one.rest
        for operand in one.operands
        if operand in condition and condition[operand].opcode == "constant"
        if (value := re.match(r"(\d+)", condition[operand].inside))
    ]
    return ends[0] if len(ends) == 1 else 1


def executed(program: dict[str, Computation], entry: str) -> dict[str, tuple[float, bool]]:
    """How often each computation runs, and whether within a fusion, by name."""
    times: dict[str, float] = defaultdict(float)
    fused: dict[str, bool] = {}

    def visit(name: str, often: float, within: bool) -> None:
        times[name] += often
        fused[name] = fused.get(name, True) and within
        for one in program.get(name, {}).values():
            turns = trips(program, one) if one.opcode == "while" else 1
            for called in one.called():
                if called in program:
                    visit(called, often * turns, within or one.opcode not in ("while", "conditional", "call"))

    visit(entry, 1.0, False)
    return {name: (often, fused[name]) for name, often in times.items()}


def collectives(program: dict[str, Computation], entry: str) -> list[Collective]:
    """All of the program. A reduction of which each device keeps its part, which TPUs have as one fusion, is a reduce-scatter."""
    found = []
    for name, (often, _) in executed(program, entry).items():
        computation = program[name]
        for one in computation.values():
            kind = one.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            sizes = [size(computation[x].shape) for x in one.operands if x in computation]
            whole = sum(sizes)
            group = _group(one.rest)
            if kind == "all-gather":
                whole *= group
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            if group > 1:
                found.append(Collective(kind, whole, group, often))
    return found


def _group(attributes: str) -> int:
    """Devices of one group, in any of the three ways that HLO writes groups; 2 for pairs."""
    if lists := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(lists[1].split(","))
    if grid := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(grid[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{((?:'[^}]*')?)\}(?:,|$)", attributes):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^':]*)'", mesh[2]) if axis in sizes)
    return 2


def traffic(program: dict[str, Computation], entry: str) -> float:
    """Bytes that instructions read and write, those within a fusion excepted: of memory, but for what stays in a cache.

    Of an array that a fusion only cuts a slice from, or updates one of, the slice counts. What a kernel of its own reads again does not.
    """
    total = 0.0
    for name, (often, fused) in executed(program, entry).items():
        if fused:
            continue
        computation = program[name]
        for one in computation.values():
            if one.opcode not in NO_TRAFFIC and not one.opcode.endswith("-done"):
                total += often * _moved(program, computation, one)
    return total


def _moved(program: dict[str, Computation], computation: Computation, one: Instruction) -> float:
    reads = [size(computation[x].shape) if x in computation else 0.0 for x in one.operands]
    written = size(one.shape)
    if one.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * written
    if one.opcode == "dynamic-update-slice":
        return 2 * reads[1]
    if one.opcode != "fusion":
        return sum(reads) + written
    body = program.get(next(one.called(), ""), {})
    users: dict[str, list[Instruction]] = defaultdict(list)
    for inner in body.values():
        for operand in inner.operands:
            users[operand].append(inner)
    for inner in body.values():
        if (
            inner.opcode != "parameter"
            or not (index := re.match(r"(\d+)", inner.inside))
            or int(index[1]) >= len(reads)
        ):
            continue
        used = users[inner.name]
        if used and all(user.opcode in ("dynamic-slice", "gather") for user in used):
            reads[int(index[1])] = sum(size(user.shape) for user in used)
        elif used and all(user.opcode == "dynamic-update-slice" and user.operands[0] == inner.name for user in used):
            reads[int(index[1])] = 0.0
            written -= sum(size(user.shape) - size(body[user.operands[1]].shape) for user in used)
    return sum(reads) + max(written, 0.0)
