"""What the host does for a step of the engine, in microseconds: who runs, the plan, its dispatch.

    python scripts/benchmark_host.py                          # the demo; rows 1, 32 and 256
    python scripts/benchmark_host.py --preset llama-3.1-8b    # on a GPU, random weights in bfloat16

The device works meanwhile, so this is hidden wherever a step takes longer: "a step" is all of it, from one to the next, as
somebody sees it who reads along. Dispatch is that of this machine's first device; who runs and the plan know nothing of a
device. Medians of `--steps` steps.
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
    preset: str | None = None
    """A model's shape by name; default: the demo."""


def main(args: Args) -> None:
    """Measures and prints."""
    table = Table(title="µs a step on the host")
    for column in ("rows", "who runs", "the plan", "dispatch", "together", "a step"):
        table.add_column(column, justify="right")
    for rows in args.rows:
        *times, step = measure(rows, args.steps, args.preset)
        table.add_row(str(rows), *(f"{1e6 * t:.0f}" for t in (*times, sum(times), step)))
    Console().print(table)


def measure(rows: int, steps: int, preset: str | None) -> list[float]:
    """Seconds of each part and of all, with so many rows that all make a token."""
    options = {"dtype": "bfloat16", "load_format": "dummy"} if preset else {}
    llm = LLM(preset or "demo", max_num_seqs=rows, max_model_len=steps + 200, progress=False, **options)
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
    ends = []
    for _ in range(steps):
        engine.step()
        ends.append(time.perf_counter())
    return [float(np.median(clock[10:])) for clock in (*found, list(np.diff(ends)))]


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
