"""Which form of weights for which GPU, from the planner's figures: the table of docs/quantisation.md.

    python scripts/formats.py

For each GPU and form: how many GPUs of a node hold Llama-3.1-70B and a request of 1,280 tokens, what a token takes them alone,
and how many tokens a second 64 requests make together.
"""

from __future__ import annotations

import dataclasses

from jaxtp.planner import plan

GPUS = ["RTX-4090", "L40S", "A100-80", "H100", "H200", "B200"]
FORMS: list[tuple[str, str, str | None]] = [
    ("16 bits", "llama-3.1-70b", None),
    ("int8 or fp8, a scale a channel", "llama-3.1-70b", "int8"),
    ("GPTQ, or int4 at load", "llama-3.1-70b-gptq", None),
    ("AWQ", "llama-3.1-70b-awq", None),
]
COUNTS = 1, 2, 4, 8


def cell(gpu: str, model: str, quantization: str | None) -> str:
    """The fewest GPUs that hold it, and what they do."""
    for count in COUNTS:
        try:
            found = plan(model, f"{count}x{gpu}", prompt_len=1024, output_len=256, quantization=quantization)  # type: ignore[arg-type]
        except ValueError:
            continue
        best = next((p for p in found.legal if p.split.tp == count), None)
        if best is None or not best.holds:
            continue
        many = dataclasses.replace(best, task=dataclasses.replace(best.task, batch=64))
        rate = f"{64 / many.step.total:,.0f} tok/s" if many.holds else "64 do not fit"
        return f"{count}: {1e3 * best.step.total:.1f} ms, {rate}"
    return "more than 8"


def main() -> None:
    """Prints it."""
    print("| Llama-3.1-70B | " + " | ".join(GPUS) + " |")
    print("|---" * (len(GPUS) + 1) + "|")
    for name, model, quantization in FORMS:
        print(f"| {name} | " + " | ".join(cell(gpu, model, quantization) for gpu in GPUS) + " |")


if __name__ == "__main__":
    main()
