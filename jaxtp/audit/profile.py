"""`profile`: where the time of a prefill and of decode steps goes, from the profiler's trace and the programs' HLO."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.table import Table

from jaxtp.audit import hlo
from jaxtp.audit.program import KINDS
from jaxtp.generate import LLM, SamplingParams
from jaxtp.generate.auto import machine_of
from jaxtp.planner import Generation, cost
from jaxtp.tables import Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("attention", "mlp", "collectives", "embedding", "head", "sampling", "other", "host")
SCOPES = ("attention", "mlp", "embedding", "head", "sampling")  # as the model names them
CONTROL = ("while", "call", "conditional", "ThunkExecutor")
PHASES = ("prefill", "decode")
BINS = 200  # of the picture of utilisation


@dataclass(frozen=True)
class Event:
    """One operation on one device. start, seconds: since the trace began. part: of `PARTS`. phase: of `PHASES`."""

    device: str
    phase: str
    part: str
    start: float
    seconds: float


@dataclass(frozen=True, repr=False)
class Profile(Shown):
    """seconds[phase][part]: on average over the devices, of one prefill and of one decode step; host: what no operation was
    running in. planned: the same by the planner, on GPUs that it knows. trace: for ui.perfetto.dev.
    """

    seconds: dict[str, dict[str, float]]
    planned: dict[str, dict[str, float]]
    events: tuple[Event, ...]
    steps: int
    trace: Path | None

    def table(self) -> Table:
        """A row for each part, with its share, beside the planner's."""
        table = Table(title=f"where the time goes: a prefill, and one of {self.steps} decode steps, each device on average")
        if not self.planned:
            table.caption = "no plan: these are no GPUs that the planner knows"
        table.add_column("part")
        for phase in PHASES:
            table.add_column(f"{phase}, ms", justify="right")
            table.add_column("share", justify="right")
            if self.planned:
                table.add_column("planned", justify="right")
        for part in (*PARTS, "total"):
            cells = []
            for phase in PHASES:
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
            parts = [[e for e in mine if e.part != "collectives"], [e for e in mine if e.part == "collectives"]]
            busy = [_busy(part, end) for part in parts]
            at.stackplot(edges[:-1], busy, labels=("compute", "communication"), colors=("C0", "C3"), step="post")
            at.set(ylim=(0, 1), xlim=(0, 1e3 * end), ylabel=device, yticks=[0, 1])
        axes[0, 0].legend(fontsize=7, loc="upper right")
        axes[-2, 0].set_xlabel("ms of the run")
        for row, phase in enumerate(PHASES):
            left, total = 0.0, sum(self.seconds[phase].values()) or 1.0
            for number, part in enumerate(PARTS):
                share = self.seconds[phase].get(part, 0.0) / total
                axes[-1, 0].barh(row, share, left=left, color=f"C{number}", label=part if row == 0 else None)
                left += share
        axes[-1, 0].set(yticks=range(len(PHASES)), yticklabels=PHASES, xlim=(0, 1), xlabel="share of the time")
        axes[-1, 0].invert_yaxis()
        axes[-1, 0].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        plt.close(figure)
        return figure


def profile(llm: LLM, *, batch: int, input_len: int, steps: int, trace: Path | None = None) -> Profile:
    """Profiles one prefill of `batch` prompts of `input_len` random tokens and the `steps` decode steps after it, once all is
    compiled. trace: where to keep the trace, as Perfetto reads it (.json.gz).

    Raises ValueError for lengths that the model does not take.
    """
    if min(batch, input_len, steps) < 1 or input_len + steps + 1 > llm.max_model_len:
        raise ValueError(
            f"{batch} prompts of {input_len} tokens and {steps} steps: each must be at least 1, and the tokens at most "
            f"max_model_len={llm.max_model_len} together"
        )
    ids = np.random.default_rng(0).integers(0, llm.config.vocab_size, (batch, input_len)).tolist()
    params = SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True)
    if batch > llm.max_num_seqs:
        raise ValueError(f"{batch} prompts do not run at once: max_num_seqs={llm.max_num_seqs}")
    llm.generate(ids, params)
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow the host down
        with jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options):
            start = time.perf_counter()
            llm.generate(ids, params)
            wall = time.perf_counter() - start
        found = next(Path(folder).rglob("perfetto_trace.json.gz"))
        raw = json.loads(gzip.decompress(found.read_bytes()))
        if trace:
            shutil.copy(found, trace)
    records = raw["traceEvents"] if isinstance(raw, dict) else raw
    events = read(records, {name: parts_of(text) for name, text in llm.programs.texts().items()})
    if not events:
        raise RuntimeError("the profiler's trace names no operations of these programs")
    took = {"prefill": llm.timing.prefill, "decode": llm.timing.decode}
    assert sum(took.values()) <= wall
    seconds = {phase: _average(events, phase, took[phase], llm.timing.steps if phase == "decode" else 1) for phase in PHASES}
    return Profile(seconds, _planned(llm, batch, input_len, steps), tuple(events), steps, trace)


def parts_of(text: str) -> dict[str, str]:
    """Of each instruction of a program, by name, the part that it belongs to; control flow is left out."""
    scopes = dict(re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name=\"([^\"]*)\"", text, re.MULTILINE))
    found = {}
    for instructions in hlo.computations(text).values():
        for i in instructions:
            if i.opcode in CONTROL:
                continue
            kind = i.opcode.removesuffix("-start").removesuffix("-done")
            inner = [scope for scope in scopes.get(i.name, "").split("/") if scope in SCOPES]
            found[i.name] = "collectives" if kind in KINDS else inner[-1] if inner else "other"
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
        phase = "decode" if function == "decode" else "prefill"
        place = arguments.get("device_ordinal")
        device = (
            f"CPU {place}" if place is not None and "CPU" in places[r["pid"]] else places[r["pid"]].removeprefix("/device:")
        )
        events.append(Event(device, phase, part, 1e-6 * (r["ts"] - first), 1e-6 * r["dur"]))
    return events


def _average(events: list[Event], phase: str, wall: float, times: int) -> dict[str, float]:
    """Seconds of each part, on average over devices and over so many times; the host has what is left of the wall's."""
    devices = {event.device for event in events}
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


def _planned(llm: LLM, batch: int, input_len: int, steps: int) -> dict[str, dict[str, float]]:
    machine = machine_of(llm.model)
    return cost.by_part(machine, Generation(batch, input_len, steps, dtype=machine.dtype)) if machine else {}
