"""`profile`: where the time of a prefill and of decode steps goes, or of training steps, from a trace and the HLO."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.table import Table

from jaxtp.audit import hlo
from jaxtp.draw import aside
from jaxtp.generate import LLM, SamplingParams
from jaxtp.generate.auto import machine_of
from jaxtp.planner import Training, cost
from jaxtp.tables import Shown
from jaxtp.train import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = (
    *("attention", "context", "mlp", "router", "dispatch", "experts", "collectives"),
    *("embedding", "head", "sampling", "optimizer", "other", "host"),
)
# as the model and the trainer name them; what is sent for experts is their dispatch, and context what attention sends over cp
SCOPES = ("attention", "mlp", "router", "experts", "embedding", "head", "sampling", "optimizer")
SENDS = ("context", "dispatch", "collectives")
CONTROL = ("while", "call", "conditional", "ThunkExecutor")
BINS = 200  # of the picture of utilisation


@dataclass(frozen=True)
class Event:
    """One operation on one device. start, seconds: since the trace began. part: of `PARTS`. phase: prefill, decode or step."""

    device: str
    phase: str
    part: str
    start: float
    seconds: float


@dataclass(frozen=True, repr=False)
class Profile(Shown):
    """seconds[phase][part]: on average over the devices, of one prefill and of one decode step, or of one training step; host:
    what no operation was running in. planned: the same by the planner, on GPUs that it knows. trace: for ui.perfetto.dev.
    """

    seconds: dict[str, dict[str, float]]
    planned: dict[str, dict[str, float]]
    events: tuple[Event, ...]
    steps: int
    trace: Path | None

    @property
    def communication(self) -> dict[str, float]:
        """The share of each phase that collectives take."""
        return {phase: parts.get("collectives", 0.0) / (sum(parts.values()) or 1.0) for phase, parts in self.seconds.items()}

    def table(self) -> Table:
        """A row for each part, with its share, beside the planner's."""
        steps = (
            f"one of {self.steps} training steps" if "step" in self.seconds else f"a prefill, one of {self.steps} decode steps"
        )
        known = "" if self.planned else "; no plan: these are no GPUs that the planner knows"
        table = Table(title=f"time of {steps}", caption=f"each device on average{known}")
        table.add_column("part")
        for phase in self.seconds:
            table.add_column(f"{phase}, ms", justify="right")
            table.add_column("share", justify="right")
            if self.planned:
                table.add_column("planned", justify="right")
        used = {part for found in (self.seconds, self.planned) for parts in found.values() for part in parts}
        for part in (*(part for part in PARTS if part in used), "total"):
            cells = []
            for phase in self.seconds:
                mine = self.seconds[phase]
                total = sum(mine.values())
                value = total if part == "total" else mine.get(part, 0.0)
                cells += [f"{1e3 * value:.3f}", f"{value / total:.0%}" if total else ""]
                if self.planned:
                    its = self.planned[phase]
                    cells.append(f"{1e3 * (sum(its.values()) if part == 'total' else its.get(part, 0.0)):.3f}")
            table.add_row(part, *cells, end_section=part == "host")
        return table

    def draw(self) -> Figure:
        """Compute and communication of each device over time, and the parts of either phase. Needs matplotlib."""
        import matplotlib.pyplot as plt

        devices = sorted({event.device for event in self.events})
        end = max((event.start + event.seconds for event in self.events), default=1.0)
        figure, axes = plt.subplots(
            len(devices) + 1, 1, figsize=(9, 1.6 + 0.9 * len(devices)), layout="constrained",
            height_ratios=[1] * len(devices) + [1.8], squeeze=False,
        )  # fmt: skip
        edges = np.linspace(0.0, 1e3 * end, BINS + 1)
        for at, device in zip(axes[:-1, 0], devices, strict=True):
            mine = [event for event in self.events if event.device == device]
            parts = [[e for e in mine if (e.part in SENDS) == sends] for sends in (False, True)]
            busy = [_busy(part, end) for part in parts]
            at.stackplot(edges[:-1], busy, labels=("compute", "communication"), colors=("C0", "C3"), step="post")
            at.set(ylim=(0, 1), xlim=(0, 1e3 * end), ylabel=device, yticks=[0, 1])
        aside(axes[0, 0])
        axes[-2, 0].set_xlabel("ms of the run")
        colours = plt.get_cmap("tab20", len(PARTS))
        for row, phase in enumerate(self.seconds):
            left, total = 0.0, sum(self.seconds[phase].values()) or 1.0
            for number, part in enumerate(PARTS):
                share = self.seconds[phase].get(part, 0.0) / total
                axes[-1, 0].barh(row, share, left=left, color=colours(number), label=part if row == 0 else None)
                left += share
        axes[-1, 0].set(
            yticks=range(len(self.seconds)), yticklabels=list(self.seconds), xlim=(0, 1), xlabel="share of the time"
        )
        axes[-1, 0].invert_yaxis()
        aside(axes[-1, 0])
        plt.close(figure)
        return figure


def profile(llm: LLM, *, batch: int, input_len: int, steps: int, trace: Path | None = None) -> Profile:
    """Profiles one prefill of `batch` prompts of `input_len` random tokens (all steps that take some of them along) and the
    `steps` decode steps after it, once all is compiled. trace: where to keep the trace, as Perfetto reads it (.json.gz).

    Raises ValueError for lengths that the model does not take.
    """
    if min(batch, input_len, steps) < 1 or input_len + steps + 1 > llm.max_model_len:
        raise ValueError(
            f"{batch} prompts of {input_len} tokens and {steps} steps: each must be at least 1, and the tokens at most "
            f"max_model_len={llm.max_model_len} together"
        )
    # others when it counts: the cache keeps what it has seen
    first, second = np.random.default_rng(0).integers(0, llm.config.vocab_size, (2, batch, input_len)).tolist()
    params = SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True)
    if batch > llm.max_num_seqs:
        raise ValueError(f"{batch} prompts do not run at once: max_num_seqs={llm.max_num_seqs}")
    llm.generate(first, params)
    records, wall = _traced(lambda: llm.generate(second, params), trace)
    events = read(records, {name: parts_of(text) for name, text in llm.programs.texts().items()})
    took = {"prefill": llm.timing.prefill, "decode": llm.timing.decode}
    assert sum(took.values()) <= wall
    times = {"prefill": 1.0, "decode": llm.timing.steps / llm.model.stages}
    seconds = {phase: _average(events, phase, took[phase], times[phase]) for phase in took}
    machine = machine_of(llm.model)
    planned = cost.by_part(machine, machine.task(batch, input_len, steps)) if machine else {}
    return Profile(seconds, planned, tuple(events), steps, trace)


def profile_training(run: Run, *, steps: int, trace: Path | None = None) -> Profile:
    """Profiles `steps` steps of a run from its beginning, after one that warms up; nothing is kept of them."""
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    state, frozen, batches = run.first_state(), run.frozen(), run.batches["train"].from_step(0)
    with jax.set_mesh(run.mesh):
        step = run.step().lower(state, next(batches), frozen).compile()

        def go(times: int) -> None:
            nonlocal state
            for _ in range(times):
                state, metrics = step(state, next(batches), frozen)
                metrics.loss.block_until_ready()

        go(1)
        records, wall = _traced(lambda: go(steps), trace)
    events, data = read(records, {"step": parts_of(step.as_text())}), run.config.data
    machine = None if frozen else machine_of(run.stacked.model, run.split)
    task = Training(data.batch_size, data.sequence_length, dtype=run.config.model.dtype)
    planned = cost.by_part(machine, task) if machine else {}
    return Profile({"step": _average(events, "step", wall, steps)}, planned, tuple(events), steps, trace)


def _traced(work: Callable[[], object], trace: Path | None) -> tuple[list[Mapping[str, Any]], float]:
    """The records of the profiler's trace of some work, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow the host down
        with jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options):
            start = time.perf_counter()
            work()
            wall = time.perf_counter() - start
        found = next(Path(folder).rglob("perfetto_trace.json.gz"))
        raw = json.loads(gzip.decompress(found.read_bytes()))
        if trace:
            shutil.copy(found, trace)
    return raw["traceEvents"] if isinstance(raw, dict) else raw, wall


def parts_of(text: str) -> dict[str, str]:
    """Of each instruction of a program, by name, the part that it belongs to; control flow is left out."""
    scopes = dict(re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name=\"([^\"]*)\"", text, re.MULTILINE))
    found = {}
    computations = hlo.computations(text)
    for instructions in computations.values():
        for i in instructions:
            if i.opcode in CONTROL:
                continue
            sends = any(hlo.kind(each) in hlo.KINDS for each in hlo.inside(i, computations))
            # what autodiff makes of a scope is "transpose(jvp(mlp))"
            names = [name.rstrip(")").rpartition("(")[2] for name in scopes.get(i.name, "").split("/")]
            inner = [name for name in names if name in SCOPES]
            part = inner[-1] if inner else "experts" if "moe" in names else "other"
            if sends:
                routed = "moe" in names and part != "mlp"
                part = "context" if "context" in names else "dispatch" if routed else "collectives"
            found[i.name] = part
    return found


def read(records: Iterable[Mapping[str, Any]], programs: Mapping[str, Mapping[str, str]]) -> list[Event]:
    """Operations in a trace's records that belong to these programs (part by instruction, by the program's name)."""
    records = list(records)
    places = {r["pid"]: r["args"]["name"] for r in records if r.get("name") == "process_name"}
    named: dict[str, dict[str, str]] = {}
    for name, parts in programs.items():  # programs of one function have one name in a trace
        named.setdefault(name.split(".")[0], {}).update(parts)
    first = min((r["ts"] for r in records if r.get("ph") == "X"), default=0.0)
    events = []
    for r in records:
        arguments = r.get("args", {})
        if r.get("ph") != "X" or "hlo_op" not in arguments:
            continue
        function = arguments.get("hlo_module", "").removeprefix("jit_").split("(")[0]
        part = named.get(function, {}).get(arguments["hlo_op"])
        if part is None:
            continue
        phase = function if function in ("decode", "step") else "prefill"
        place = arguments.get("device_ordinal")
        device = (
            f"CPU {place}" if place is not None and "CPU" in places[r["pid"]] else places[r["pid"]].removeprefix("/device:")
        )
        events.append(Event(device, phase, part, 1e-6 * (r["ts"] - first), 1e-6 * r["dur"]))
    return events


def _average(events: list[Event], phase: str, wall: float, times: float) -> dict[str, float]:
    """Seconds of each part, on average over devices and over so many times; the host has what is left of the wall's."""
    devices = {event.device for event in events}
    if not devices:
        raise RuntimeError("the profiler's trace names no operations of these programs")
    found: dict[str, float] = defaultdict(float)
    for event in events:
        if event.phase == phase:
            found[event.part] += event.seconds / len(devices) / times
    busy = np.mean([_union([e for e in events if e.device == d and e.phase == phase]) for d in devices])
    found["host"] = max(0.0, wall - float(busy)) / times
    return dict(found)


def _union(events: Iterable[Event]) -> float:
    """Seconds in which any of them runs."""
    total, reached = 0.0, 0.0
    for event in sorted(events, key=lambda event: event.start):
        end = event.start + event.seconds
        total += max(0.0, end - max(event.start, reached))
        reached = max(reached, end)
    return total


def _busy(events: Iterable[Event], end: float) -> np.ndarray:
    """The share of each of `BINS` stretches in which any of them runs."""
    share, width, reached = np.zeros(BINS), end / BINS, 0.0
    for event in sorted(events, key=lambda event: event.start):
        a, b = max(event.start, reached), event.start + event.seconds
        reached = max(reached, b)
        while a < b:
            place = min(int(a / width), BINS - 1)
            stop = min(b, (place + 1) * width) if place < BINS - 1 else b
            share[place] += max(stop - a, 0.0) / width
            a = max(stop, a + 1e-12)
    return np.minimum(share, 1.0)
