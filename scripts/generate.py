"""Generates on every GPU of this machine, by the Python API: what a pod runs first.

    python scripts/generate.py org/name --prompt "Once upon a time" "The sea"
    python scripts/generate.py llama-3.1-8b --dummy --batch 64      # a preset's shape with random weights: a speed test

The model is split over as many GPUs as its heads and widths allow (or --tp); what is left over holds further copies, each
with a share of the batch (or --dp). `jaxtp generate` has every other flag.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
import tyro

from jaxtp import LLM, SamplingParams, preset, use_virtual_devices
from jaxtp.audit import audit, compile_decode
from jaxtp.checkpoint import hf
from jaxtp.config.quantization import Quantization


@dataclass(frozen=True)
class Args:
    """What to generate, and on what."""

    model: tyro.conf.Positional[str]
    """Checkpoint folder, hub id, or with --dummy the name of a preset."""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]")] = ("Once upon a time",)
    max_tokens: int = 128
    temperature: float = 0.0
    tp: int | None = None
    pp: int = 1
    """Stages that the layers are split into."""
    dp: int | None = None
    dummy: bool = False
    batch: int = 1
    """With --dummy: how many prompts of 128 random tokens."""
    dtype: str = "auto"
    quantization: Quantization | None = None
    audit: bool = False
    """Also print what a decode step communicates."""
    virtual_devices: int | None = None
    """CPU devices, on a machine without GPUs."""


def main(args: Args) -> None:
    """Loads, generates, prints."""
    if args.virtual_devices:
        use_virtual_devices(args.virtual_devices)
    devices = len(jax.devices())
    config = preset(args.model) if args.dummy else hf.config_of(hf.resolve(args.model))
    if devices % args.pp:
        raise SystemExit(f"--pp {args.pp} does not divide {devices} devices")
    tp = args.tp or max(size for size in config.legal_tp(devices) if devices % (size * args.pp) == 0)
    dp = args.dp or devices // (tp * args.pp)
    load_format = "dummy" if args.dummy else "auto"
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": args.pp, "data_parallel_size": dp}
    llm = LLM(args.model, **sizes, dtype=args.dtype, quantization=args.quantization, load_format=load_format)
    prompts = [[(7 * i + j) % config.vocab_size for j in range(128)] for i in range(args.batch)] if args.dummy else args.prompt
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, ignore_eos=args.dummy)
    if args.dummy:
        llm.generate(prompts, params)  # compiles; the log of the next call says how fast it is
    for request in llm.generate(prompts, params):
        if not args.dummy:
            print(f"{request.prompt}{request.outputs[0].text}\n")
    if args.audit:
        compiled = compile_decode(llm.model, batch=len(prompts), slots=1024)
        print(audit(compiled, llm.model.layout.mesh, name="one decode step"))


if __name__ == "__main__":
    main(tyro.cli(Args))
