"""`bench`: generation on random tokens of fixed lengths, timed."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.table import Table

from jaxtp import files
from jaxtp.audit.profile import profile
from jaxtp.audit.rates import copy_rate, product_rate
from jaxtp.generate import LLM, SamplingParams
from jaxtp.generate.auto import machine_of
from jaxtp.mesh import told
from jaxtp.planner import cost, hardware
from jaxtp.tables import Shown

PROFILED = 32  # decode steps, at most
# name in a record: what it is, its scale, whether less of it is better
METRICS = {
    "seconds": ("whole run, s", 1.0, True),
    "ttft": ("time to first token, ms", 1e3, True),
    "step": ("a token, ms", 1e3, True),
    "tokens_per_second": ("tokens/s made", 1.0, False),
    "total_tokens_per_second": ("tokens/s in and out", 1.0, False),
    "mbu": ("memory bandwidth used (MBU), %", 100.0, False),
    "mfu": ("operations used, prefill (MFU), %", 100.0, False),
    "communication": ("communication in a decode step, %", 100.0, True),
    "communication_prefill": ("communication in the prefill, %", 100.0, True),
    "compile_seconds": ("compiling, s", 1.0, True),
    "planned_step": ("planned: a token, ms", 1e3, True),
    "planned_communication": ("planned: communication, %", 100.0, True),
}


@dataclass(frozen=True, repr=False)
class Bench(Shown):
    """The figures of a run: settings, and metrics (seconds, shares of 1; see `METRICS`). before: another run."""

    settings: dict[str, Any]
    metrics: dict[str, float]
    before: Bench | None = None

    def table(self) -> Table:
        """A row for each figure; beside another run's, where there is one, the ratio (above 1: this one is better)."""
        told = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        if self.before is not None:
            others = [f"{name} {value}" for name, value in self.before.settings.items() if self.settings.get(name) != value]
            told += f"; before: {', '.join(others) or 'the same'}"
        table = Table(title=f"jaxtp bench {self.settings['kind']}", caption=told)
        table.add_column("figure")
        table.add_column("this run", justify="right")
        if self.before is not None:
            table.add_column("before", justify="right")
            table.add_column("better by", justify="right")
        for name, (what, scale, less) in METRICS.items():
            if name not in self.metrics:
                continue
            value = self.metrics[name]
            row = [what, f"{value * scale:,.2f}"]
            if self.before is not None:
                old = self.before.metrics.get(name)
                gain = 0.0 if not old or not value else old / value if less else value / old
                row += ["" if old is None else f"{old * scale:,.2f}", f"{gain:.2f}x" if gain else ""]
            table.add_row(*row)
        return table

    def save(self, path: Path) -> None:
        """Writes the figures as JSON."""
        path.write_text(json.dumps({"settings": self.settings, "metrics": self.metrics}, indent=1) + "\n")


def read(path: Path) -> Bench:
    """What `Bench.save` wrote. Raises FileNotFoundError, and ValueError for another file."""
    try:
        found = files.read_json(path)
        return Bench(dict(found["settings"]), dict(found["metrics"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no figures of jaxtp bench: {error!r}") from None


def measure(
    llm: LLM, *, kind: Literal["latency", "throughput"], prompts: int, input_len: int, output_len: int, iterations: int = 3
) -> Bench:
    """Times `iterations` runs of `prompts` prompts, after one that compiles; the fastest counts.

    The share of communication is that of a profile of one batch afterwards, on several devices.
    MBU: weights and cache that each device reads in a decode step; MFU: the prefill's operations. Both are of what the data
    sheet says of a GPU that `planner.hardware` knows, else of a copy and a product that are timed now. Raises ValueError for
    lengths that the model does not take.
    """
    if min(prompts, input_len, output_len, iterations) < 1 or input_len + output_len > llm.max_model_len:
        raise ValueError(
            f"{prompts} prompts, {input_len} + {output_len} tokens, {iterations} times: each must be at least 1, and the "
            f"tokens at most max_model_len={llm.max_model_len} together"
        )
    if kind == "latency" and prompts > llm.max_num_seqs:
        raise ValueError(f"{prompts} prompts do not run at once: max_num_seqs={llm.max_num_seqs}")
    config, mesh = llm.config, llm.model.layout.mesh
    rng = np.random.default_rng(0)

    def ids() -> list[list[int]]:
        """Others each time: the cache keeps what it has seen."""
        return rng.integers(0, config.vocab_size, (prompts, input_len)).tolist()

    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    compiling = llm.programs.compile_seconds
    llm.generate(ids(), params)
    compiling = llm.programs.compile_seconds - compiling
    best = float("inf")
    for _ in range(iterations):
        asked, start = ids(), time.perf_counter()
        llm.generate(asked, params)
        took = time.perf_counter() - start
        if took < best:
            best, timing = took, llm.timing
    peak, bandwidth = _limits(llm)
    weights = config.num_params - config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    flops = (2 * weights + 2 * config.num_layers * config.num_heads * config.head_dim * input_len) * timing.prompt_tokens
    metrics = {
        "seconds": best,
        "tokens_per_second": prompts * output_len / best,
        "total_tokens_per_second": prompts * (input_len + output_len) / best,
        "mfu": flops / timing.prefill / mesh.size / peak,
        "compile_seconds": compiling,
    }
    if kind == "latency":
        metrics["ttft"] = timing.prefill
    if timing.steps:
        metrics |= {"step": timing.decode / timing.steps * llm.model.stages, "mbu": timing.bytes / timing.decode / bandwidth}
    if mesh.size > 1 and output_len > 1:
        steps, rows = min(output_len - 1, PROFILED), min(prompts, llm.max_num_seqs)
        shares = profile(llm, batch=rows, input_len=input_len, steps=steps).communication
        metrics |= {"communication": shares["decode"], "communication_prefill": shares["prefill"]}
    metrics |= _planned(llm, prompts, input_len, output_len)
    settings = {
        "kind": kind,
        "model": Path(llm.model.source).name if llm.model.source else f"{config.num_params / 1e6:,.0f}M random weights",
        "prompts": prompts,
        "input_len": input_len,
        "output_len": output_len,
        "mesh": told(mesh.shape),
        "device": mesh.devices.flat[0].device_kind,
        "dtype": str(llm.model.layout.dtype) + f", {llm.model.quantization} weights" * bool(llm.model.quantization),
        "max_num_seqs": llm.max_num_seqs,
        "jax": jax.__version__,
    }
    return Bench(settings, metrics)


def _limits(llm: LLM) -> tuple[float, float]:
    """(operations, bytes) a second of each device."""
    gpu = hardware.of_device(llm.model.layout.mesh.devices.flat[0].device_kind)
    if gpu:
        return gpu.tflops * 1e12, gpu.bandwidth * 1e9
    shared = llm.model.layout.mesh.size  # virtual devices share the host
    return product_rate(str(llm.model.layout.dtype)) / shared, copy_rate() / shared


def _planned(llm: LLM, prompts: int, input_len: int, output_len: int) -> dict[str, float]:
    """What the planner says of it, on GPUs that it knows."""
    machine = machine_of(llm.model)
    if machine is None:
        return {}
    step = cost.decode(machine, machine.task(min(prompts, llm.max_num_seqs), input_len, output_len))
    return {"planned_step": step.total, "planned_communication": step.share("communication")}
