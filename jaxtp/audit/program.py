"""`audit`: a compiled program's collectives, memory, and large writes, as a report to test with or to look at."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import Mesh
from rich.table import Table

from jaxtp.audit import hlo
from jaxtp.planner import collectives
from jaxtp.tables import Shown

# what is no kernel: names for values, the host's control flow, and collectives, which are counted apart
_FREE = (
    *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "call", "conditional"),
    *("after-all", "partition-id", "replica-id"),
)
_IN_PLACE = ("dynamic-update-slice", "scatter")
_MOVES = ("copy", "transpose", "slice", "dynamic-slice", "concatenate", "reshape", "pad", "convert", "reverse", "gather")
_NEUTRAL = ("parameter", "bitcast", "constant", "tuple", "get-tuple-element", "broadcast", "iota")


@dataclass(frozen=True)
class Collective(collectives.Collective):
    """One collective of a program. loops: how many loops it stands in; times: how often it is done (once in a loop whose trips
    the compiler does not know); overlapped: matrix products run between its start and its end; kernel: that of XLA:GPU's own
    that does it ("one-shot", "two-shot"), "" where a library does (NCCL).
    """

    loops: int
    times: int = 1
    overlapped: bool = False
    kernel: str = ""


@dataclass(frozen=True)
class Write:
    """What an instruction writes: bytes; in_place: it updates a part of what is there; moves: it computes nothing, so that
    it only brings data into another place, order or dtype.
    """

    name: str
    opcode: str
    bytes: int
    in_place: bool
    moves: bool
    loops: int


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """What a compiled program does on each device. Bytes; `kernels` counts launches by loop depth; flops, reads (of
    arguments, by number): see `hlo`.
    """

    name: str
    collectives: tuple[Collective, ...]
    kernels: dict[int, int]
    calls: dict[str, int]
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    aliased_bytes: int
    flops: int
    writes: tuple[Write, ...]
    reads: dict[int, int]

    def count(self, kind: str, *, axis: str | None = None, dtype: str | None = None, loops: int | None = None) -> int:
        """How many collectives are of this kind (over this axis among others, of this dtype, in that many loops)."""
        return sum(
            c.kind == kind and axis in (None, *c.axes) and dtype in (None, c.dtype) and loops in (None, c.loops)
            for c in self.collectives
        )

    def overlapped(self, *, axis: str | None = None) -> float:
        """The share of what is sent in rings (over this axis among others) that has matrix products beside it."""
        sent = [(c.traffic * c.times, c.overlapped) for c in self.collectives if axis in (None, *c.axes)]
        return sum(size for size, beside in sent if beside) / (sum(size for size, _ in sent) or 1)

    def copies(self, at_least: int) -> list[Write]:
        """Copies, transposes, slices and conversions that write that many bytes or more."""
        return [write for write in self.writes if write.bytes >= at_least and write.moves and not write.in_place]

    def table(self) -> Table:
        """The report as a table."""
        memory = ", ".join(
            f"{label} {size / 2**20:.2f}"
            for label, size in (
                ("arguments", self.argument_bytes),
                ("outputs", self.output_bytes),
                ("aliased", self.aliased_bytes),
                ("temporary", self.temp_bytes),
            )
        )
        table = Table(title=f"{self.name}: what each device communicates", caption=f"MiB on each device: {memory}")
        for column in ("collective", "axis", "dtype"):
            table.add_column(column)
        for column in ("devices", "count", "bytes each", "sent in a ring"):
            table.add_column(column, justify="right")
        table.add_column("beside products")
        table.add_column("where")
        for c, count in sorted(Counter(self.collectives).items(), key=lambda item: -item[0].bytes * item[1]):
            where = "each step of the loop" if c.loops else "once"
            axes = " × ".join(c.axes)
            beside = "yes" if c.overlapped else "no"
            numbers = str(c.devices), str(count), f"{c.bytes:,}", f"{count * c.traffic:,}"
            table.add_row(c.kind, axes, c.dtype, *numbers, beside, where)
        if not self.collectives:
            table.add_row("none", "", "", "", "0", "0", "0", "", "")
        return table


def audit(compiled: Any, mesh: Mesh, *, name: str | None = None) -> Report:
    """Reads a compiled program (`jax.jit(f).lower(...).compile()`) over `mesh`."""
    text = compiled.as_text()
    found = hlo.computations(text)
    memory = compiled.memory_analysis()
    sent, kernels, calls, writes = [], Counter[int](), Counter[str](), []
    beside = hlo.overlapped(found)
    for instruction, loops, times in hlo.walk(found):
        if hlo.kind(instruction) in hlo.KINDS:
            if not instruction.opcode.endswith("-done"):
                collective = _collective(instruction, found, dict(mesh.shape), loops, times)
                if collective.devices > 1:  # XLA:CPU leaves those that join a single device in their places
                    sent.append(replace(collective, overlapped=instruction.name in beside))
            continue
        inside = hlo.inside(instruction, found)
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done") or any(hlo.kind(i) in hlo.KINDS for i in inside):
            continue
        kernels[loops] += 1
        if target := re.search(r'custom_call_target="([^"]+)"', instruction.rest):
            calls[target[1]] += 1
        in_place = any(i.opcode in _IN_PLACE and i.bytes == instruction.bytes for i in inside)
        moves = all(i.opcode in _MOVES or i.opcode in _NEUTRAL for i in inside)
        writes.append(Write(instruction.name, instruction.opcode, instruction.bytes, in_place, moves, loops))
    title = re.search(r"HloModule ([\w.\-]+)", text)
    return Report(
        name=name or (title[1].removeprefix("jit_") if title else "program"),
        collectives=tuple(sent),
        kernels=dict(kernels),
        calls=dict(calls),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        flops=hlo.flops(found),
        reads=hlo.reads(found),
        writes=tuple(sorted(writes, key=lambda write: -write.bytes)),
    )


def _collective(
    instruction: hlo.Instruction, found: dict[str, list[hlo.Instruction]], sizes: dict[str, int], loops: int, times: int
) -> Collective:
    kind = hlo.kind(instruction)
    pairs = kind == "collective-permute"
    joined = hlo.groups(instruction.rest)
    axes = hlo.axes_of(joined, sizes, pairs=pairs)
    devices = len(joined[0]) if joined and not pairs else 2 if pairs else math.prod(sizes.values())
    done = next((i for c in found.values() for i in c if i.opcode == f"{kind}-done" and i.operand == instruction.name), None)
    result = done or instruction
    size = result.bytes * (devices if kind == "reduce-scatter" else 1)
    dtypes = "+".join(sorted({dtype for dtype, _ in hlo.shapes(result.shape)}))
    own = re.search(r'"kernel_strategy":"KERNEL_STRATEGY_TRITON_(\w+)"', instruction.rest)
    kernel = own[1].lower().replace("_", "-") if own else ""
    return Collective(kind, axes, dtypes, size, devices, loops, times, kernel=kernel)
