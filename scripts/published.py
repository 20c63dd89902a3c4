"""Published throughput, and what the planner predicts for it.

    python scripts/published.py            # the table of docs/planner.md
    python scripts/published.py --fit      # the efficiency of each GPU, fitted to all of its rows

Each row is predicted with the one efficiency factor of its GPU fitted to the other rows of that GPU; an H200's is 1, since the
rates were measured on one.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass

from jaxtp import preset
from jaxtp.planner import Generation, Plan, Split, Training, cluster
from jaxtp.planner.hardware import GPUS
from jaxtp.planner.search import Task


@dataclass(frozen=True)
class Row:
    """A figure: tokens a second (of training: of each GPU), by whom, of what."""

    source: str
    gpu: str
    model: str
    split: Split
    task: Task
    figure: float

    def predicted(self, efficiency: float) -> float:
        """The same by the planner."""
        nodes = -(-self.split.size // 8)
        gpus = cluster(f"{nodes}x{self.split.size // nodes}x{self.gpu}", known=KNOWN)
        gpus = dataclasses.replace(gpus, gpu=dataclasses.replace(gpus.gpu, efficiency=efficiency))
        plan = Plan(self.model, preset(self.model), gpus, self.split, self.task)
        if isinstance(self.task, Training):
            return plan.tokens_per_second / gpus.size
        return self.task.batch / plan.step.total


def training(source: str, gpu: str, model: str, split: Split, task: Training, *, mfu: float, peak: float = 989.0) -> Row:
    """From a utilisation, as these sources count it: 6 operations a weight, 12 a layer, channel and token that is attended to,
    the mask not taken off.
    """
    config = preset(model)
    weights = config.num_params - config.vocab_size * config.hidden_size
    flops = 6 * weights + 12 * config.num_layers * config.num_heads * config.head_dim * task.seq_len
    return Row(source, gpu, model, split, task, mfu * peak * 1e12 / flops)


# torchtitan's cards: 96 GB of slower memory, held to 500 of 700 W, and a peak that their owners do not know
SLOWER = dataclasses.replace(GPUS["H100"], name="H100-500W", gib=94.0, bandwidth=2400.0)
KNOWN = {**GPUS, SLOWER.name: SLOWER}
ALONE, SHORT = Generation(1, 128, 256), Generation(1, 5, 200)
FSDP = Split(dp=8, zero=3, remat="save-dots")
LEANER = dataclasses.replace(FSDP, dp=64, remat="save-attention")
MEGATRON = Split(dp=4, tp=2, zero=1, sequence_parallel=True, remat="save-attention", microbatches=16)
ROWS = [
    *(
        Row("gpt-fast", "A100-80", "llama-3.1-8b", Split(tp=tp), SHORT, figure)
        for tp, figure in ((1, 93.8), (2, 149.0), (4, 217.0), (8, 276.0))
    ),
    *(
        Row("gpt-fast", "A100-80", "llama-2-70b", Split(tp=tp), SHORT, figure)
        for tp, figure in ((2, 21.32), (4, 38.01), (8, 62.5))
    ),
    *(
        Row("gpt-fast", "A100-80", model, Split(tp=tp), dataclasses.replace(SHORT, quantization="int8"), figure)
        for model, tp, figure in (("llama-2-7b", 1, 155.58), ("llama-2-70b", 1, 19.13), ("llama-2-70b", 8, 80.44))
    ),
    *(
        Row("transformers' TP guide", "H100", "llama-3-70b", Split(tp=tp), ALONE, figure)
        for tp, figure in ((2, 45.0), (4, 85.0), (8, 140.0))
    ),
    Row("NIM", "H100", "llama-3.1-8b", Split(), ALONE, 1000 / 4.5),
    training("MaxText, FSDP", "H100", "llama-2-7b", FSDP, Training(16, 4096), mfu=495 / 989),
    Row("MaxText, FSDP", "H100", "llama-2-70b", LEANER, Training(128, 4096), 1036.0),
    training("Megatron-LM", "H100", "llama-3.1-8b", MEGATRON, Training(128, 4096), mfu=0.445),
    *(
        Row("torchtitan, FSDP", SLOWER.name, "llama-3.1-8b", dataclasses.replace(FSDP, dp=n), Training(2 * n, 8192), figure)
        for n, figure in ((8, 6667.0), (128, 6514.0))
    ),
    Row("single H200", "H200", "llama-2-7b", Split(remat="full", microbatches=4), Training(16, 4096), 10471.0),
    Row("vLLM's CI", "H200", "llama-3.1-8b", Split(), Generation(8, 32, 128), 8 / 6.5e-3),
]


def fitted(rows: list[Row]) -> float:
    """The efficiency with the least squares of the logarithms."""

    def error(efficiency: float) -> float:
        return sum(math.log(row.predicted(efficiency) / row.figure) ** 2 for row in rows)

    return min((percent / 100 for percent in range(40, 131)), key=error)


def table() -> list[tuple[Row, float, float]]:
    """(row, efficiency by the others, prediction)."""
    found = []
    for row in ROWS:
        others = [other for other in ROWS if other.gpu == row.gpu and other is not row]
        efficiency = 1.0 if row.gpu == "H200" else fitted(others)
        found.append((row, efficiency, row.predicted(efficiency)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    if parser.parse_args().fit:
        for gpu in sorted({row.gpu for row in ROWS} - {"H200"}):
            print(f"{gpu}: {fitted([row for row in ROWS if row.gpu == gpu]):.2f}")
        return
    print("| source | work | GPUs | published tok/s | predicted | ratio | efficiency by the other rows |")
    print("|---|---|---|---|---|---|---|")
    for row, efficiency, predicted in table():
        kind = "training" if isinstance(row.task, Training) else f"decode, batch {row.task.batch}"
        if isinstance(row.task, Generation) and row.task.quantization:
            kind = f"{row.task.quantization}, {kind}"
        gpus = f"{row.split.size}x{row.gpu}, {row.split.told()}"
        numbers = f"{row.figure:,.0f} | {predicted:,.0f} | {predicted / row.figure:.2f} | {efficiency:.2f}"
        print(f"| {row.source} | {row.model}, {kind} | {gpus} | {numbers} |")


if __name__ == "__main__":
    main()
