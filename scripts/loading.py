"""What a start and loading cost: seconds from a process's start to the first token, beside transformers (if it is there);
then the time of loading, and host memory beyond the weights themselves.

    python scripts/loading.py --start                      # the first table alone, of the model that ships
    python scripts/loading.py                              # also a checkpoint of 2.2 GB with random weights, on 1 and 4 devices
    python scripts/loading.py --model path/to/checkpoint --tp 8

Every measurement is a process of its own. On CPU devices the weights are host memory too, so they are taken off the peak.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
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
    start: bool = False
    """Only the start of the model that ships."""
    repeats: int = 5
    """How often each start is measured; the median counts."""


def main(args: Args) -> None:
    """Measures and prints."""
    starts(args.repeats)
    if not args.start:
        loads(args)


def starts(repeats: int) -> None:
    """From the start of a process to the demo's first token, in turns, so that all see the same machine."""
    demo = Path(importlib.util.find_spec("jaxtp").origin).parent / "demo"  # type: ignore[union-attr,arg-type]
    command = [sys.executable, "-m", "jaxtp", "generate", "--prompt", "ROMEO:", "--max-tokens", "1"]
    python = [sys.executable, __file__, "--task", json.dumps({"what": "jaxtp_token", "folder": str(demo), "devices": 0})]
    other = [sys.executable, __file__, "--task", json.dumps({"what": "transformers_token", "folder": str(demo), "devices": 0})]
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(repeats):
            caches = {"cold": f"{scratch}/{i}", "warm": f"{scratch}/{i}"}  # the second finds what the first has compiled
            for state, cache in caches.items():
                seconds.setdefault(f"jaxtp generate, {state}", []).append(until_output(command, f"{cache}/command"))
                seconds.setdefault(f"jaxtp.LLM, {state}", []).append(until_output(python, f"{cache}/python"))
            if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
                seconds.setdefault("transformers", []).append(until_output(other, scratch))
    table = Table(title=f"from a process's start to the first token of the model that ships, seconds, {repeats} times each")
    for column in ("", "median", "least", "most", "of transformers'"):
        table.add_column(column, justify="left" if not column else "right")
    theirs = statistics.median(seconds["transformers"]) if "transformers" in seconds else None
    for name, found in seconds.items():
        median = statistics.median(found)
        share = f"{median / theirs:.2f}" if theirs else "not installed"
        table.add_row(name, f"{median:.2f}", f"{min(found):.2f}", f"{max(found):.2f}", share)
    Console(width=140).print(table)


def until_output(command: list[str], cache: str) -> float:
    """Seconds from the start of a process to the first line that it prints; `cache` is the user's cache folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMP", "JAXTP_COMP"))}
    environment |= {"XDG_CACHE_HOME": cache, "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        took = time.perf_counter() - start
        process.stdout.read()
    if not line or process.returncode:
        raise RuntimeError(f"{' '.join(command)} printed nothing, or failed (code {process.returncode})")
    return took


def loads(args: Args) -> None:
    """Loading a checkpoint, on each number of devices."""
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
    environment = {**os.environ, **({"JAX_COMPILATION_CACHE_DIR": cache} if cache else {"JAXTP_COMPILATION_CACHE": "0"})}
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


def jaxtp_token(folder: str, **_: object) -> dict:
    """The first token by the library."""
    import jaxtp

    llm = jaxtp.LLM(folder, progress=False)
    print(llm.generate("ROMEO:", jaxtp.SamplingParams(temperature=0, max_tokens=1))[0].outputs[0].token_ids, flush=True)
    return {}


def transformers_token(folder: str, **_: object) -> dict:
    """The same by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    made = model.generate(**tokenizer("ROMEO:", return_tensors="pt"), do_sample=False, max_new_tokens=1)
    print(made[0, -1:].tolist(), flush=True)
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
        tasks = (write, load, first_token, jaxtp_token, transformers_token)
        print(json.dumps(next(do for do in tasks if do.__name__ == task["what"])(**task)))
    else:
        main(tyro.cli(Args))
