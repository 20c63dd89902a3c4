"""The programs that a plan consists of, as they are compiled: what each holds, computes and sends, by formula."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtp import buckets
from jaxtp.config import ModelConfig
from jaxtp.planner import collectives, memory
from jaxtp.planner.collectives import Program
from jaxtp.planner.work import SIZES, Generation, Split, Task, Training


@dataclass(frozen=True)
class Predicted:
    """On each device: bytes of a program's arguments, and beside them; operations of its products; what it sends.

    Products: attention as if without a mask.
    """

    name: str
    arguments: float
    temporary: float
    flops: float
    sent: Program


def programs(config: ModelConfig, split: Split, task: Task) -> list[Predicted]:
    """Of generation the first prefill chunk and a decode step; of training the step."""
    if isinstance(task, Training):
        held = memory.training(config, split, task)
        sent = collectives.train(config, split, batch=task.batch, seq_len=task.seq_len, dtype=task.dtype)
        return [Predicted("step", held.arguments, held.temporary, _train_flops(config, split, task), sent)]
    return [_prefill(config, split, task), _decode(config, split, task)]


def _prefill(config: ModelConfig, split: Split, task: Generation) -> Predicted:
    size, tokens, group = SIZES[task.dtype], split.chunks_of(task)[0][1], split.group_rows(task.batch)
    rows, held = split.rows(task.batch) // split.dp, memory.params(config, split)
    slots = buckets.slots(tokens, max(task.total, tokens))
    cache = rows * slots * memory.slot(config, split, task.dtype)
    each = 2 * memory.products(config, split) + 4 * tokens * config.num_heads * config.head_dim // split.tp
    return Predicted(
        "prefill",
        memory.weights(config, split, task) - size * held.head + cache,  # the head comes after it
        memory.prefill_workspace(config, split, rows=group, tokens=tokens, size=size),
        each * rows * tokens * split.stages(config).slots,
        collectives.prefill(config, split, batch=task.batch, tokens=tokens, dtype=task.dtype),
    )


def _decode(config: ModelConfig, split: Split, task: Generation) -> Predicted:
    size, rows = SIZES[task.dtype], split.rows(task.batch) // split.dp
    each = 2 * memory.products(config, split) + 4 * task.slots * config.num_heads * config.head_dim // split.tp
    ticks = split.pp / split.groups(task.batch)  # in which each group's rows are taken through a stage
    head = 2 * config.hidden_size * math.ceil(config.vocab_size / (split.tp * split.pp))
    return Predicted(
        "decode",
        memory.weights(config, split, task) + rows * task.slots * memory.slot(config, split, task.dtype),
        memory.decode_workspace(config, split, rows=split.group_rows(task.batch), slots=task.slots, size=size),
        rows * (each * split.stages(config).slots * ticks + head),
        collectives.decode(config, split, batch=task.batch, dtype=task.dtype),
    )


def _train_flops(config: ModelConfig, split: Split, task: Training) -> float:
    """Forward once, backward twice; what is computed again, the head's logits among it."""
    tp, M = split.tp, split.microbatches
    tokens = task.batch // M // split.dp * task.seq_len
    products, scores = memory.products(config, split), task.seq_len * config.num_heads * config.head_dim // tp
    down = config.intermediate_size // tp * config.hidden_size
    again = {"none": 0, "save-dots": 0, "save-attention": 2 * (products - down), "full": 2 * (products - down) + 4 * scores}
    layer = 6 * products + 14 * scores + again[split.remat]
    head = 8 * config.hidden_size * math.ceil(config.vocab_size / (tp * split.pp))
    layers = split.stages(config).slots * split.chunks
    if split.pp == 1:
        return tokens * M * (layer * layers + head)
    forward = 2 * products + 8 * scores  # its regions for attention compute their outputs again to go backward
    ticks = M + (split.pp - 1) / split.chunks  # of a whole rank, each way: in vain where it waits
    return tokens * (ticks * (layer + forward) * layers + ticks * split.chunks * head)
