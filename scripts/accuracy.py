"""What rounding costs: nats a token and greedy texts of a model with its weights, or its cache, in few bits.

    python scripts/accuracy.py demo --text tinyshakespeare.txt [--markdown]
    python scripts/accuracy.py FOLDER                     # on texts that the model in float32 samples itself

Prints a row for each scheme: nats a token on the last tenth of the text, through the cache; the mean divergence (KL) of what it
says of a next token from what float32 says; and how many of eight greedy texts of 60 tokens stay as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxtp import LLM, Llama, SamplingParams, use_virtual_devices
from jaxtp.checkpoint.hf import resolve
from jaxtp.text import Tokenizer

LENGTH, ROWS, BATCHES = 256, 16, 4
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("float32", {}),
    ("weights int8", {"quantization": "int8"}),
    ("weights fp8", {"quantization": "fp8"}),
    ("weights int4", {"quantization": "int4"}),
    ("cache int8", {"kv_cache_dtype": "int8"}),
    ("cache fp8", {"kv_cache_dtype": "fp8"}),
    ("all-reduces int8, tp 4", {"tensor_parallel_size": 4, "compress_all_reduce": "int8"}),
    ("weights int8, cache int8", {"quantization": "int8", "kv_cache_dtype": "int8"}),
]


def windows(folder: Path, text: Path | None) -> np.ndarray:
    """[n, LENGTH + 1] ids."""
    tokenizer, count = Tokenizer(folder), ROWS * BATCHES
    if text is None:
        llm = LLM(folder, dtype="float32", progress=False)
        params = SamplingParams(temperature=1.0, max_tokens=LENGTH + 1, ignore_eos=True, seed=0)
        made = llm.generate([""] * count, [SamplingParams(**{**vars_of(params), "seed": i}) for i in range(count)])
        return np.array([request.outputs[0].token_ids for request in made], np.int32)
    ids = np.array(tokenizer.encode(text.read_text(), add_special_tokens=False), np.int32)
    held = ids[round(len(ids) * 0.9) :]
    return np.stack([held[i * LENGTH : i * LENGTH + LENGTH + 1] for i in range(count)])


def vars_of(params: SamplingParams) -> dict[str, Any]:
    """The fields of sampling parameters that are set here."""
    return {name: getattr(params, name) for name in ("temperature", "max_tokens", "ignore_eos", "seed")}


def logprobs(model: Llama, rows: np.ndarray) -> np.ndarray:
    """[n, LENGTH, V] of what comes next, each token seen through the cache."""
    positions = np.arange(LENGTH, dtype=np.int32)[None].repeat(ROWS, 0)
    begin = jax.jit(lambda: model.empty_cache(ROWS, LENGTH).zeros())
    found = []
    for start in range(0, len(rows), ROWS):
        with jax.set_mesh(model.layout.mesh):
            cache = begin()
        logits = np.asarray(model(rows[start : start + ROWS, :-1], positions, cache=cache)[0], np.float64)
        top = logits.max(-1, keepdims=True)
        found.append(logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)))
    return np.concatenate(found)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    use_virtual_devices(4)
    folder = resolve(args.model)
    rows = windows(folder, args.text)
    prompts = [row[:16].tolist() for row in rows[:8]]
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    exact: np.ndarray | None = None
    texts: list[list[int]] = []
    cells = []
    for name, options in KINDS:
        llm = LLM(folder, dtype="float32", max_num_seqs=8, progress=False, **options)
        made = [request.outputs[0].token_ids for request in llm.generate(prompts, params)]
        own = logprobs(llm.model, rows)
        nats = -np.take_along_axis(own, rows[:, 1:, None], -1).mean()
        if exact is None:
            exact, texts = own, made
        kl = (np.exp(exact) * (exact - own)).sum(-1).mean()
        same = sum(a == b for a, b in zip(texts, made, strict=True))
        cells.append([name, f"{nats:.4f}", f"{max(kl, 0):.1e}" if options else "-", f"{same} of {len(texts)}"])
        del llm
    titles = [f"{args.model}: in few bits", "nats a token", "KL", "greedy texts unchanged"]
    if args.markdown:
        print("\n".join(f"| {' | '.join(row)} |" for row in [titles, ["---"] * 4, *cells]))
        return
    table = Table(*titles)
    for row in cells:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
