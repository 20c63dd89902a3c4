"""Training steps on rows in parts over cp beside the same rows whole on dp: as many tokens, the same devices, as ratios.

    python scripts/benchmark_context.py --virtual-devices 2               # h 256, 4 layers, two rows of 2048 tokens
    python scripts/benchmark_context.py --devices 8 --hidden 4096 --mlp 14336 --heads 32 --kv-heads 8 --layers 4 \\
        --vocab 128256 --batch 8 --length 32768 --dtypes bfloat16 --remat save-attention

Both sides take turns, after a turn that does not count; the best of each counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from benchmark_train import Args, Ours, warm
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Shape(Args):
    """What to measure."""

    hidden: int = 256
    mlp: int = 704
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    vocab: int = 1024
    batch: int = 2
    length: int = 2048
    devices: int = 2
    """Of either axis; the batch must be a multiple of them."""
    virtual_devices: int | None = None
    """Run on this many virtual CPU devices."""


def main(args: Shape) -> None:
    """Measures and prints."""
    from jaxtp import use_virtual_devices

    if args.virtual_devices is not None:
        use_virtual_devices(args.virtual_devices)
    table = Table(title=f"{args.batch} rows of {args.length} tokens on {args.devices} devices (ratio above 1: cp is slower)")
    for column in ("dtype", "dp, ms a step", "cp, ms a step", "ratio"):
        table.add_column(column, justify="right")
    for dtype in args.dtypes:
        sides = [Ours(args, dtype, **{axis: args.devices}) for axis in ("dp", "cp")]
        best = [float("inf")] * 2
        for _ in range(args.rounds):
            best = [min(so_far, warm(side, args.steps) / args.steps) for so_far, side in zip(best, sides, strict=True)]
        table.add_row(dtype, *(f"{1e3 * seconds:,.0f}" for seconds in best), f"{best[1] / best[0]:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Shape))
