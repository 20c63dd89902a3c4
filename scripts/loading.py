"""What loading costs: time, host memory beyond the weights themselves, and the way from a cold start to the first token.

    python scripts/loading.py                              # a checkpoint of 2.2 GB with random weights, on 1 and 4 devices
    python scripts/loading.py --model path/to/checkpoint --tp 8

Every measurement is a process of its own. On CPU devices the weights are host memory too, so they are taken off the peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Args:
    """What to load."""

    model: str | None = None
    """A checkpoint folder; default: random weights of --preset, written to a temporary folder."""
    preset: str = "tinyllama-1.1b"
    tp: tuple[int, ...] = (1, 4)
    virtual_devices: int | None = 8
    """CPU devices; 0 on a machine with GPUs."""


def main(args: Args) -> None:
    """Measures and prints."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or f"{scratch}/{args.preset}"
        if args.model is None:
            measure("write", folder, 1, args, cache=None)
        for tp in args.tp:
            loaded = measure("load", folder, tp, args, cache=None)
            cache = f"{scratch}/compiled-{tp}"
            cold, again = (measure("first_token", folder, tp, args, cache=cache) for _ in range(2))
            rows.append((tp, loaded, cold["seconds"], again["seconds"]))
    table = Table(title=f"loading {Path(folder).name}, {rows[0][1]['weights'] / 1e9:.2f} GB of weights")
    for column in ("tp", "load s", "GB/s", "largest block MB", "host memory beyond weights, peak MB"):
        table.add_column(column, justify="right")
    table.add_column("start to first token s: cold", justify="right")
    table.add_column("with a compilation cache", justify="right")
    for tp, loaded, cold, again in rows:
        rate, block, beyond = loaded["weights"] / loaded["seconds"] / 1e9, loaded["block"] / 1e6, loaded["beyond"] / 1e6
        cells = (f"{loaded['seconds']:.1f}", f"{rate:.2f}", f"{block:.0f}", f"{beyond:.0f}", f"{cold:.1f}", f"{again:.1f}")
        table.add_row(str(tp), *cells)
    Console(width=140).print(table)


def measure(what: str, folder: str, tp: int, args: Args, *, cache: str | None) -> dict:
    """Runs one of the functions below in a fresh process, and times that from its start."""
    start = time.perf_counter()
    task = {"what": what, "folder": folder, "tp": tp, "preset": args.preset, "devices": args.virtual_devices}
    environment = {**os.environ, **({"JAX_COMPILATION_CACHE_DIR": cache} if cache else {})}
    done = subprocess.run(
        [sys.executable, __file__, "--task", json.dumps(task)], stdout=subprocess.PIPE, check=True, env=environment
    )
    return {"seconds": time.perf_counter() - start, **json.loads(done.stdout.splitlines()[-1])}


def write(folder: str, preset: str, **_: object) -> dict:
    """Random weights of the preset, as a checkpoint."""
    import jaxtp

    config = jaxtp.preset(preset)
    jaxtp.Llama.random(config, dtype=config.dtype or "float32").save_pretrained(folder)
    return {}


def load(folder: str, tp: int, **_: object) -> dict:
    """Seconds and peak memory of loading alone; the backend is up before the clock starts."""
    import jax

    import jaxtp

    mesh = jaxtp.make_mesh(tp=tp)
    jax.block_until_ready(jax.device_put(0, mesh.devices.flat[0]))
    peak, ended, before = [0], threading.Event(), resident()

    def watch() -> None:
        while not ended.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = jaxtp.Llama.from_pretrained(folder, mesh=mesh, progress=False)
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    weights = jaxtp.describe(model).weights
    total = sum(weight.total_bytes for weight in weights)
    held = sum(weight.device_bytes for weight in weights) * tp if jax.default_backend() == "cpu" else 0
    block = max(weight.device_bytes for weight in weights)
    return {"seconds": seconds, "weights": total, "block": block, "beyond": peak[0] - before - held}


def first_token(folder: str, tp: int, **_: object) -> dict:
    """Loads and generates one token; the caller's clock started with the process."""
    import jaxtp

    llm = jaxtp.LLM(folder, tensor_parallel_size=tp, progress=False)
    llm.generate([[1, 2, 3]], jaxtp.SamplingParams(max_tokens=1))
    return {}


def resident() -> int:
    """Bytes of memory that this process owns (not those of mapped files, which the system may drop)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--task"]:
        task = json.loads(sys.argv[2])
        if task["devices"]:
            import jaxtp

            jaxtp.use_virtual_devices(task["devices"])
        print(json.dumps({"write": write, "load": load, "first_token": first_token}[task.pop("what")](**task)))
    else:
        main(tyro.cli(Args))
