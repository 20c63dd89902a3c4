"""Draws the pictures of parallelism.md: python docs/pictures.py."""

from pathlib import Path

from jaxtp import Circulation, Llama, Schedule, draw_schedule, draw_shardings, make_mesh, preset, use_virtual_devices

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
        "circulation": draw_schedule(Circulation.decode(4, 4)),
    }
    for name, figure in figures.items():
        figure.savefig(FOLDER / f"{name}.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
