"""Plans to look at: a table, with the reasons."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from jaxtp.planner import compression, experts
from jaxtp.planner.cost import Time
from jaxtp.planner.prediction import Plan
from jaxtp.planner.work import Generation, Training
from jaxtp.tables import Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 2**30
SHOWN = 8  # plans of a table, unless all are asked for


class Plans(list[Plan], Shown):
    """All plans, the best first; behind those that can be, those that cannot. Prints, and shows in a notebook, as a table."""

    def __init__(self, plans: Iterable[Plan], objective: str) -> None:
        super().__init__(plans)
        self.objective = objective

    __str__ = Shown.__str__
    __repr__ = Shown.__repr__

    @property
    def best(self) -> Plan:
        """The first."""
        return self[0]

    @property
    def legal(self) -> list[Plan]:
        """Those that can be."""
        return [plan for plan in self if plan.fits]

    @property
    def refused(self) -> list[Plan]:
        """Those that cannot be; `Plan.refused` says why."""
        return [plan for plan in self if not plan.fits]

    def distinct(self) -> list[Plan]:
        """The best of each mesh."""
        seen: dict[Any, Plan] = {}
        for plan in self.legal:
            seen.setdefault(tuple(plan.split.axes.values()), plan)
        return list(seen.values())

    def table(self, *, every: bool = False) -> Table:
        """The best plan of each mesh and why the others lose, and below why meshes cannot be; every: all plans that can, and
        each mesh that cannot.
        """
        first, best = self.best, self.best
        training = isinstance(first.task, Training)
        shown = self.legal if every else self.distinct()[:SHOWN]
        table = Table(
            title=f"{first.model} on {first.cluster}: {_asked(first)}, by {self.objective}",
            caption=self._caption(every=every),
            caption_justify="left",
        )
        for column in ["#", "layout"] + ["ZeRO", "remat", "micro-\nbatches", "schedule"] * training:
            table.add_column(column)
        numbers = ["GiB of\neach GPU"]
        numbers += (
            ["s a step", "tokens/s\na GPU", "MFU"]
            if training
            else ["KV cache,\ntokens", "rows /\nat most", "to first\ntoken, ms"]
        )
        numbers += [] if training else ["ms a\ntoken", "tokens/s\na GPU"]
        for column in [*numbers, "sent", "idle"]:
            table.add_column(column, justify="right")
        table.add_column("why")
        for number, plan in enumerate(shown, 1):
            table.add_row(str(number), *_cells(plan), why(plan, best, self.objective))
        return table

    def draw(self) -> Figure:
        """Latency against throughput: a line for each mesh, a point for each number of rows; the frontier is marked. Training:
        the time of a step by part. Needs matplotlib (extra `notebook`).
        """
        from jaxtp.planner import picture  # generating asks for plans alone

        title = f"{self.best.model} on {self.best.cluster}: {_asked(self.best)}"
        if isinstance(self.best.task, Training):
            return picture.bars(self.distinct()[:SHOWN], title, WORDS)
        return picture.curves(self.distinct(), title)

    def _caption(self, *, every: bool) -> str:
        """How many there are, and why meshes cannot be: those that lack the same thing share a line, unless `every`."""
        counts, possible = Counter(plan.fits for plan in self), {plan.split.told() for plan in self.legal}
        training = isinstance(self.best.task, Training)
        lines = [f"{counts[True]} layouts can be, {counts[False]} cannot; times are predictions"]
        if (config := self.best.config).experts:
            whole, met = (f"{n / 1e9:,.1f}" for n in (config.num_params, config.num_active_params))
            lines += [f"{whole} billion weights, of which a token meets {met}"]
        lines += filter(None, [compression.advice(self.best)])
        lines += ["SP: sequence parallelism; interleaved: so many chunks of layers on each rank"] * training
        alike: dict[str, list[Plan]] = {}
        for plan in _reasons(self.refused):
            if plan.split.told() not in possible:
                alike.setdefault(str(plan.split) if every else re.sub(r"\d+", "", str(plan.refused)), []).append(plan)
        for first, *others in alike.values():
            lines.append(f"{first.split.told()}{f', and {len(others)} more' if others else ''}: {first.refused}")
        return "\n".join(lines)

    def records(self) -> list[dict[str, Any]]:
        """All of them as plain numbers, for JSON."""
        return [plan.record() for plan in self]


def _asked(plan: Plan) -> str:
    task = plan.task
    if isinstance(task, Training):
        return f"updates from {task.batch} rows of {task.seq_len:,} tokens"
    bits = f", weights in {task.quantization}" if task.quantization else ""
    bits += f", cache in {task.kv_cache_dtype}" if task.kv_cache_dtype != "auto" else ""
    return f"prompts of {task.prompt_len:,} tokens, {task.output_len:,} more each{bits}"


def _cells(plan: Plan) -> list[str]:
    split, held = plan.split, f"{plan.memory.total / GIB:.1f}"
    layout = split.told() + " + SP" * split.sequence_parallel
    idle, sent = (f"{plan.step.share(part):.0%}" for part in ("bubble", "communication"))
    rate = plan.tokens_per_second / plan.cluster.size
    if isinstance(plan.task, Training):
        name = f"interleaved, {split.chunks}" if split.chunks > 1 else split.schedule
        schedule = name if split.pp > 1 else ""
        choice = [str(split.zero), split.remat, str(split.microbatches), schedule]
        return [layout, *choice, held, f"{plan.seconds:.2f}", f"{rate:,.0f}", f"{plan.mfu:.0%}", sent, idle]
    times = f"{1e3 * plan.prefill.total:,.0f}", f"{1e3 * plan.step.total:.2f}"
    return [
        layout,
        held,
        f"{plan.kv_tokens:,}",
        f"{plan.task.batch} / {plan.most_rows:,}",
        *times,
        f"{rate:,.1f}",
        sent,
        idle,
    ]


def why(plan: Plan, best: Plan, objective: str = "latency") -> str:
    """Why a plan is not the best, or what speaks for it."""
    notes = _notes(plan)
    if plan is best:
        return "; ".join(["the best", *notes])
    slower = plan.seconds / plan.task.batch / (best.seconds / best.task.batch)
    heavier = plan.memory.total - best.memory.total
    if objective == "memory" and heavier > 0.005 * best.memory.total:
        notes.insert(0, f"{heavier / GIB:.1f} GiB more, {slower:.2f}x the time")
    elif slower > 1.005:
        mine, its = (_whole(p) * (1 / p.task.batch) for p in (plan, best))
        growth = {part.name: getattr(mine, part.name) - getattr(its, part.name) for part in dataclasses.fields(Time)}
        part = max(growth, key=growth.__getitem__)
        notes.insert(0, f"{slower:.2f}x the time: {WORDS[part]}")
    elif slower < 0.995:
        notes.insert(0, f"faster ({slower:.2f}x the time), but not the best by {objective}")
    elif heavier > 0.005 * best.memory.total:
        notes.insert(0, f"as fast, {heavier / GIB:.1f} GiB more")
    else:
        notes.insert(0, "as good")
    return "; ".join(notes)


WORDS = {
    "weights": "reading and multiplying weights",
    "attention": "attention",
    "other": "what tp does not share out (norms, the residual stream)",
    "communication": "communication",
    "launch": "starting kernels",
    "optimizer": "the optimiser",
    "bubble": "stages that wait",
}


def _whole(plan: Plan) -> Time:
    if isinstance(plan.task, Generation):
        return plan.prefill + plan.step * (plan.task.output_len - 1)
    return plan.step


def _notes(plan: Plan) -> list[str]:
    """What the guides' rules say of it."""
    notes, split, config = [], plan.split, plan.config
    slowest = plan.cluster.crosses("tp", split.axes)
    if slowest not in ("", "NVLink", "measured"):
        notes.append(f"tp goes over {slowest}")
    if config.experts and isinstance(plan.task, Generation):
        rows, count = split.rows(plan.task.batch) * split.ep, config.experts.count
        if (met := experts.hit(config, rows)) < 0.95 * count:
            notes.append(f"a step's {rows} tokens go to {met:.0f} of {count} experts")
    if split.tp > config.num_kv_heads:
        notes.append(f"each KV head stands {split.tp // config.num_kv_heads} times")
    stages = split.stages(config)
    if not stages.even:
        notes.append(f"uneven stages add {stages.waste:.0%}")
    network = plan.cluster.levels[-1][1].name
    if plan.cluster.nodes > 1 and plan.cluster.crosses("pp", split.axes) == network != slowest:
        notes.append("stages, not tp, cross nodes")
    return notes


def _reasons(refused: Sequence[Plan]) -> list[Plan]:
    """One for each mesh: what came closest, of those that only want too much memory."""

    def far(plan: Plan) -> tuple[bool, float]:
        return not plan.full, plan.memory.total if plan.full else 0.0

    meshes = {tuple(plan.split.axes.values()) for plan in refused}
    closest = (min((p for p in refused if tuple(p.split.axes.values()) == mesh), key=far) for mesh in meshes)
    return sorted(closest, key=lambda plan: (*far(plan), plan.split.tp, plan.split.pp))
