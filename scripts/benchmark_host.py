"""What the host does for a step of the engine, in microseconds: who runs, the plan, its dispatch.

    python scripts/benchmark_host.py                 # rows 1, 32 and 256

The device works meanwhile, so this is hidden wherever a step takes longer. Dispatch is that of the demo on this machine's first
device; the other two know nothing of a device. Medians of `--steps` steps.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from jaxtp import LLM, SamplingParams


@dataclass(frozen=True)
class Args:
    """What to measure."""

    rows: tuple[int, ...] = (1, 32, 256)
    steps: int = 100


def main(args: Args) -> None:
    """Measures and prints."""
    table = Table(title="µs a step on the host")
    for column in ("rows", "who runs", "the plan", "dispatch", "together"):
        table.add_column(column, justify="right")
    for rows in args.rows:
        times = measure(rows, args.steps)
        table.add_row(str(rows), *(f"{1e6 * t:.0f}" for t in (*times, sum(times))))
    Console().print(table)


def measure(rows: int, steps: int) -> list[float]:
    """Seconds of each part, with so many rows that all make a token."""
    llm = LLM("demo", max_num_seqs=rows, max_model_len=steps + 200, progress=False)
    engine = llm.engine
    for i in range(rows):
        engine.submit([5 + i % 50] * 8, SamplingParams(temperature=0, max_tokens=steps + 150, ignore_eos=True), stream=True)
    while any(s.prefilling for s in engine.scheduler.running[0]) or engine.scheduler.waiting:
        engine.step()
    found = []
    parts = (engine.scheduler, "schedule"), (engine, "_plan"), (engine, "_dispatch")
    for at, name in parts:
        setattr(at, name, timed(getattr(at, name), clock := []))
        found.append(clock)
    for _ in range(steps):
        engine.step()
    return [float(np.median(clock[10:])) for clock in found]


def timed(function, clock: list[float]):
    """The function, its seconds noted."""

    def run(*args, **more):
        start = time.perf_counter()
        out = function(*args, **more)
        clock.append(time.perf_counter() - start)
        return out

    return run


if __name__ == "__main__":
    main(tyro.cli(Args))
