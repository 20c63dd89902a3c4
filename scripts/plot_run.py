"""Draws the curves of training runs from their logs.

python scripts/plot_run.py runs/demo            # writes runs/demo/curve.png
python scripts/plot_run.py docs/demo --out docs/demo/curve.png
python scripts/plot_run.py docs/demo docs/demo/experts-batch --out both.png    # side by side, and how experts are loaded
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import tyro
from matplotlib.axes import Axes

COLOURS = ("#c8553d", "#2f6690", "#588157", "#8d6a9f")


@dataclass(frozen=True)
class Args:
    """What to draw."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders with a log.jsonl, one or more."""
    out: Path | None = None
    """The picture; default curve.png in the first folder."""


def main(args: Args) -> None:
    """Draws."""
    logs = {folder: read(folder) for folder in args.folders}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", width_ratios=(2, 1))
    lines = [line for log in logs.values() for line in log]
    per_character = any("validation_nats_per_character" in line for line in lines)
    held = "validation_nats_per_character" if per_character else "validation_nats"
    routed = any("expert_max_over_mean" in line for line in lines)
    alone = len(logs) == 1
    for (folder, log), colour in zip(logs.items(), itertools.cycle(COLOURS), strict=False):
        if alone:
            curve(left, log, "nats", "-", color="#9aa7b8", label="training")
        curve(left, log, held, "o-", color=colour, label="validation" if alone else folder.name, markersize=4)
        if routed:
            curve(right, log, "expert_max_over_mean", "-", color=colour)
        else:
            curve(right, log, "learning_rate", "-", color="#7fc0a5" if alone else colour)
    left.set(xlabel="step", ylabel="nats per character" if per_character else "nats per token")
    left.legend(frameon=False)
    right.set(xlabel="step", ylabel="busiest expert over the mean" if routed else "learning rate")
    for at in (left, right):
        at.spines[["top", "right"]].set_visible(False)
    out = args.out or args.folders[0] / "curve.png"
    figure.savefig(out, dpi=110)
    print(out)


def read(folder: Path) -> list[dict]:
    """The lines of its log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def curve(at: Axes, log: list[dict], key: str, style: str, **look) -> None:
    """What a log has of something, over its steps."""
    points = [(line["step"], line[key]) for line in log if key in line]
    if points:
        at.plot(*zip(*points, strict=True), style, **look)


if __name__ == "__main__":
    main(tyro.cli(Args))
