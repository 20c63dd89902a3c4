"""Reads optimised HLO text: computations, instructions, shapes, and the devices that a collective joins."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

KINDS = (
    "all-reduce", "reduce-scatter", "all-gather", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
FUSIONS = ("fusion", "fusion-start")
_PARTS = ("slice", "dynamic-slice", "gather", "dynamic-update-slice")

# bits of an element
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ((?:\([^=]*?\)|\S+?)) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name, the text of its shape, its opcode, and the rest of the line."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def bytes(self) -> int:
        """Bytes of its result (of all parts of a tuple)."""
        return sum(math.prod(shape) * bits(dtype) for dtype, shape in shapes(self.shape)) // 8

    @property
    def operand(self) -> str:
        """The name of the first of its operands."""
        match = re.match(r"%?([\w.\-]+)", self.rest)
        return match[1] if match else ""

    @property
    def operands(self) -> list[str]:
        """The names of all of them."""
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])

    @property
    def called(self) -> list[str]:
        """The computations it names."""
        return _CALLED.findall(self.rest)


def computations(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every computation; the entry's is also under "ENTRY"."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    for line in text.splitlines():
        if line.endswith("{") and (match := re.match(r"^(ENTRY )?%?([\w.\-]+) \(", line)):
            current = found[match[2]] = []
            if match[1]:
                found["ENTRY"] = current
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))):
            current.append(Instruction(match[1], match[2], match[3], match[4]))
    return found


def walk(
    found: dict[str, list[Instruction]], name: str = "ENTRY", loops: int = 0, times: int = 1
) -> Iterator[tuple[Instruction, int, int]]:
    """Every instruction that runs as one, with how many loops it stands in and how often it runs: not the insides of fusions
    and reductions, but for the collectives that newer compilers hold in fusions.
    """
    for instruction in found[name]:
        yield instruction, loops, times
        if instruction.opcode == "while":
            for part in re.findall(r"(?:condition|body)=%?([\w.\-]+)", instruction.rest):
                yield from walk(found, part, loops + 1, times * trips(instruction))
        elif instruction.opcode in ("call", "conditional", "async-start"):
            for called in instruction.called:
                yield from walk(found, called, loops, times)
        elif instruction.opcode in FUSIONS:
            yield from ((inner, loops, times) for inner in inside(instruction, found) if kind(inner) in KINDS)


def kind(instruction: Instruction) -> str:
    """Its opcode, the same for the start and the end of what runs beside others."""
    return instruction.opcode.removesuffix("-start").removesuffix("-done")


def inside(instruction: Instruction, found: dict[str, list[Instruction]]) -> list[Instruction]:
    """What a kernel computes: the instruction itself, or those of its fusion."""
    if instruction.opcode not in FUSIONS:
        return [instruction]
    return [i for name in instruction.called for i in found.get(name, ())]


def trips(loop: Instruction) -> int:
    """How often a `while` runs, where the compiler knows; else 1."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    return int(known[1]) if known else 1


def flops(found: dict[str, list[Instruction]], name: str = "ENTRY") -> int:
    """Of all matrix products of a computation, cuDNN's attention among them (as if without a mask), loops taken as often as
    they run. A product with a single row may be none by then, but a sum.
    """
    shaped = {i.name: i.shape for i in found[name]}
    return sum(_flops(i, shaped, found) for i in found[name])


def _flops(i: Instruction, shaped: dict[str, str], found: dict[str, list[Instruction]]) -> int:
    if i.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", i.rest)
        dims = [int(d) for d in contracted[1].split(",")] if contracted else []
        return 2 * math.prod(shapes(i.shape)[0][1]) * math.prod(shapes(shaped[i.operand])[0][1][d] for d in dims)
    if match := re.search(r'custom_call_target="__cudnn\$fmha\w*?(Backward)?"', i.rest):
        scores = re.search(r'intermediate_tensor_shape": \{"element_type": "\w+", "dimensions": \[([^\]]*)\]', i.rest)
        assert scores, i.rest
        products, count = 5 if match[1] else 2, math.prod(int(n) for n in re.findall(r"\d+", scores[1]))
        if '"is_paged_attention": true' in i.rest:  # the scores are those of a page
            tables = re.findall(r"s32\[\d+,1,(\d+),1\]", i.rest.partition("operand_layout_constraints")[2])
            count *= int(tables[0])
        return 2 * products * count * shapes(i.shape)[0][1][-1]
    if i.opcode == "while":
        return trips(i) * sum(flops(found, body) for body in re.findall(r"body=%?([\w.\-]+)", i.rest))
    if i.opcode in (*FUSIONS, "call", "async-start"):
        return sum(flops(found, called) for called in i.called)
    return 0


def overlapped(found: dict[str, list[Instruction]]) -> set[str]:
    """Names of the collectives between whose start and end the same device multiplies matrices."""
    names = set()
    for part in found.values():
        shaped = {i.name: i.shape for i in part}
        begun: dict[str, tuple[Instruction, int]] = {}  # by name, and the operations until then
        done = 0
        for i in part:
            if i.opcode.endswith("-start"):
                begun[i.name] = i, done
            elif i.opcode.endswith("-done") and i.operand in begun:
                start, before = begun[i.operand]
                names |= {each.name for each in inside(start, found) if done > before}
            else:
                done += _flops(i, shaped, found)
    return names


def reads(found: dict[str, list[Instruction]]) -> dict[int, int]:
    """Bytes that a program reads of each of its arguments, by number: all of it for each kernel that takes it, but the parts
    alone where slices or gathers of it are taken. Of programs with loops, calls or branches, whose insides go by other names,
    nothing is told.
    """
    if any(i.opcode in ("while", "call", "conditional") for i in found["ENTRY"]):
        return {}
    of: dict[str, int] = {}  # an argument, or another name of it
    total: dict[int, int] = {}
    sizes = {i.name: i.bytes for i in found["ENTRY"]}
    for i in found["ENTRY"]:
        if i.opcode == "parameter":
            of[i.name] = int(i.rest.partition(")")[0])
        elif i.opcode == "bitcast" and i.operand in of:
            of[i.name] = of[i.operand]
        elif i.opcode not in ("tuple", "get-tuple-element"):
            for place, operand in enumerate(i.operands):
                if operand in of:
                    total[of[operand]] = total.get(of[operand], 0) + _taken(i, place, sizes[operand], found)
    return total


def _taken(i: Instruction, place: int, size: int, found: dict[str, list[Instruction]]) -> int:
    """Bytes that an instruction reads of an operand of that size."""
    if i.opcode in _PARTS:
        return i.bytes if place == 0 and "update" not in i.opcode else 0 if place == 0 else size
    if i.opcode not in FUSIONS:
        return size
    inner = [each for name in i.called for each in found.get(name, ())]
    names = {each.name for each in inner if each.opcode == "parameter" and each.rest.startswith(f"{place})")}
    taken = 0
    for each in inner:
        if names & {*each.operands}:
            if each.opcode == "bitcast":
                names.add(each.name)
            elif each.opcode in _PARTS and each.operand in names:
                taken += each.bytes if "update" not in each.opcode else 0
            else:
                return size
    return min(taken, size)


def shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every array in the text of a shape."""
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _SHAPE.findall(text)]


def bits(dtype: str) -> int:
    """Bits of an element, e.g. 16 for "bf16", 8 for "f8e4m3fn", 32 for "s32"."""
    if dtype in _BITS:
        return _BITS[dtype]
    match = re.match(r"[a-z]+(\d+)", dtype)
    assert match, dtype
    return int(match[1])


def groups(rest: str) -> tuple[tuple[int, ...], ...] | None:
    """The groups of devices that a collective joins, from any of the three forms that XLA prints; None: all devices."""
    if match := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\)\))? \{(.*?)\}", rest):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        joined = re.findall(r"'([^']+)'", match[2])
        found = _split(list(axes.values()), [list(axes).index(name) for name in joined])
        if match := re.search(r"device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\)", rest):  # the mesh is of devices in this order
            dims, turned = [[int(n) for n in match[i].split(",")] for i in (1, 2)]
            ids = np.arange(math.prod(dims)).reshape(dims).transpose(turned).ravel().tolist()
            found = tuple(tuple(ids[i] for i in group) for group in found)
        return found
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, order = [[int(n) for n in match[i].split(",")] for i in (1, 2)]
        devices = np.arange(math.prod(order)).reshape(order)
        if match[3]:
            devices = devices.transpose([int(n) for n in match[3].split(",")])
        return tuple(tuple(row) for row in devices.reshape(shape[0], -1).tolist())
    if match := re.search(r"replica_groups=\{(\{[\d,{} ]*\})?\}", rest):
        return tuple(tuple(int(n) for n in row.split(",")) for row in re.findall(r"\{([\d, ]+)\}", match[1] or "")) or None
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return tuple(tuple(int(n) for n in pair.split(",")) for pair in re.findall(r"(\d+,\d+)", match[1]))
    return None


def axes_of(joined: tuple[tuple[int, ...], ...] | None, sizes: dict[str, int], *, pairs: bool = False) -> tuple[str, ...]:
    """The mesh axes whose devices a collective joins; ("?",) where it is no set of axes.

    `pairs`: the groups are (source, target), and the axes are those in which source and target differ.
    """
    shape, names = list(sizes.values()), list(sizes)
    if joined is None:
        return tuple(name for name, size in sizes.items() if size > 1)
    if pairs:
        places = [(np.unravel_index(a, shape), np.unravel_index(b, shape)) for a, b in joined]
        moved = {name for a, b in places for name, i, j in zip(names, a, b, strict=True) if i != j}
        return tuple(name for name in names if name in moved)
    used = [i for i, size in enumerate(shape) if size > 1]
    for count in range(1, len(used) + 1):
        for chosen in itertools.combinations(used, count):
            if {frozenset(g) for g in _split(shape, list(chosen))} == {frozenset(g) for g in joined}:
                return tuple(names[i] for i in chosen)
    return ("?",)


def _split(shape: list[int], joined: list[int]) -> tuple[tuple[int, ...], ...]:
    """Devices 0… of a mesh of this shape, in groups that differ along the joined dims only."""
    devices = np.arange(math.prod(shape)).reshape(shape)
    rest = [i for i in range(len(shape)) if i not in joined]
    size = math.prod(shape[i] for i in joined)
    return tuple(tuple(row) for row in devices.transpose(rest + joined).reshape(-1, size).tolist())
