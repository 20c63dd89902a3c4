"""The picture of a load: throughput and latencies against requests at once or a second. Needs matplotlib (extra `notebook`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from jaxtp.draw import plain_ticks
from jaxtp.load.figures import LATENCIES, Levels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = ("ttft", "itl", "e2el")
TICKS = 8  # levels up to which each has its own


def curves(found: Levels) -> Figure:
    """Tokens a second, and the median and 99th percentile of each latency; what no request completed at has no point."""
    import matplotlib.pyplot as plt

    levels = found.levels
    rates = len({level.rate for level in levels}) > 1 or levels[0].concurrency is None
    if rates:  # without a limit, the rate is what the server made of it
        loads = [level.record["request_throughput"] if math.isinf(level.rate) else level.rate for level in levels]
    else:
        loads = [level.concurrency for level in levels]
    figure, axes = plt.subplots(2, 2, figsize=(8, 5.2), sharex=True, layout="constrained")
    panels = axes.flat

    def draw(at: Axes, name: str, label: str, **style: Any) -> None:
        points = [(load, level.record[name]) for load, level in zip(loads, levels, strict=True) if load and level.record[name]]
        if points:
            at.plot(*zip(*sorted(points), strict=True), marker="o", ms=4, lw=1.2, label=label, **style)

    draw(panels[0], "output_throughput", "made", color="tab:blue")
    draw(panels[0], "total_token_throughput", "in and out", color="0.7")
    panels[0].set_title("tokens/s", fontsize=9)
    for at, name in zip(panels[1:], SHOWN, strict=True):
        draw(at, f"p50_{name}_ms", "p50", color="tab:blue")
        draw(at, f"p99_{name}_ms", "p99", color="tab:orange", linestyle="--")
        at.set_title(f"{LATENCIES[name]}, ms", fontsize=9)
    for at in panels:
        if at.lines:
            at.set(xscale="log", yscale="log")
            at.grid(alpha=0.3, lw=0.5)
            plain_ticks(at.xaxis)
            plain_ticks(at.yaxis)
            at.legend(fontsize=7, frameon=False)
        at.spines[["top", "right"]].set_visible(False)
        at.tick_params(labelsize=8)
    for at in axes[1]:
        if len(loads) <= TICKS:
            at.set_xticks([load for load in loads if load])
        at.set_xlabel("requests a second" if rates else "requests at once", fontsize=8)
    figure.suptitle(", ".join(f"{name} {value}" for name, value in found.settings.items() if name != "url"), fontsize=9)
    plt.close(figure)
    return figure
