"""The programs that a plan consists of, as they are compiled: what each holds, computes and sends, by formula."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtp.config import ModelConfig
from jaxtp.planner import collectives, memory
from jaxtp.planner.collectives import Program
from jaxtp.planner.work import SIZES, Generation, Split, Step, Task, Training, decode_step, prompt_steps


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
    """Of generation the step that takes in most of the prompts, at its furthest, and a decode step (in stages, a tick of
    each); of training the step.
    """
    if isinstance(task, Training):
        held = memory.training(config, split, task)
        sent = collectives.train(config, split, batch=task.batch, seq_len=task.seq_len, dtype=task.dtype)
        return [Predicted("step", held.arguments, held.temporary, _train_flops(config, split, task), sent)]
    steps = {"prefill": largest(config, split, task), "decode": decode_step(split, task)}
    return [_step(name, config, split, task, step) for name, step in steps.items()]


def largest(config: ModelConfig, split: Split, task: Generation) -> Step:
    """The step with the most chunks of prompts, at its furthest."""
    return max(prompt_steps(config, split, task), key=lambda step: (step.chunks, step.reach))


def _step(name: str, config: ModelConfig, split: Split, task: Generation, step: Step) -> Predicted:
    """Attention of rows as if each saw all slots."""
    heads, D = config.num_heads * config.head_dim // split.tp, config.hidden_size
    products = 2 * memory.products(config, split, step.tokens)
    scores = 4 * heads * (step.rows * split.page_tokens(task) + step.prompt_tokens * step.reach) // split.slot_ranks
    between = step.tokens * D * SIZES[task.dtype] if split.pp > 1 else 0  # on its way from stage to stage
    head = 2 * D * math.ceil(config.vocab_size / (split.ways * split.pp)) * step.lanes
    return Predicted(
        name,
        memory.weights(config, split, task) + memory.cache(config, split, task) + between,
        memory.workspace(config, split, task, step),
        (products + scores) * split.stages(config).slots + head,
        collectives.step(config, split, step, dtype=task.dtype),
    )


def _train_flops(config: ModelConfig, split: Split, task: Training) -> float:
    """Forward once, backward twice; what is computed again, the head's logits among it."""
    tp, M = split.tp, split.microbatches
    tokens = task.batch // M // split.groups * split.part(task.seq_len)
    products = memory.products(config, split, tokens, router_ranks=split.router_ranks) / tokens
    scores = _seen(config, split, task.seq_len) // tp
    down = 0 if config.norms_behind else memory.mlp_width(config) // tp * config.hidden_size
    again = {"none": 0, "save-dots": 0, "save-attention": 2 * (products - down), "full": 2 * (products - down) + 4 * scores}
    layer = 6 * products + 14 * scores + again[split.remat]
    head = 8 * config.hidden_size * math.ceil(config.vocab_size / (tp * split.pp))
    layers = split.stages(config).slots * split.chunks
    if split.pp == 1:
        return tokens * M * (layer * layers + head)
    forward = 2 * products + 8 * scores  # its regions for attention compute their outputs again to go backward
    ticks = M + (split.pp - 1) / split.chunks  # of a whole rank, each way: in vain where it waits
    return tokens * (ticks * (layer + forward) * layers + ticks * split.chunks * head)


def _seen(config: ModelConfig, split: Split, length: int) -> int:
    """Of a layer's attention, what each token is multiplied with: the row, by all heads. Over cp to gather is the row and the
    token's own chunk, as a compiler counts it, which knows no lengths; a ring leaves out what stands behind.
    """
    row, c = length * config.num_heads * config.head_dim, split.cp
    if c == 1 or split.strategy(config) == "heads":
        return row
    return row + row // (2 * c) if split.strategy(config) == "gathered" else row * (c + 1) // (2 * c)
