"""What a training step takes of each device's memory, by formula (AdamW; attention that keeps no scores)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtp.model.stacked import BLOCK
from jaxtp.train.loss import CHUNK
from jaxtp.train.step import Trainer


@dataclass(frozen=True)
class StepMemory:
    """Bytes on each device. state: between steps. working: weights in the computing dtype and gradients. activations: kept
    of all layers for the backward pass. logits: of a chunk.
    """

    state: float
    working: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """The peak."""
        return self.state + self.working + self.activations + self.logits


def step_memory(trainer: Trainer, *, rows: int, length: int, accumulate: int = 1) -> StepMemory:
    """For microbatches of `rows` rows of `length` tokens, counted over all devices; `accumulate` of them a step.

    All weights are trained (no adapters), and no pipeline. Against the compiler's figures for H200s: BENCHMARKS.md.
    """
    if trainer.pipeline:
        raise ValueError("step_memory knows no pipelines; compile the step and ask its memory_analysis()")
    config, layout, zero = trainer.stacked.config, trainer.stacked.layout, trainer.zero
    dp, tp, size = layout.mesh.shape["dp"], layout.mesh.shape["tp"], layout.dtype.itemsize
    held = {path: math.prod(s.shape) / (tp if "tp" in s.spec.partitions else 1) for path, s in trainer.specs.items()}
    everything, blocks = sum(held.values()), sum(n for path, n in held.items() if path.startswith(BLOCK))
    working = 2 * size * everything
    if zero == 3:  # the blocks' in shares, one layer of them whole; the tables whole, their gradients in float32 as well
        tables = everything - blocks
        working = 2 * size * (tables + blocks / config.num_layers) + 4 * tables + size * blocks / dp
    if accumulate > 1:
        working += 4 * everything / (dp if zero >= 2 else 1)  # the sums, in float32
    tokens = rows / dp * length
    # the residual stream and its norms are whole on every tp device, but for sequence parallelism
    stream = tokens * config.hidden_size / layout.parts("sequence")
    heads = config.num_heads * config.head_dim
    qkv = tokens * (heads + 2 * max(config.num_kv_heads, tp) * config.head_dim) / tp
    out = tokens * (heads + 4 / size * config.num_heads) / tp  # with the logarithm of the softmax's sum, in float32
    mlp = tokens * config.intermediate_size / tp
    kept = {
        "none": 4 * stream + qkv + out + 3 * mlp,
        "save-dots": 2 * stream + qkv + out + 2 * mlp,
        "save-attention": stream + out,
        "full": stream,
    }[trainer.remat]
    return StepMemory(
        state=12 * everything / (dp if zero else 1),
        working=working,
        activations=size * config.num_layers * kept,
        logits=4 * rows / dp * min(CHUNK, length) * config.vocab_size / tp,
    )
