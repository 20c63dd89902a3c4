"""What the host does for a step of the engine, in microseconds: who runs, the plan, its dispatch.

    python scripts/benchmark_host.py                          # a model of one small layer; rows 1, 32 and 256
    python scripts/benchmark_host.py --preset llama-3.1-8b    # on a GPU, random weights in bfloat16

The device works meanwhile, so this is hidden wherever a step takes longer: "a step" is all of it, from one to the next, as
somebody sees it who reads along. Where the device is the same CPU, a larger model takes its cores and caches away, and the host
needs several times as long (`--preset`). Dispatch is that of this machine's first device; who runs and the plan know nothing of
a device. The host's times are what its thread computes; medians of `--steps` steps.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from jaxtp import LLM, SamplingParams

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class Args:
    """What to measure."""

    rows: tuple[int, ...] = (1, 32, 256)
    steps: int = 100
    preset: str | None = None
    """A model's shape by name; default: next to nothing."""


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
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SMALL))
        dtype = "bfloat16" if preset else "float32"
        options = {"dtype": dtype, "load_format": "dummy", "max_num_seqs": rows, "max_model_len": steps + 200}
        llm = LLM(preset or folder, progress=False, **options)
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
        start = time.thread_time()
        out = function(*args, **more)
        clock.append(time.thread_time() - start)
        return out

    return run


if __name__ == "__main__":
    main(tyro.cli(Args))
