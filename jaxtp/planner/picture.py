"""Pictures of plans: latency against throughput, and a training step by part. Needs matplotlib (extra `notebook`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtp.buckets import MAX_NUM_SEQS
from jaxtp.draw import MARKERS, aside, log_log
from jaxtp.planner.prediction import Plan
from jaxtp.planner.work import Generation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """A layout with some rows: seconds a token of each row, tokens a second of each GPU."""

    plan: Plan
    latency: float
    throughput: float


def points(plans: Iterable[Plan]) -> list[Point]:
    """Every layout with 1, 2, 4, ... rows, as far as the cache holds them."""
    found = []
    for plan in plans:
        assert isinstance(plan.task, Generation), "a picture of latency and throughput is of generation"
        rows = 1
        while rows <= MAX_NUM_SEQS and (at := plan.of_rows(rows)).holds:
            found.append(Point(at, at.step.total, at.tokens_per_second / at.cluster.size))
            rows *= 2
    return found


def frontier(found: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both."""
    best: list[Point] = []
    for point in sorted(found, key=lambda p: (p.latency, -p.throughput)):
        if not best or point.throughput > best[-1].throughput:
            best.append(point)
    return best


def curves(plans: Sequence[Plan], title: str) -> Figure:
    """A line for each layout, a point for each number of rows. Its colour says tp and its marker pp, so that any number of
    layouts can be told apart.
    """
    import matplotlib.pyplot as plt
    from matplotlib import colormaps

    shown = sorted(plans, key=lambda plan: (plan.split.tp, plan.split.pp))
    sizes = [sorted({getattr(plan.split, axis) for plan in shown}) for axis in ("tp", "pp")]
    found = points(shown)
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for plan in shown:
        mine = [p for p in found if p.plan.split == plan.split]
        tp, pp = (known.index(size) for known, size in zip(sizes, (plan.split.tp, plan.split.pp), strict=True))
        axes.plot(
            [1e3 * p.latency for p in mine],
            [p.throughput for p in mine],
            color=colormaps["turbo"](0.05 + 0.9 * tp / max(len(sizes[0]) - 1, 1)),
            marker=MARKERS[pp % len(MARKERS)],
            ms=4,
            lw=1,
            label=plan.split.told(),
        )
    edge = frontier(found)
    at = [1e3 * p.latency for p in edge], [p.throughput for p in edge]
    axes.plot(*at, color="0.8", marker="o", ms=8, lw=8, alpha=0.6, zorder=0, label="frontier")
    for rows, x, y in zip((p.plan.task.batch for p in edge), *at, strict=True):
        axes.annotate(str(rows), (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=6)
    axes.set(xlabel="ms a token of each row", ylabel="tokens/s a GPU")
    axes.set_title(f"{title}\nnumbers: rows at once", fontsize=9)
    log_log(axes)
    plt.close(figure)
    return figure


def bars(plans: Sequence[Plan], title: str, words: Iterable[str]) -> Figure:
    """A bar for each plan: the seconds of a step by the parts named `words`."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1 + 0.4 * len(plans)), layout="constrained")
    left = [0.0] * len(plans)
    for part in words:
        widths = [getattr(plan.step, part) for plan in plans]
        axes.barh(range(len(plans)), widths, left=left, label=part, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(yticks=range(len(plans)), xlabel="seconds of a step")
    axes.set_yticklabels([f"{plan.split.told()}, {plan.split.remat}" for plan in plans], fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9)
    aside(axes)
    plt.close(figure)
    return figure
