"""Draws the pictures of parallelism.md and of CONTRIBUTING.md: python docs/pictures.py."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from jaxtp import (
    Circulation,
    Llama,
    Schedule,
    draw_context,
    draw_schedule,
    draw_shardings,
    make_mesh,
    preset,
    use_virtual_devices,
)

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from imports import ROOMS, graph, room

FOLDER = Path(__file__).parent / "pictures"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    use_virtual_devices(8)
    model = Llama(preset("llama-3.2-1b"), mesh=make_mesh(dp=2, tp=4))
    names = ("attention.qkv", "attention.o", "mlp.gate_up", "mlp.down")
    figures = {
        "tp": draw_shardings(model, [f"layers.0.{name}" for name in names]),
        "gpipe": draw_schedule(Schedule("gpipe", 4, 8)),
        "1f1b": draw_schedule(Schedule("1f1b", 4, 8)),
        "interleaved": draw_schedule(Schedule("interleaved_1f1b", 4, 8, 2)),
        "context": draw_context(4),
        "circulation": draw_schedule(Circulation(4, 4)),
        "imports": draw_imports(),
    }
    for name, figure in figures.items():
        figure.savefig(FOLDER / f"{name}.png", dpi=100, metadata={"Software": None})


def draw_imports() -> Figure:
    """A row for each room, a dot for each one that it imports: all lie left of the diagonal."""
    pairs = {(room(module), room(name)) for module, names in graph().items() for name in names}
    at = [(ROOMS.index(b), ROOMS.index(a)) for a, b in pairs if a != b and "__init__" not in (a, b)]
    figure, axes = plt.subplots(figsize=(6, 5.5), layout="constrained")
    axes.plot([-0.5, len(ROOMS) - 0.5], [-0.5, len(ROOMS) - 0.5], color="0.8", lw=1)
    axes.scatter(*zip(*at, strict=True), color="#4a6fa5", s=28, zorder=2)
    axes.set(xticks=range(len(ROOMS)), yticks=range(len(ROOMS)), xlabel="imports", ylabel="room")
    axes.set_xticklabels(ROOMS, rotation=90, fontsize=8)
    axes.set_yticklabels(ROOMS, fontsize=8)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    plt.close(figure)
    return figure


if __name__ == "__main__":
    main()
