"""Speed beside transformers: the same shape, dtype and machine, in one run, as ratios.

    python scripts/benchmark.py                                    # a 254M model on the CPU, the same random weights
    python scripts/benchmark.py --preset llama-3.1-8b --dtypes bfloat16 \\
        --cells decode-1 decode-8 decode-64 prefill-2048 prefill-8192     # on a GPU; random weights on either side
    python scripts/benchmark.py --hidden 512 --layers 8 --heads 8 --kv-heads 4 --experts 32 --mlp 256 \
        --cells prefill-512 decode-1 decode-8 decode-32                   # a mixture of experts, as Qwen3's

Each cell is the best of `--repeats` runs of either side, in turns. Compilation is reported apart. transformers runs as its
users run it: as it comes on a CPU; on a GPU with its static cache, which compiles its decode step; with experts by the fastest
of its implementations, cell by cell. "of peak" sets the achieved bandwidth (decode: weights and cache read in a step) or
arithmetic (prefill) against what a plain copy or a plain matrix product reaches on the same device in the same run.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

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
    "prefill-2048": Cell(1, 2048, 0),
    "prefill-8192": Cell(1, 8192, 0),
    "decode-1": Cell(1, 32, 64),
    "decode-8": Cell(8, 32, 64),
    "decode-32": Cell(32, 32, 64),
    "decode-64": Cell(64, 32, 64),
    "decode-1-after-1024": Cell(1, 1024, 64),
}


@dataclass(frozen=True)
class Args:
    """What to measure."""

    preset: str | None = None
    """A model's shape by name; default: the sizes below."""
    hidden: int = 1024
    mlp: int = 2816
    layers: int = 16
    heads: int = 16
    kv_heads: int = 8
    vocab: int = 32000
    experts: int = 0
    """In place of each layer's MLP, each as wide as `mlp`; 0: there are none."""
    experts_per_tok: int = 4
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    cells: tuple[str, ...] = ("prefill-512", "decode-1", "decode-8", "decode-32", "decode-1-after-1024")
    repeats: int = 3
    json: Path | None = None
    """Write the results there too."""


def main(args: Args) -> None:
    """Measures every cell and prints the table."""
    # both libraries live on one GPU: JAX takes half of it, not three quarters
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.5")
    import torch
    import transformers

    from jaxtp.audit.rates import copy_rate, product_rate

    torch.manual_seed(0)
    rows, config = [], shape(args)
    with tempfile.TemporaryDirectory() as folder:
        if args.preset is None:  # small: the same weights
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for dtype in args.dtypes:
            theirs, ours = Theirs(config, dtype, None if args.preset else folder), Ours(args.preset or folder, dtype)
            copy, product = copy_rate(), product_rate(dtype)
            print(f"{dtype}: a copy reaches {copy / 1e9:.0f} GB/s, a matrix product {product / 1e12:.2f} TFLOP/s", flush=True)
            for name in args.cells:
                cell = CELLS[name]
                prompts = np.random.default_rng(0).integers(0, config.vocab_size, (cell.batch, cell.prompt))
                compiled = ours.llm.programs.compile_seconds
                ours.run(cell, prompts)
                compiled = ours.llm.programs.compile_seconds - compiled
                theirs.run(cell, prompts)
                # in turns, so that a machine that slows down slows both
                pairs = [(ours.run(cell, prompts), theirs.run(cell, prompts)) for _ in range(args.repeats)]
                mine, other = min(p[0] for p in pairs), min(p[1] for p in pairs)
                of_peak = ours.bytes(cell) * cell.new / mine / copy if cell.new else ours.flops(cell) / mine / product
                row = {"cell": name, "dtype": dtype, "jaxtp": mine, "transformers": other, "of_peak": of_peak}
                rows.append({**row, "compile": compiled, **asdict(cell)})
                print(f"{dtype} {name}: {other / mine:.2f} ({mine:.3f} and {other:.3f} s)", flush=True)
            del theirs, ours
            gc.collect()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    import jax

    versions = f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    print_table(rows, f"{device}, {versions}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


def shape(args: Args):
    """transformers' config of the shape."""
    import transformers

    if args.preset:
        import jaxtp

        found = {**jaxtp.preset(args.preset).to_hf(), "eos_token_id": None}
        return transformers.AutoConfig.for_model(**found)
    sizes = {
        "hidden_size": args.hidden,
        "intermediate_size": args.mlp,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "vocab_size": args.vocab,
        "max_position_embeddings": 4096,
        "eos_token_id": None,
    }
    if not args.experts:
        return transformers.LlamaConfig(**sizes)
    routed = {"num_experts": args.experts, "num_experts_per_tok": args.experts_per_tok, "moe_intermediate_size": args.mlp}
    return transformers.Qwen3MoeConfig(**sizes, **routed, norm_topk_prob=True, head_dim=args.hidden // args.heads)


class Ours:
    """jaxtp on the first device."""

    def __init__(self, model: str, dtype: str) -> None:
        import jaxtp

        load_format = "dummy" if model in jaxtp.PRESETS else "auto"
        options = {"enable_prefix_caching": False, "progress": False}  # the same prompts come again
        self.llm = jaxtp.LLM(model, dtype=dtype, load_format=load_format, **options)

    def run(self, cell: Cell, prompts: np.ndarray) -> float:
        """Seconds of the prefill, or of the decode after it, at the rate of the steps that have rows alone."""
        from jaxtp import SamplingParams

        self.llm.generate(prompts.tolist(), SamplingParams(temperature=0, max_tokens=cell.new + 1, ignore_eos=True))
        timing = self.llm.timing
        return timing.decode / timing.tokens * cell.batch * cell.new if cell.new else timing.prefill

    def bytes(self, cell: Cell) -> int:
        """What a decode step must read: all weights but the embedding, and the filled part of the cache."""
        budget = self.llm.budget
        return budget.read_bytes + cell.batch * (cell.prompt + cell.new // 2) * budget.slot_bytes

    def flops(self, cell: Cell) -> int:
        """What a prefill must compute: two operations for each weight and token (the head for one), and causal attention."""
        config = self.llm.config
        table = config.vocab_size * config.hidden_size
        layers = config.num_active_params - table * (1 if config.tie_word_embeddings else 2)
        attention = 2 * config.num_layers * config.num_heads * config.head_dim * cell.prompt**2
        return cell.batch * (2 * layers * cell.prompt + attention + 2 * table)


class Theirs:
    """transformers, on the GPU where there is one."""

    def __init__(self, config, dtype: str, folder: str | None) -> None:
        import torch
        import transformers

        self.device, kind = ("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, dtype)
        if folder:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind).to(self.device)
        else:
            with torch.device(self.device):
                self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=kind).eval()
        self.options = {"cache_implementation": "static"} if self.device == "cuda" else {}
        self.forms = ("eager", "batched_mm", "grouped_mm") if getattr(config, "num_experts", 0) else ()

    def run(self, cell: Cell, prompts: np.ndarray) -> float:
        """Seconds of the prefill, or of the decode after it: greedy search as it comes, by its fastest experts."""
        if not self.forms:
            return self._run(cell, prompts)
        found = []
        for form in self.forms:
            self.model.set_experts_implementation(form)
            found.append(self._run(cell, prompts))
        return min(found)

    def _run(self, cell: Cell, prompts: np.ndarray) -> float:
        import torch

        ids = torch.tensor(prompts, device=self.device)

        def generate(new: int) -> float:
            start = time.perf_counter()
            with torch.inference_mode():
                made = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=False,
                    pad_token_id=0,
                    **self.options,
                )
            made.cpu()
            return time.perf_counter() - start

        return generate(cell.new + 1) - generate(1) if cell.new else generate(1)


def print_table(rows: list[dict], caption: str) -> None:
    """Tokens a second of both sides, and the ratio."""
    table = Table(title="jaxtp beside transformers (ratio above 1: jaxtp is faster)", caption=caption)
    for column in ("dtype", "cell"):
        table.add_column(column)
    for column in ("jaxtp tok/s", "transformers tok/s", "ratio", "jaxtp ms/step", "of peak", "compile s"):
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
            f"{row['of_peak']:.0%}",
            f"{row['compile']:.1f}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main(tyro.cli(Args))
