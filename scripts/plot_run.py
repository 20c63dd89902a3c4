"""Draws the curves of a training run from its log.

python scripts/plot_run.py runs/demo            # writes runs/demo/curve.png
python scripts/plot_run.py docs/demo --out docs/demo/curve.png
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import tyro


@dataclass(frozen=True)
class Args:
    """What to draw."""

    folder: tyro.conf.Positional[Path]
    """Folder with a log.jsonl."""
    out: Path | None = None
    """The picture; default curve.png in that folder."""


def main(args: Args) -> None:
    """Draws."""
    lines = [json.loads(line) for line in (args.folder / "log.jsonl").read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", width_ratios=(2, 1))
    per_character = any("validation_nats_per_character" in line for line in lines)
    held = "validation_nats_per_character" if per_character else "validation_nats"
    series = (("nats", "training", "#9aa7b8", "-"), (held, "validation", "#c8553d", "o-"))
    for key, label, colour, style in series:
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            left.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4)
    left.set(xlabel="step", ylabel="nats per character" if per_character else "nats per token")
    left.legend(frameon=False)
    rates = [(line["step"], line["learning_rate"]) for line in lines if "learning_rate" in line]
    right.plot(*zip(*rates, strict=True), color="#7fc0a5")
    right.set(xlabel="step", ylabel="learning rate")
    for at in (left, right):
        at.spines[["top", "right"]].set_visible(False)
    out = args.out or args.folder / "curve.png"
    figure.savefig(out, dpi=110)
    print(out)


if __name__ == "__main__":
    main(tyro.cli(Args))
