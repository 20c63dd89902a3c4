"""Speed beside transformers: the same random weights, dtype and machine, in one run, as ratios.

    python scripts/benchmark.py                        # the 254M shape of BENCHMARKS.md
    python scripts/benchmark.py --dtypes float32 --cells decode-1 decode-8

Each cell is the best of `--repeats` runs of either side, in turns. Compilation is reported apart.
"""

from __future__ import annotations

import gc
import json
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Cell:
    """One measurement: `batch` prompts of `prompt` tokens, then `new` tokens each (0: the prefill alone)."""

    batch: int
    prompt: int
    new: int


CELLS = {
    "prefill-512": Cell(1, 512, 0),
    "decode-1": Cell(1, 32, 64),
    "decode-8": Cell(8, 32, 64),
    "decode-32": Cell(32, 32, 64),
    "decode-1-after-1024": Cell(1, 1024, 64),
}


@dataclass(frozen=True)
class Args:
    """What to measure."""

    hidden: int = 1024
    mlp: int = 2816
    layers: int = 16
    heads: int = 16
    kv_heads: int = 8
    vocab: int = 32000
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    cells: tuple[str, ...] = tuple(CELLS)
    repeats: int = 3
    json: Path | None = None
    """Write the results there too."""


def main(args: Args) -> None:
    """Measures every cell and prints the table."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocab,
        max_position_embeddings=4096,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        for dtype in args.dtypes:
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
            ours = Ours(folder, dtype)
            for name in args.cells:
                cell = CELLS[name]
                prompts = np.random.default_rng(0).integers(0, args.vocab, (cell.batch, cell.prompt))
                compiled = ours.llm.programs.compile_seconds
                ours.run(cell, prompts)
                compiled = ours.llm.programs.compile_seconds - compiled
                run_theirs(theirs, cell, prompts)
                # in turns, so that a machine that slows down slows both
                pairs = [(ours.run(cell, prompts), run_theirs(theirs, cell, prompts)) for _ in range(args.repeats)]
                mine, other = min(p[0] for p in pairs), min(p[1] for p in pairs)
                rows.append(
                    {"cell": name, "dtype": dtype, "jaxtp": mine, "transformers": other, "compile": compiled, **asdict(cell)}
                )
                print(f"{dtype} {name}: {other / mine:.2f}", flush=True)
            del theirs, ours
            gc.collect()
    versions = f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    print_table(rows, f"{versions}, {platform.processor() or platform.machine()}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


class Ours:
    """jaxtp on the first device."""

    def __init__(self, folder: str, dtype: str) -> None:
        from jaxtp import LLM

        self.llm = LLM(folder, dtype=dtype, progress=False)

    def run(self, cell: Cell, prompts: np.ndarray) -> float:
        """Seconds of the prefill, or of the decode after it."""
        from jaxtp import SamplingParams
        from jaxtp.generate.batch import Batch

        params = SamplingParams(temperature=0, max_tokens=cell.new + 1, ignore_eos=True)
        _, rows = self.llm._requests_of(prompts.tolist(), params)
        batch = Batch(self.llm.model, self.llm.programs, rows, chunk_tokens=self.llm.max_num_batched_tokens)
        start = time.perf_counter()
        running = batch.run()
        next(running)
        if not cell.new:
            return time.perf_counter() - start
        start = time.perf_counter()
        for _ in running:
            pass
        return time.perf_counter() - start


def run_theirs(model, cell: Cell, prompts: np.ndarray) -> float:
    """The same in transformers, its cache and greedy search as they come."""
    import torch

    ids = torch.tensor(prompts)

    def generate(new: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - start

    return generate(cell.new + 1) - generate(1) if cell.new else generate(1)


def print_table(rows: list[dict], caption: str) -> None:
    """Tokens a second of both sides, and the ratio."""
    table = Table(title="jaxtp beside transformers (ratio above 1: jaxtp is faster)", caption=caption)
    for column in ("dtype", "cell"):
        table.add_column(column)
    for column in ("jaxtp tok/s", "transformers tok/s", "ratio", "jaxtp ms/step", "compile s"):
        table.add_column(column, justify="right")
    for row in rows:
        tokens = row["batch"] * (row["new"] or row["prompt"])
        steps = row["new"] or 1
        table.add_row(
            row["dtype"],
            row["cell"],
            f"{tokens / row['jaxtp']:.1f}",
            f"{tokens / row['transformers']:.1f}",
            f"{row['transformers'] / row['jaxtp']:.2f}",
            f"{1e3 * row['jaxtp'] / steps:.1f}",
            f"{row['compile']:.1f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Args))
