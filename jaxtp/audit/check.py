"""A plan against the programs that it becomes: compiled for the very GPUs it names, on a machine that may have none."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh
from rich.table import Table

from jaxtp.audit.program import Report, audit
from jaxtp.audit.targets import abstract_llama, abstract_trainer, compile_decode, compile_prefill, compile_step, gpu_mesh
from jaxtp.mesh import make_mesh
from jaxtp.planner import Plan, Training
from jaxtp.planner.collectives import Collective
from jaxtp.planner.programs import Predicted, largest, programs
from jaxtp.tables import Shown

MARKED = 0.05  # differences above it stand out
SMALL = 64  # bytes: sums of single numbers, which no plan speaks of
Sent = dict[tuple[str, tuple[str, ...], str], tuple[int, int]]


@dataclass(frozen=True)
class Line:
    """One number of a program: as predicted, and as compiled. times: in how many collectives, on either side."""

    program: str
    what: str
    unit: str
    predicted: float
    compiled: float
    times: tuple[int, int] | None = None

    @property
    def difference(self) -> float:
        """Of the compiled one from the predicted one, as a share of it."""
        if self.predicted == self.compiled:
            return 0.0
        return self.compiled / self.predicted - 1 if self.predicted else float("inf")


@dataclass(frozen=True, repr=False)
class Check(Shown):
    """What was predicted beside what was compiled. seconds: that compiling took."""

    plan: Plan
    target: str
    lines: tuple[Line, ...]
    seconds: float

    def line(self, program: str, what: str) -> Line:
        """One of them."""
        return next(line for line in self.lines if (line.program, line.what) == (program, what))

    def table(self) -> Table:
        """Differences above 5% are marked."""
        layout = self.plan.split.told()
        table = Table(
            title=f"{self.plan.model}, {layout}, compiled for {self.target} in {self.seconds:.0f} s: each device",
            caption="times: how often, as predicted and as compiled; XLA may join several. Differences above 5% are marked",
        )
        for column in ("program", "what", "unit"):
            table.add_column(column)
        for column in ("predicted", "compiled", "difference", "times"):
            table.add_column(column, justify="right")
        for line in self.lines:
            mark = "[bold]" if abs(line.difference) > MARKED else ""
            numbers = (f"{value:,.3f}" for value in (line.predicted, line.compiled))
            times = " / ".join(f"{n:,}" for n in line.times) if line.times else ""
            table.add_row(line.program, line.what, line.unit, *numbers, f"{mark}{line.difference:+.1%}", times)
        return table


def check(plan: Plan, *, virtual: bool = False) -> Check:
    """Compiles the programs of a plan and sets them beside what was predicted.

    virtual: for CPU devices (which must be there, see `use_virtual_devices`) instead of the plan's GPUs; what XLA does for
    them differs in dtypes and temporary memory. Raises RuntimeError where the compiler for GPUs is not installed.
    """
    split = plan.split
    axes: dict[str, Any] = split.axes
    mesh = make_mesh(**axes) if virtual else gpu_mesh(plan.cluster.gpu, **axes)
    start, lines = time.perf_counter(), []
    for predicted, compiled in zip(programs(plan.config, split, plan.task), compiled_programs(plan, mesh), strict=True):
        lines += list(_compared(predicted, audit(compiled, mesh)))
    target = f"{split.size} virtual CPU devices" if virtual else str(plan.cluster)
    return Check(plan, target, tuple(lines), time.perf_counter() - start)


def compiled_programs(plan: Plan, mesh: Mesh) -> Iterator[Any]:
    """The programs of `planner.programs`, compiled from shapes alone."""
    config, split, task = plan.config, plan.split, plan.task
    if isinstance(task, Training):
        trainer = abstract_trainer(config, mesh, split, dtype=task.dtype)
        rows = task.batch // split.microbatches
        yield compile_step(trainer, rows=rows, tokens=task.seq_len, accumulate=split.microbatches)
        return
    model = abstract_llama(config, mesh, split, dtype=task.dtype, quantization=task.quantization, bits=task.kv_cache_dtype)
    slots = split.page_tokens(task)
    held = split.groups * split.rows(task.batch) * slots
    step = largest(config, split, task)
    yield compile_prefill(model, tokens=step.prompt_tokens, slots=slots, cache_tokens=held, reach=step.reach)
    yield compile_decode(model, batch=task.batch, slots=slots, cache_tokens=held)


def sent(collectives: Iterable[tuple[Collective, int]]) -> Sent:
    """(times, bytes) by kind, axes and dtype, but for single numbers; of collectives and how often each is done."""
    found: Sent = {}
    for c, times in collectives:
        if c.bytes > SMALL:
            key = (c.kind, c.axes, c.dtype)
            before = found.get(key, (0, 0))
            found[key] = before[0] + times, before[1] + times * c.bytes
    return found


def _compared(predicted: Predicted, report: Report) -> Iterator[Line]:
    def line(what: str, unit: str, scale: float, mine: float, its: float, times: tuple[int, int] | None = None) -> Line:
        return Line(predicted.name, what, unit, mine / scale, its / scale, times)

    yield line("arguments", "GiB", 2**30, predicted.arguments, report.argument_bytes)
    yield line("temporary", "GiB", 2**30, predicted.temporary, report.temp_bytes)
    yield line("products", "TFLOP", 1e12, predicted.flops, report.flops)
    theory, found = sent(predicted.sent.items()), sent((c, c.times) for c in report.collectives)
    for key in sorted({*theory, *found}):
        kind, axes, dtype = key
        (expected, mine), (times, its) = theory.get(key, (0, 0)), found.get(key, (0, 0))
        yield line(f"{kind} over {'·'.join(axes)}, {dtype}", "MB", 1e6, mine, its, (expected, times))
