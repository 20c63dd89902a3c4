"""What each device holds, by formula: weights, KV cache, activations, optimiser states. Bytes throughout.

Against the compiler's own figures: docs/planner.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtp import buckets
from jaxtp.config import ModelConfig
from jaxtp.planner import experts
from jaxtp.planner.quantized import bytes_each
from jaxtp.planner.work import SIZES, Generation, Split, Step, Training, decode_step, prompt_steps, read_of


@dataclass(frozen=True)
class Params:
    """Parameters that each device holds in use: of a block, how many blocks (empty places included), and of the tables.
    unshared: those of a block without the dim embed, which ZeRO leaves whole. kernels: of each of a block's products, those of
    experts last. experts: of a block's kernels those that ep cuts, so that ZeRO has
    dp alone for them. router: of a block's.
    """

    block: int
    unshared: int
    blocks: int
    embed: int
    head: int
    norm: int
    kernels: tuple[int, ...]
    experts: int = 0
    router: int = 0

    @property
    def stacked(self) -> int:
        """Of all blocks."""
        return self.block * self.blocks

    @property
    def whole(self) -> int:
        """What ZeRO leaves whole, of all blocks."""
        return self.unshared * self.blocks

    @property
    def tables(self) -> int:
        """Of all but the blocks."""
        return self.embed + self.head + self.norm

    @property
    def total(self) -> int:
        """All of them."""
        return self.stacked + self.tables


def params(config: ModelConfig, split: Split) -> Params:
    """What each device holds of the weights, whole over dp."""
    D, H, ways = config.hidden_size, config.head_dim, split.ways
    kv = kv_heads(config, split.tp)
    queries, mlp = config.num_heads * H, mlp_width(config) // ways
    rows = queries // split.tp + 2 * kv * H
    kernels: tuple[int, ...] = (rows * D, D * queries // ways)
    if mlp:
        kernels = (*kernels, 2 * mlp * D, mlp * D)
    block, own, router = config.block_norms * D, 0, 0
    if config.experts:
        mine = experts.share(config, split)
        kernels, own = (*kernels, *mine.kernels(D)), sum(mine.kernels(D))
        router = D * config.experts.count
        block += router + D * (config.experts.shared > 0)  # and the shared MLP's gate
    block += sum(kernels)
    unshared = config.qkv_bias * rows + config.mlp_bias * 2 * mlp + config.qk_norm_params
    block += unshared + config.o_bias * D + config.mlp_bias * D
    stages = split.stages(config)
    table = math.ceil(config.vocab_size / (ways * split.pp)) * D
    head = 0 if config.tie_word_embeddings else table
    return Params(block, unshared, stages.slots * split.chunks, table, head, D, kernels, own, router)


def mlp_width(config: ModelConfig) -> int:
    """Of a layer's MLP that every token sees: of models with experts the shared one's, or 0."""
    return config.experts.shared if config.experts else config.intermediate_size


def weights(config: ModelConfig, split: Split, task: Generation) -> int:
    """Bytes of what each device holds to generate, kernels in few bits with their scales."""
    held, size = params(config, split), SIZES[task.dtype]
    saved = sum(weights * (size - each) for weights, each in zip(held.kernels, kernel_bytes(config, split, task), strict=True))
    return size * held.total - round(held.blocks * saved)


def kernel_bytes(config: ModelConfig, split: Split, task: Generation) -> list[float]:
    """Of a weight of each of a block's kernels, in the order of `Params.kernels`."""
    config = config.quantized(task.quantization)
    D, ways, queries = config.hidden_size, split.ways, config.num_heads * config.head_dim
    sizes = {"qkv": (D, 1), "o": (queries, ways)}
    if mlp_width(config):
        kind = "shared " if config.experts else ""
        sizes |= {f"{kind}gate_up": (D, 1), f"{kind}down": (ways * (mlp_width(config) // ways), ways)}
    if config.experts:
        width = experts.share(config, split).width
        sizes |= {"experts gate_up": (D, 1), "experts down": (config.experts.width, config.experts.width // width)}
    return [bytes_each(config, name, task.dtype, inputs=inputs, parts=parts) for name, (inputs, parts) in sizes.items()]


def kv_heads(config: ModelConfig, tp: int) -> int:
    """KV heads on each device: where tp exceeds them, each stands on several."""
    return max(config.num_kv_heads, tp) // tp


def slot(config: ModelConfig, split: Split, task: Generation) -> int:
    """Of one token's keys and values on each device that has them."""
    return 2 * split.stages(config).slots * kv_heads(config, split.tp) * head_bytes(config, task)


def head_bytes(config: ModelConfig, task: Generation) -> int:
    """Of a head's key, or its value, in the cache; in 8 bits with a scale of the model's dtype."""
    size = SIZES[task.dtype]
    return config.head_dim * size if task.kv_cache_dtype == "auto" else config.head_dim + size


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    weights: in the computing dtype. kv: the cache of the work at hand. state: parameters, moments (float32). gradients: with
    the weights at work in a step. activations: kept for the backward pass. workspace: what programs need while they run.
    """

    weights: float = 0.0
    kv: float = 0.0
    state: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0
    workspace: float = 0.0

    @property
    def arguments(self) -> float:
        """What is held between steps."""
        return (self.state or self.weights) + self.kv

    @property
    def temporary(self) -> float:
        """What a step needs beside it."""
        return self.total - self.arguments

    @property
    def total(self) -> float:
        """The peak."""
        return self.weights + self.kv + self.state + self.gradients + self.activations + self.workspace


def generation(config: ModelConfig, split: Split, task: Generation) -> Memory:
    """Of a batch at its end, when its rows have pages for all their tokens."""
    steps = [decode_step(split, task), *prompt_steps(config, split, task)]
    return Memory(
        weights=weights(config, split, task),
        kv=cache(config, split, task),
        workspace=max(workspace(config, split, task, step) for step in steps),
    )


def cache(config: ModelConfig, split: Split, task: Generation) -> int:
    """Of the pages that the rows have at their end."""
    return split.rows(task.batch) * split.page_tokens(task) // split.slot_ranks * slot(config, split, task)


def capacity(config: ModelConfig, split: Split, task: Generation, memory: float) -> int:
    """Tokens that the caches of all groups hold together, on devices of `memory` bytes; below 0 where weights do not fit."""
    free = int(memory * task.utilization) - weights(config, split, task)
    return free // slot(config, split, task) * split.slot_ranks * split.groups


def workspace(config: ModelConfig, split: Split, task: Generation, step: Step) -> float:
    """Temporary memory of a step on each device.

    Of rows alone a few MiB: the logits, or attention's scores, beside the residual stream. (XLA may cut the sums of products
    into parts, which takes some more.) Of chunks what they see, gathered, beside queries and their result, or gate, up and
    their product; beside either the residual stream and who sees what.
    """
    size, tp, read = SIZES[task.dtype], split.tp, read_of(config, split, task.dtype, task.kv_cache_dtype)
    slots, reach = split.page_tokens(task) // split.slot_ranks, -(-step.reach // split.slot_ranks)
    heads, row = config.num_heads // tp, kv_heads(config, tp) * config.head_dim * size
    stream = step.tokens * config.hidden_size * size
    logits = 4 * step.lanes * math.ceil(config.vocab_size / (split.ways * split.pp))
    scores = 0 if read == "cudnn" else (4 + size) * step.rows * slots * heads
    copied = 2 * step.rows * slots * row if read == "gather" else 0
    if not step.chunks:
        return max(logits, scores + copied) + stream
    seen = step.prompt_tokens * reach * size
    gathered = 2 * step.chunks * reach * row
    mixed = 2 * step.tokens * heads * config.head_dim * size
    mlp = max(3 * step.tokens * mlp_width(config) // split.ways * size, mixed_experts(config, split, step.tokens, size))
    return stream + seen + max(logits, gathered + mixed + scores + copied, mlp)


def mixed_experts(config: ModelConfig, split: Split, tokens: float, size: int) -> float:
    """What a layer's experts need at once, for the pairs that may be here: gate, up and their product, or one end beside it."""
    if not config.experts:
        return 0.0
    D, width = config.hidden_size, experts.share(config, split).width
    return size * pairs_here(config, split, tokens) * max(2 * D, D + 2 * width, 3 * width)


def experts_back(config: ModelConfig, split: Split, tokens: float, size: int) -> float:
    """What a layer's experts need on their way back beside what was kept, of the pairs that may be here, as XLA lays it out."""
    if not config.experts:
        return 0.0
    D, width = config.hidden_size, experts.share(config, split).width
    ends = 5 if split.remat == "none" and split.pp == 1 else 10  # half of them were kept
    return size * pairs_here(config, split, tokens) * max(6 * D, D + ends * width)


def experts_kept(config: ModelConfig, split: Split, tokens: float, size: int) -> float:
    """What a layer's experts keep for the backward pass where nothing is made again: of every pair its row and what gate and up
    made of it, and in float32 what is weighed and the activation's parts.
    """
    D, width = config.hidden_size, experts.share(config, split).width
    return (size + 4) * pairs_here(config, split, tokens) * (D + 2 * width)


def pairs_here(config: ModelConfig, split: Split, tokens: float) -> float:
    """Of tokens and experts, the most that may be on a device, where each group of rows has so many tokens."""
    assert config.experts
    return tokens * split.ep * min(config.experts.per_token, experts.share(config, split).count)


def products(config: ModelConfig, split: Split, tokens: float, *, router_ranks: int | None = None) -> float:
    """Weights that the tokens of each group meet in a layer's products on each device: half the operations. Experts' are left
    out where kernels or loops compute them, whose operations no compiler counts. router_ranks: of ep, whose tokens come to a
    router (default: all).
    """
    held = params(config, split)
    own = sum(held.kernels) - held.experts
    if not config.experts:
        return own * tokens
    router = config.experts.count * config.hidden_size * tokens * (router_ranks or split.ep)
    work = experts.products(config, split, tokens)
    return own * tokens + router + (work.pairs * 3 * work.width * config.hidden_size if work.form == "every" else 0.0)


def kept(held: Params, split: Split) -> float:
    """Parameters that each device keeps between steps: ZeRO's shares lie over dp, cp and ep, experts' over dp and cp."""
    own = held.experts * held.blocks
    if not split.zero:
        return held.total
    return held.whole + ((held.total - held.whole - own) / split.groups + own / split.dp) / split.cp


def training(config: ModelConfig, split: Split, task: Training) -> Memory:
    """Of an update."""
    size, held = SIZES[task.dtype], params(config, split)
    everything, groups, tp = held.total, split.groups, split.tp
    rows, part = task.batch // split.microbatches // groups, split.part(task.seq_len)
    tokens = rows * part
    layer = kept_a_layer(config, split, tokens=tokens, size=size)
    chunk = rows * buckets.logits_chunk(part)
    logits = 2 * 4 * chunk * math.ceil(config.vocab_size / (tp * split.pp))  # and their gradient
    state, share = 12 * kept(held, split), kept(held, split) / everything
    if split.pp > 1:
        # sums in float32 (of the tables twice), a tick's gradients, the weights; one chunk's activations at a time
        stash = tokens * config.hidden_size / (tp if split.sequence_parallel else 1) * size
        activations = held.blocks / split.chunks * layer + split.pipeline().in_flight(0) * stash
        back = experts_back(config, split, tokens, size)
        return Memory(
            weights=size * everything,
            state=state,
            gradients=(4 + size) * everything + 4 * held.tables,
            activations=activations,
            workspace=logits + back + (size * everything + activations if split.peeled else 0),
        )
    weights, gradients = float(size * everything), float(size * everything)
    if size == 4 and share == 1:
        weights = 0.0  # the parameters themselves
    if split.zero == 3:  # the blocks' in shares, one layer of them whole; the tables whole, their gradients in float32 as well
        weights = size * (held.tables + held.block)
        gradients = weights + 4 * held.tables + size * held.stacked * share
        if split.remat == "none":  # those that were gathered stay for the backward pass
            weights += size * held.stacked
    activations, later = config.num_layers * layer, 0.0
    if split.microbatches > 1:
        gradients += 4 * everything * (share if split.zero >= 2 else 1)  # the sums, in float32
        if split.zero == 2:  # activations are gone when gradients become float32, to be scattered: the largest counts
            largest = 4 * max(held.kernels) * held.blocks
            later = max(0.0, largest - activations - logits)
    if split.zero == 0:  # the backward pass is over, and all gradients become float32, those of the MLPs last
        last = sum(held.kernels[2:]) * held.blocks
        gradients = max(gradients, 4 * everything + size * last - weights - activations - logits)
    # a layer on the way back: its MLP's arrays, made again where they were not kept, with their gradients, and the stream's
    stream = config.hidden_size / (tp if split.sequence_parallel else 1)
    widths = {"none": 3, "save-dots": 4, "save-attention": 6, "full": 6}[split.remat]
    later = max(later, size * tokens * (widths * mlp_width(config) / tp + 4 * stream) - logits)
    # at the head the blocks have no gradients yet, but its own are float32, and a third array of logits is there
    later = max(later, logits / 2 + 4 * held.tables - gradients)
    # the last layer's experts, when there are gradients of nothing but the tables
    later = max(later, experts_back(config, split, tokens, size) - gradients - logits)
    return Memory(weights=weights, state=state, gradients=gradients, activations=activations, workspace=logits + later)


def kept_a_layer(config: ModelConfig, split: Split, *, tokens: float, size: int) -> float:
    """What a layer keeps of `tokens` tokens on a device for the backward pass."""
    tp = split.tp
    # the residual stream and its norms are whole on every tp device, but for sequence parallelism
    whole = tokens * config.hidden_size
    stream = whole / (tp if split.sequence_parallel else 1)
    heads = config.num_heads * config.head_dim
    qkv = tokens * (heads + 2 * max(config.num_kv_heads, tp) * config.head_dim) / tp
    out = tokens * (heads + 4 / size * config.num_heads) / tp  # with the logarithm of the softmax's sum, in float32
    mlp = tokens * mlp_width(config) / tp
    norms = config.block_norms  # their inputs
    kept = {
        "none": (2 + norms) * stream + 2 * whole + qkv + out + 3 * mlp,  # the inputs of products, gathered
        "save-dots": 2 * stream + qkv + out + 2 * mlp,
        "save-attention": stream + out,
        "full": stream,
    }
    routed = 0.0
    if config.experts and split.remat in ("none", "save-dots"):  # the router's logits; experts' products with "none"
        routed = tokens * split.router_ranks * config.experts.count * 4
        if split.remat == "none" and split.pp == 1:  # (a stage's regions keep what goes into them)
            routed += experts_kept(config, split, tokens, size)
    return size * kept[split.remat] + routed
