"""What a program communicates, by theory: exactly what `audit` then finds in the compiled one."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from jaxtp import buckets
from jaxtp.config import ModelConfig
from jaxtp.ops.experts import FEW_TOKENS
from jaxtp.planner import experts, memory
from jaxtp.planner.work import SIZES, Split, Step


@dataclass(frozen=True)
class Collective:
    """One collective.

    kind: "all-reduce", "reduce-scatter", "all-gather", "all-to-all", "ragged-all-to-all", "collective-permute". axes: the mesh
    axes whose devices it joins. bytes: of the whole array (an all-gather's result, a reduce-scatter's operand; of a ragged one
    so many that its traffic is what is sent on average). devices: how many it joins.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    bytes: int
    devices: int

    @property
    def traffic(self) -> int:
        """Bytes that one device sends in a ring: 2(n-1)/n of an all-reduce, (n-1)/n of a gather, scatter or all-to-all."""
        if self.kind == "collective-permute":
            return self.bytes
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (self.devices - 1) // self.devices


Program = Counter[Collective]  # how often each is done

NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}  # as XLA writes them


def step(config: ModelConfig, split: Split, step: Step, *, dtype: str) -> Program:
    """Of a step of generation; in stages, of a tick."""
    size = SIZES[dtype]
    say = _Say(split, NAMES[dtype])
    D, blocks = config.hidden_size, split.stages(config).slots
    stream, over = step.tokens * D * size, split.summed
    both = ("pp", *over)
    part = split.ways if split.sequence_parallel and step.tokens % split.ways == 0 else 1
    if part > 1:  # and the embedding scattered; without stages, the last hidden states gathered
        say("all-gather", over, stream, times=2 * blocks + (split.pp == 1))
        say("reduce-scatter", over, stream, times=2 * blocks + 1)
        say.reduce("pp", stream // part)
    else:
        say.reduce(over, stream, times=2 * blocks)
        say.reduce(both, stream)  # the embedding
    if config.experts:  # every token to all groups of ep, and the sums back; the MLP beside them has a sum of its own
        say.to_experts(config, split, step.tokens, stream, there=blocks, back=blocks)
        say.reduce(over, stream, times=blocks * (config.experts.shared > 0))
    if config.qk_norm_across_heads:  # a sum of squares of q and one of k
        say.reduce("tp", 4 * step.tokens * 2, dtype="f32", times=blocks)
    if split.pp > 1:
        say("collective-permute", "pp", stream // part)
        # what is asked for of the last stage, for the head that all ranks hold
        say.reduce(both if part > 1 else "pp", step.lanes * D * size)
    # the best token of each device's part of the vocabulary, and its logit
    say("all-gather", both, 8 * step.lanes * split.pp * split.ways, dtype="f32+s32")
    if not step.chunks and split.pp == 1:
        say.reduce("dp", 1, dtype="pred")  # whether all rows have ended
    return say.program + of_slots(config, split, step, dtype=dtype)


def of_slots(config: ModelConfig, split: Split, step: Step, *, dtype: str) -> Program:
    """What attention sends where slots lie over cp: each rank's results, by heads, with the logs of their denominators."""
    say, size = _Say(split, f"u{8 * SIZES[dtype]}"), SIZES[dtype]
    if split.slot_ranks > 1:
        results = step.tokens * config.num_heads // split.tp * (config.head_dim * size + 4)
        say("all-to-all", "cp", results, times=split.stages(config).slots)
    return say.program


def train(config: ModelConfig, split: Split, *, batch: int, seq_len: int, dtype: str) -> Program:
    """Of one update. Small arrays that are sent at the same time are one collective, as XLA makes it of large models'; of
    other models, and of the gradients of ZeRO 3, it may join more or fewer.
    """
    size = SIZES[dtype]
    say = _Say(split, NAMES[dtype])
    D, rows, length = config.hidden_size, batch // split.microbatches // split.groups, split.part(seq_len)
    stream, scattered = rows * length * D * size, split.sequence_parallel and length % split.tp == 0
    again = {"none": 0, "save-dots": 0, "save-attention": 1, "full": 1}[split.remat] * (2 if config.norms_behind else 1)
    # how often tokens go through how many layers forward and back, and how often a layer's forward sums are made
    turns, layers, sums = split.microbatches, split.stages(config).slots, 2 + again
    if split.pp > 1:  # its backward pass begins with a forward pass; a peeled last tick has nothing to hand on
        turns, sums = turns * split.chunks + split.pp - 1, 4 + again
    spare = int(split.peeled)
    both, part = ("pp", "tp"), stream // split.tp if scattered else stream
    each, kind = (size, None) if config.norm_form == "rounded" else (4, "f32")  # norms' gradients
    if scattered:  # inputs of products are gathered for each pass, and once more for their gradients, unless they were kept
        gathers = sums - again + (2 if split.remat == "none" else 4)
        say("all-gather", "tp", stream, times=turns * (gathers * layers + 2))
        say("reduce-scatter", "tp", stream, times=turns * ((sums + 2) * layers + 2))
        own = 0 if config.qk_norm_across_heads else config.qk_norm_params
        norms = config.block_norms * D + own
        lines = rows if split.cp == 1 else 1  # a row's sum each, or over cp all rows' at once
        say.reduce("tp", lines * norms * each, dtype=kind, times=turns * layers)
        if split.pp > 1:  # the last norm's: summed over the turns first
            say.reduce("tp", rows * 2 * D * each, dtype=kind)
        else:
            say.reduce("tp", lines * D * each, dtype=kind, times=turns if split.cp == 1 or split.zero > 1 else 1)
        say.reduce("pp", part, times=2 * turns)  # what enters, and the gradient that the head gives
    else:
        say.reduce("tp", stream, times=turns * (sums + 2) * layers)
        say.reduce(both, stream, times=2 * turns)
        if config.qk_norm and not config.qk_norm_across_heads:  # theirs: each device has its own heads
            say.reduce("tp", rows * config.qk_norm_params * each, dtype=kind, times=turns * layers)
    if config.qk_norm_across_heads:
        # each device has its own heads' gradients; sums of squares of q and k, made again and with two more to go backward
        say("all-gather", "tp", rows * config.qk_norm_params * each, dtype=kind, times=turns * layers)
        squares = 4 * rows * length * 2
        say.reduce("tp", squares, dtype="f32", times=turns * layers * (1 + (split.remat == "full")))
        say.reduce("tp", 2 * squares, dtype="f32", times=turns * layers)
    if config.experts:
        # every token to all groups of ep, again to go backward unless that was kept, and gradients the same ways; with them the
        # gradients of what weighs the experts of a token
        passes, choices = turns * layers, 4 * rows * length * config.experts.per_token
        there, back = 2 if split.remat == "none" else 3, 2
        if split.pp > 1:  # in a stage's regions: there once more for each, and with tokens what they chose
            there, back = 4, 3
            if to_all(split, rows * length):
                say("all-gather", "ep", 2 * choices * split.ep, dtype="f32+s32", times=passes * 3)
                say("reduce-scatter", "ep", choices * split.ep, dtype="f32", times=passes)
            # the tokens of each expert, of whole rows
            say.reduce("cp", 4 * rows * layers * config.experts.count, dtype="f32", times=turns)
        say.to_experts(config, split, rows * length, stream, there=passes * there, back=passes * back)
        if split.router_ranks > 1:
            say.reduce(("ep", "tp"), choices * split.ep, dtype="f32", times=passes)
        else:
            say.reduce("tp", choices, dtype="f32", times=passes)
        if config.experts.shared:
            say.reduce("tp", stream, times=turns * layers * 2)
    if split.pp > 1:
        say.reduce("pp", part, times=2 * turns - spare)  # what the last stage gives, and the embedding's gradient
        say("collective-permute", "pp", part, times=2 * turns - spare)
    # of each chunk of tokens the largest logit, the sum of exponentials and the label's logit, and the last two once more
    chunk = buckets.logits_chunk(length)
    numbers, chunks = 4 * rows * chunk, length // chunk
    say.reduce(both, numbers, dtype="f32", times=3 * (turns - spare) * chunks)
    say.reduce(both, 2 * numbers, dtype="f32", times=turns * chunks)
    sent = of_tokens(config, split, rows * length, dtype=dtype, times=turns * layers)
    return say.program + sent + over_data(config, split, dtype=dtype)


def of_tokens(config: ModelConfig, split: Split, tokens: int, *, dtype: str, times: int) -> Program:
    """What attention sends along rows in training, of so many tokens on each rank of cp; layers `times`."""
    say, size = _Say(split, NAMES[dtype]), SIZES[dtype]
    if split.context is None:
        return say.program
    kv, strategy = memory.kv_heads(config, split.tp), split.strategy(config)
    group, key, again = config.num_heads // split.tp // kv, tokens * kv * config.head_dim, int(split.remat == "full")
    staged = int(split.pp > 1)  # a stage's regions begin with what went into them
    if strategy == "gathered":  # once more to go backward, where gradients are scattered
        say("all-gather", "cp", 2 * key * split.cp * size, times=times * (2 + staged))
        say("reduce-scatter", "cp", 2 * key * split.cp * size, times=times)
    elif strategy == "ring":
        more = 2 * staged or again  # the first hop of which is there already
        say("collective-permute", "cp", 2 * key * size, times=times * ((2 + more) * (split.cp - 1) - bool(more)))
        say("collective-permute", "cp", 2 * key * 4, dtype="f32", times=times * split.cp)
    else:
        there, back = (2, again + 1) if staged else 2 * [int(split.remat != "none")]  # kept before it comes back
        say("all-to-all", "cp", (group + 2) * key * size, times=times * (2 + there))
        say("all-to-all", "cp", group * key * size, times=times * (2 + back))
    return say.program


def over_data(config: ModelConfig, split: Split, *, dtype: str) -> Program:
    """Of an update, the gradients, and weights that are kept in shares: over dp, cp and ep, those of experts over dp and cp."""
    say, size = _Say(split, NAMES[dtype]), SIZES[dtype]
    held, M, rows, both = memory.params(config, split), split.microbatches, ("dp", "cp"), ("dp", "cp", "ep")
    router = held.router if split.router_ranks > 1 else 0  # of which a device has the gradient of all tokens of ep
    own = held.experts + router
    if split.zero == 0:
        say.reduce(both, 4 * (held.total - own * held.blocks), dtype="f32")
        say.reduce(rows, 4 * own * held.blocks, dtype="f32")
        return say.program
    if held.whole:
        say.reduce(both, 4 * (held.whole + 3), dtype="f32")  # with the loss's three numbers
    shared = held.block - held.unshared - own
    kernels, routed = held.kernels[: -2 if config.experts else None], held.kernels[-2:] if config.experts else ()
    vectors = shared - sum(kernels)
    if split.zero == 3:
        layers = config.num_layers * M
        gathers = layers if split.remat == "none" else 2 * layers
        for weights in (*kernels, vectors, router):
            say("all-gather", both, size * weights, times=gathers)
        for weights in routed:
            say("all-gather", rows, size * weights, times=gathers)
        say("reduce-scatter", both, size * shared, times=layers)
        say("reduce-scatter", rows, size * held.experts, times=layers)
        say.reduce(rows, size * router, times=layers)
        for table in (held.embed, held.head, held.norm):
            say("all-gather", both, size * table, times=M)
            say("reduce-scatter", both, size * table, times=M)
    else:
        stacks = (held.blocks * weights for weights in kernels)
        for axes, each in ((both, (*stacks, held.blocks * vectors + held.norm, held.embed, held.head)), (rows, routed)):
            for weights in each:
                whole = weights * (held.blocks if axes == rows else 1)
                say("all-gather", axes, size * whole)
                say("reduce-scatter", axes, 4 * whole, dtype="f32", times=M if split.zero == 2 else 1)
        say("all-gather", both, size * router * held.blocks)
        say.reduce(rows, 4 * router * held.blocks, dtype="f32")
    return say.program


def to_all(split: Split, tokens: float) -> bool:
    """Whether that many tokens of each group go to all ranks of ep: a step of few is gathered however others come."""
    return split.expert_dispatch == "gather" or tokens * split.ep <= FEW_TOKENS


class _Say:
    """Collects collectives; what would join a single device is none."""

    def __init__(self, split: Split, dtype: str) -> None:
        self._axes, self._dtype = split.axes, dtype
        self.program: Program = Counter()

    def __call__(self, kind: str, axes: str | tuple[str, ...], size: int, *, dtype: str | None = None, times: int = 1) -> None:
        over = tuple(a for a in ((axes,) if isinstance(axes, str) else axes) if self._axes[a] > 1)
        if over and times and size:
            joined = 2 if kind == "collective-permute" else math.prod(self._axes[a] for a in over)
            self.program[Collective(kind, over, dtype or self._dtype, size, joined)] += times

    def to_experts(self, config: ModelConfig, split: Split, tokens: float, stream: int, *, there: int, back: int) -> None:
        """Of each group's tokens, to experts and back."""
        if to_all(split, tokens):
            self("all-gather", "ep", stream * split.ep, times=there)
            self("reduce-scatter", "ep", stream * split.ep, times=back)
        else:
            assert config.experts
            part = experts.travels(config, split.ep) * split.ep / (split.ep - 1)
            self("ragged-all-to-all", "ep", round(part * stream), times=there + back)
            numbers = 4 * tokens * 2 * config.experts.per_token  # what each row chose, and by what it is weighed
            self("ragged-all-to-all", "ep", round(part * numbers), dtype="f32", times=there)

    def reduce(self, axes: str | tuple[str, ...], size: int, **more: Any) -> None:
        self("all-reduce", axes, size, **more)
