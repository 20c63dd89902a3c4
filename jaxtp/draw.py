"""Pictures: which device holds which block of a weight, which rank does what when, how rows lie over ranks. They need
matplotlib (extra `notebook`).
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from flax import nnx

from jaxtp.parallel.context import Context
from jaxtp.parallel.schedules import Circulation, Schedule
from jaxtp.weights import variables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Bar = tuple[int, float, float, Any, int]  # rank, start, width, colour, number
WIDTH, LABELS = 2.6, 16  # inches of one picture; blocks up to which each is labelled
MARKERS = "os^DvP*X<>hpd"
COLUMNS, PICTURES = 4, 48  # of weights: side by side, and at most in a figure
PIECES = 10_000  # of a schedule, at most
LEGEND = 30  # entries of a legend's column
CONTEXT_RANKS = 16  # of which rows can be drawn
NUMBERED = 80  # ticks up to which microbatches are numbered


def draw_shardings(model: nnx.Module, paths: str | Sequence[str]) -> Figure:
    """One picture for each weight named in `paths` (as in `describe`, or patterns such as "layers.0.*"): its blocks, and the
    devices that hold each.

    The first dim runs down and the last one across; a block that several devices hold lists them all. The model may be
    abstract. Raises ValueError where nothing is named, for what the model lacks, and for more pictures than can be looked at.
    """
    import matplotlib.pyplot as plt

    weights = dict(variables(model))
    chosen = _named([paths] if isinstance(paths, str) else list(paths), weights)
    columns, rows = min(len(chosen), COLUMNS), math.ceil(len(chosen) / COLUMNS)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH * columns, (WIDTH + 0.8) * rows), squeeze=False, layout="constrained"
    )
    for path, at in zip(chosen, axes.flat, strict=False):
        _draw(at, weights[path], title=path)
    for at in axes.flat[len(chosen) :]:
        at.set_axis_off()
    plt.close(figure)  # the notebook shows what is returned, once
    return figure


def _named(paths: Sequence[str], weights: Iterable[str]) -> list[str]:
    """The weights that paths and patterns name, each once."""
    every = ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", weight) for weight in weights))
    if not paths:
        raise ValueError(f"no weight is named, so there is nothing to draw; the model's weights: {every}")
    found: dict[str, None] = {}
    for path in paths:
        mine = dict.fromkeys(fnmatch.filter(weights, path))
        if not mine:
            raise ValueError(f"the model has no weight {path!r}; its weights: {every}")
        found |= mine
    if len(found) > PICTURES:
        raise ValueError(
            f"{', '.join(paths)}: {len(found)} weights are too many to look at; at most {PICTURES} are drawn at once"
        )
    return list(found)


def draw_schedule(schedule: Schedule | Circulation) -> Figure:
    """A pipeline's schedule over time, a line for each rank; what is blank is the bubble.

    Training: F blue, B orange (twice as long), numbered by microbatch and the darker the later the chunk. Generation: the ticks
    numbered by group of rows. Raises TypeError for what is no schedule, ValueError for one of more pieces than can be seen.
    """
    from matplotlib import colormaps

    if not isinstance(schedule, Schedule | Circulation):
        raise TypeError(f'{schedule!r} is no schedule; draw one such as Schedule("1f1b", ranks=4, microbatches=8)')
    blues, oranges = colormaps["Blues"], colormaps["Oranges"]
    bars: list[Bar] = []
    if isinstance(schedule, Circulation):
        groups, ticks = schedule.groups, schedule.ranks - 1 + 3 * schedule.ranks
        for tick, rank in itertools.product(range(ticks), range(schedule.ranks)):
            if (group := schedule.group(tick, rank)) is not None:
                bars.append((rank, tick, 1.0, blues(0.3 + 0.45 * group / max(groups - 1, 1)), group))
        rows = f"{groups} group{'s' * (groups > 1)} of rows"
        title = f"generation, {rows} on {schedule.ranks} stages: {schedule.idle:.0%} idle in the steady state"
        return _timeline(bars, schedule.ranks, float(ticks), title, "ticks")
    v, start = schedule.chunks, 0.0
    pieces = schedule.ranks * schedule.microbatches * v
    if pieces > PIECES:
        raise ValueError(f"{pieces:,} pieces of work each way are too many to see; draw fewer ranks or microbatches")
    for tick, kind in enumerate(schedule.kinds):
        for part in kind:
            width = (1.0 if part == "F" else 2.0) / v
            for rank in range(schedule.ranks):
                work = schedule.forward(tick, rank) if part == "F" else schedule.backward(tick, rank)
                if work is not None:
                    colour = (blues if part == "F" else oranges)(0.35 + 0.45 * work.chunk / max(v - 1, 1))
                    bars.append((rank, start, width, colour, work.microbatch))
            start += width
    chunks = f", {v} chunks a rank" if v > 1 else ""
    held = "" if schedule.name == "forward" else f", {schedule.in_flight(0)} inputs held on rank 0"
    title = f"{schedule.name}, {schedule.microbatches} microbatches{chunks}: bubble {schedule.bubble:.0%}{held}"
    return _timeline(bars, schedule.ranks, schedule.time(), title, "time (F of a microbatch = 1)")


def draw_context(ranks: int) -> Figure:
    """How rows lie over so many ranks of cp, which are numbers and colours: the chunks of a row in training, which of them
    attends to which, what keys a ring has brought where, and a cache's slots in generation.

    Raises ValueError for fewer than 2 or more than 16.
    """
    import matplotlib.pyplot as plt

    if not 2 <= ranks <= CONTEXT_RANKS:
        raise ValueError(f"ranks={ranks} must be in [2, {CONTEXT_RANKS}]: rows over so many can be drawn")
    chunks = Context(ranks).order(2 * ranks).reshape(ranks, 2).tolist()
    of = {chunk: rank for rank, mine in enumerate(chunks) for chunk in mine}
    side = 1.6 + 0.3 * ranks
    figure, axes = plt.subplots(1, 4, figsize=(4 * side, side + 0.5), layout="constrained")
    row, pairs, ring, cache = axes
    plain, zigzag = (_busiest(part) for part in ([[2 * r, 2 * r + 1] for r in range(ranks)], chunks))
    row.set_title(f"training: the chunks of each rank\nbusiest / mean {zigzag:.2f}; in a row's order {plain:.2f}", fontsize=9)
    _cells(row, {(chunk, rank): rank for chunk, rank in of.items()}, ranks, "chunk of the row", "rank")
    pairs.set_title("which chunks see which keys\n(the diagonal in part)", fontsize=9)
    seen = {(key, query): of[query] for query in of for key in range(query + 1)}
    _cells(pairs, seen, ranks, "chunk of keys", "chunk of queries", faint=lambda key, query: key == query)
    ring.set_title("a ring: whose keys each rank has\nwhile the next ones come", fontsize=9)
    hops = {(hop, rank): (rank - hop) % ranks for hop in range(ranks) for rank in range(ranks)}
    _cells(ring, hops, ranks, "hop", "rank")
    cache.set_title("generation: slots of a row's cache\n(numbers: its tokens)", fontsize=9)
    slots = range(min(4, 2 * ranks))
    tokens = {(slot, rank): slot * ranks + rank for slot in slots for rank in range(ranks)}
    _cells(cache, tokens, ranks, "slot of each rank", "rank")
    plt.close(figure)
    return figure


def _busiest(parts: Sequence[Sequence[int]]) -> float:
    """The work of the busiest rank over the mean, where ranks have these chunks: what a chunk sees, half of itself."""
    work = [sum(chunk + 0.5 for chunk in mine) for mine in parts]
    return max(work) * len(work) / sum(work)


def _cells(
    axes: Axes,
    cells: dict[tuple[int, int], int],
    ranks: int,
    across: str,
    down: str,
    *,
    faint: Callable[[int, int], bool] = lambda x, y: False,
) -> None:
    """A square at each (column, row), with its number, in the colour of that rank."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    shades, columns, rows = colormaps["tab20"], max(x for x, _ in cells), max(y for _, y in cells)
    for (x, y), number in cells.items():
        shade = shades(2 * (number % ranks) + 1 if ranks <= 10 else number % ranks)
        square = Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, facecolor=shade, edgecolor="white", linewidth=0.6)
        square.set_alpha(0.45 if faint(x, y) else 1.0)
        axes.add_patch(square)
        axes.text(x, y, str(number), ha="center", va="center", fontsize=7)
    axes.set(xlim=(-0.6, columns + 0.6), ylim=(rows + 0.6, -0.6), xlabel=across, ylabel=down, aspect="equal", anchor="N")
    step = 1 if max(columns, rows) < 16 else 4
    axes.set(xticks=range(0, columns + 1, step), yticks=range(0, rows + 1, step))
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def log_log(axes: Axes) -> None:
    """Both axes logarithmic, with plain numbers and a grid, and the legend beside them."""
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.3, lw=0.5)
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    aside(axes)


def plain_ticks(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis whose limits stand: 1, 2 and 5 of each decade; even steps of a short one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    each = (1,) if decades > 5 else (1, 2, 5)
    axis.set_major_locator(LogLocator(subs=each) if decades > 1.3 else MaxNLocator(7, steps=[1, 2, 5, 10]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def aside(axes: Axes) -> None:
    """The legend beside the picture, not over it; the frame open at the top and on the right."""
    handles, labels = axes.get_legend_handles_labels()
    columns = math.ceil(len(labels) / LEGEND)
    axes.legend(handles, labels, fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.02), ncols=columns)
    axes.spines[["top", "right"]].set_visible(False)


def _timeline(bars: Sequence[Bar], ranks: int, end: float, title: str, unit: str) -> Figure:
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    steps = len({(start, width) for _, start, width, _, _ in bars})
    figure, axes = plt.subplots(figsize=(min(4 + 0.22 * steps, 20), 0.9 + 0.32 * ranks), layout="constrained")
    for rank, start, width, colour, number in bars:
        axes.add_patch(Rectangle((start, rank - 0.46), width, 0.92, facecolor=colour, edgecolor="white", linewidth=0.6))
        if steps <= NUMBERED:
            axes.text(start + width / 2, rank, str(number), ha="center", va="center", fontsize=6)
    axes.set(xlim=(0, end), ylim=(ranks - 0.4, -0.6), yticks=range(ranks), xlabel=unit, ylabel="rank")
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    plt.close(figure)
    return figure


def _draw(axes: Axes, weight: Any, *, title: str) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    array, dims = weight.get_value(), weight.get_metadata()["dims"]
    holders: dict[tuple[float, float, float, float], list[int]] = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        spans = [(s.indices(n)[0] / n, s.indices(n)[1] / n) for s, n in zip(index, array.shape, strict=True)]
        (top, bottom), (left, right) = spans[0], spans[-1] if len(spans) > 1 else (0.0, 1.0)
        if dims[0] == "layers":  # each layer's first dim runs down within it
            top, bottom = (top + (bottom - top) * at for at in spans[1])
        holders.setdefault((left, top, right - left, bottom - top), []).append(device.id)
    colours = colormaps["Set3"]
    for i, ((x, y, width, height), devices) in enumerate(sorted(holders.items(), key=lambda item: (item[0][1], item[0][0]))):
        shade = "0.88" if len(holders) == 1 else colours(i % 12)
        axes.add_patch(Rectangle((x, y), width, height, facecolor=shade, edgecolor="white", linewidth=1))
        if len(holders) <= LABELS:
            text = _ranges(sorted(devices))
            axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8, rotation=90 * (width < height))
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    first, last = f"{dims[0]} {array.shape[0]}", f"{dims[-1]} {array.shape[-1]}" if len(dims) > 1 else ""
    axes.set_title(f"{title}\n{'replicated' if len(holders) == 1 else f'in {len(holders)} blocks'}", fontsize=9)
    axes.set_ylabel(first, fontsize=8)
    axes.set_xlabel(last, fontsize=8)


def _ranges(ids: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
