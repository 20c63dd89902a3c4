"""How long work takes: each product by the rate of its operations or of its bytes, whichever is slower, and what is sent.

What GPUs reach of their data sheets was measured on an H200 (matrix products of 8192 columns and rows, copies); what one kind
of GPU reaches of that is `GPU.efficiency`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

from jaxtp.config import ModelConfig
from jaxtp.config.quantization import Quantization
from jaxtp.ops.coded import CacheDtype
from jaxtp.planner import collectives, experts, hardware, memory
from jaxtp.planner.cluster import Cluster
from jaxtp.planner.collectives import Program
from jaxtp.planner.work import SIZES, Generation, Split, Step, Training, decode_step, prompt_steps

ATTENTION = 0.42  # of the data sheet's operations, in cuDNN's kernels with a causal mask (arXiv:2407.08608, figures 5 and 6)
TF32 = 2  # times slower than bfloat16: what XLA takes for float32 products, by the data sheets
SUSTAINED = 0.86  # of the rate of single products: what a training step's reach, hour after hour at full power (one H200)
BESIDE = 0.5  # of what ZeRO 3 sends over dp: the share that XLA lays beside products (`Report.overlapped`: 0.49 to 0.61)
# the same of what attention sends over cp, in updates of Llama-3.1-8B at 128k tokens on cp 8 (a ring at 32k on cp 4: 0.71)
CONTEXT_BESIDE = {"gathered": 0.67, "ring": 0.6, "heads": 0.53}
KERNELS, LAUNCH = 15, 0.8e-6  # kernels of a layer (compiled decode steps have 12 to 16), seconds from one to the next
EXPERT_KERNELS = 8  # beside them, of a router and of experts


@dataclass(frozen=True)
class Time:
    """Seconds by part.

    weights: products with weights, or reading them. attention: among tokens, or reading the cache. other: norms, activations,
    rotations. communication: what nothing hides. launch: from kernel to kernel. optimizer: of an update. bubble: waiting for
    other stages.
    """

    weights: float = 0.0
    attention: float = 0.0
    other: float = 0.0
    communication: float = 0.0
    launch: float = 0.0
    optimizer: float = 0.0
    bubble: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))

    def share(self, part: str) -> float:
        """Of the whole."""
        return getattr(self, part) / self.total

    def __add__(self, other: Time) -> Time:
        return Time(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: float) -> Time:
        return Time(*(times * part for part in dataclasses.astuple(self)))


@dataclass(frozen=True)
class Machine:
    """The rates of each device, and a split of a model over them."""

    config: ModelConfig
    split: Split
    cluster: Cluster
    dtype: str
    quantization: Quantization | None = None
    kv_cache_dtype: CacheDtype = "auto"
    pace: float = 1.0  # of products, as a share of their rate

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return SIZES[self.dtype]

    @property
    def flops(self) -> float:
        """Operations a second of matrix products."""
        rate = self.cluster.gpu.tflops * 1e12 * hardware.MATMUL * self.cluster.gpu.efficiency
        return self.pace * rate / (1 if self.size == 2 else TF32)

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.cluster.gpu.bandwidth * 1e9 * hardware.COPY * self.cluster.gpu.efficiency

    def task(self, batch: int, prompt_len: int, output_len: int) -> Generation:
        """Work for it, in its dtype."""
        return Generation(
            batch, prompt_len, output_len, dtype=self.dtype, quantization=self.quantization, kv_cache_dtype=self.kv_cache_dtype
        )

    @functools.cached_property
    def weight_bytes(self) -> list[float]:
        """Of a weight of each kernel of a block, as `memory.kernel_bytes`."""
        return memory.kernel_bytes(self.config, self.split, self.task(1, 1, 1))

    def product(self, rows: float, inner: int, columns: int, kernel: int | None = None) -> float:
        """[rows, inner] x [inner, columns], with a block's kernel of that place, or the head."""
        weight = self.size if kernel is None else self.weight_bytes[kernel]
        moved = self.size * rows * (inner + columns) + weight * inner * columns
        return max(2 * rows * inner * columns / self.flops, moved / self.bandwidth)

    def sent(self, program: Program) -> float:
        """All collectives of a program, one after another."""
        axes = self.split.axes
        return sum(times * self.cluster.seconds(collective, axes) for collective, times in program.items())

    def products(self, tokens: float, *, down: bool = True) -> float:
        """Of one layer with its weights; down: the last of them, which nothing has to compute again."""
        config, tp = self.config, self.split.tp
        D, queries = config.hidden_size, config.num_heads * config.head_dim
        qkv = queries // tp + 2 * memory.kv_heads(config, tp) * config.head_dim
        attention = self.product(tokens, D, qkv, 0) + self.product(tokens, queries // self.split.ways, D, 1)
        return attention + self.feed(tokens, down=down) + (self.experts(tokens) if config.experts else 0.0)

    def feed(self, tokens: float, *, down: bool = True) -> float:
        """Of the MLP that every token sees."""
        D, mlp = self.config.hidden_size, memory.mlp_width(self.config) // self.split.ways
        return self.product(tokens, D, 2 * mlp, 2) + down * self.product(tokens, mlp, D, 3) if mlp else 0.0

    def experts(self, tokens: float) -> float:
        """Of the router and the experts that are here."""
        config, split = self.config, self.split
        assert config.experts
        D, work = config.hidden_size, experts.products(config, split, tokens)
        flops = 6 * work.pairs * work.width * D
        *_, up, down = self.weight_bytes
        moved = self.size * work.pairs * (2 * D + 3 * work.width) + (2 * up + down) / 3 * work.read
        return self.product(tokens * split.ep, D, config.experts.count) + max(flops / self.flops, moved / self.bandwidth)

    @functools.cached_property
    def cached_bytes(self) -> int:
        """Of a head's key in the cache, or its value."""
        return memory.head_bytes(self.config, self.task(1, 1, 1))

    def layer(self, rows: int, tokens: int, cached: float) -> Time:
        """One layer of `tokens` tokens of each of `rows` rows, in parts over cp, among each other; of one token, after `cached`
        in each, of which a device has its share.
        """
        config, tp, cached = self.config, self.split.tp, cached / self.split.slot_ranks
        queries, kv = config.num_heads * config.head_dim // tp, memory.kv_heads(config, tp)
        count = rows * (1 if tokens == 1 else self.split.part(tokens))
        seen = cached if tokens == 1 else tokens / 2  # a causal mask
        scores = 4 * count * seen * queries / (self.flops * ATTENTION / hardware.MATMUL)
        held = self.cached_bytes if tokens == 1 else self.size * config.head_dim
        read = 2 * rows * (cached if tokens == 1 else tokens) * kv * held / self.bandwidth
        return dataclasses.replace(self._layer(count), attention=max(scores, read))

    def chunks(self, step: Step) -> Time:
        """One layer of the chunks of a step. What they see is gathered, then read; what the mask hides is not spared."""
        config, tp, tokens, reach = self.config, self.split.tp, step.prompt_tokens, step.reach / self.split.slot_ranks
        queries, kv = config.num_heads * config.head_dim // tp, memory.kv_heads(config, tp) * config.head_dim
        scores = 4 * tokens * reach * queries / (self.flops * ATTENTION / hardware.MATMUL)
        read = 2 * step.chunks * reach * kv * self.size / self.bandwidth
        bias = tokens * reach * self.size / self.bandwidth
        return dataclasses.replace(self._layer(tokens), attention=2 * read + max(scores, read + bias))

    def _layer(self, tokens: int) -> Time:
        """All but attention."""
        config, tp = self.config, self.split.tp
        D, queries = config.hidden_size, config.num_heads * config.head_dim // tp
        kv, mlp = memory.kv_heads(config, tp) * config.head_dim, memory.mlp_width(config) // self.split.ways
        stream = (6 + 2 * config.block_norms) * D / (self.split.ways if self.split.sequence_parallel else 1)  # norms, two sums
        moved = self.size * tokens * (stream + 3 * (queries + 2 * kv) + 3 * mlp) / self.bandwidth
        kernels = KERNELS + EXPERT_KERNELS * bool(config.experts)
        return Time(weights=self.products(tokens), other=moved, launch=kernels * LAUNCH)

    def head(self, rows: float) -> float:
        """Of `rows` tokens."""
        parts = self.split.ways * self.split.pp
        return self.product(rows, self.config.hidden_size, math.ceil(self.config.vocab_size / parts))


def decode(machine: Machine, task: Generation) -> Time:
    """A token for every row, with the cache as full as it is on average over the work: a step; in stages a tick for each."""
    split, step = machine.split, decode_step(machine.split, task)
    busy = machine.layer(step.rows, 1, task.prompt_len + task.output_len / 2)
    tick, groups = _tick(machine, step, busy, task.dtype), split.turns(task.batch)
    idle = (split.pp - groups) * (tick.total - tick.communication)
    return dataclasses.replace(tick * groups, communication=tick.communication * split.pp, bubble=idle)


def prefill(machine: Machine, task: Generation) -> Time:
    """All prompts, to the first token of each. (The rows that make tokens already as others come in are left out.)"""
    total, tick = Time(), Time()
    for step, times in prompt_steps(machine.config, machine.split, task).items():
        tick = _tick(machine, step, machine.chunks(step), task.dtype)
        total += tick * times
    return total + Time(bubble=(machine.split.pp - 1) * tick.total)


def _tick(machine: Machine, step: Step, layer: Time, dtype: str) -> Time:
    """A step whose layers take so long each; in stages, a tick."""
    config, split = machine.config, machine.split
    head = Time(weights=machine.head(step.lanes), launch=KERNELS * LAUNCH)
    sent = Time(communication=machine.sent(collectives.step(config, split, step, dtype=dtype)))
    return layer * split.stages(config).slots + head + sent


def by_part(machine: Machine, task: Generation | Training) -> dict[str, dict[str, float]]:
    """Seconds by the model's parts, as `audit.profile` measures them: of a prefill and of a decode step, or of an update."""
    config, split = machine.config, machine.split

    def parts(time: Time, head: float, tokens: float, sent: float) -> dict[str, float]:
        """The time of a phase whose products go through `tokens` tokens at once. sent: of what attention sends over cp."""
        scale = (time.weights - head) / machine.products(tokens)
        feed = machine.feed(tokens) * scale
        routed = {"experts": machine.experts(tokens) * scale} if config.experts else {}
        return {
            "attention": time.weights - feed - sum(routed.values()) - head + time.attention + time.other / 2,
            "mlp": feed + time.other / 2,
            **routed,
            **({"context": sent} if split.cp > 1 else {}),
            "collectives": time.communication - sent,
            "head": head,
            "optimizer": time.optimizer,
            "host": time.bubble + time.launch,
        }

    if isinstance(task, Training):
        rows, sustained = task.batch // split.microbatches // split.groups, dataclasses.replace(machine, pace=SUSTAINED)
        tokens = rows * split.part(task.seq_len)
        head = 4 * sustained.head(tokens) * split.microbatches
        return {"step": parts(train(machine, task), head, tokens, context_seconds(sustained, task)[0])}
    step, prompts = decode_step(split, task), prompt_steps(config, split, task)
    together = {"prefill": max(each.tokens for each in prompts), "decode": step.tokens}

    def sent(step: Step) -> float:
        return machine.sent(collectives.of_slots(config, split, step, dtype=task.dtype))

    merged = {
        "prefill": sum(times * sent(each) for each, times in prompts.items()),
        "decode": split.turns(task.batch) * sent(step),
    }
    heads = {
        "prefill": sum(times * machine.head(each.lanes) for each, times in prompts.items()),
        "decode": split.turns(task.batch) * machine.head(step.lanes),
    }
    times = {"prefill": prefill(machine, task), "decode": decode(machine, task)}
    return {phase: parts(time, heads[phase], together[phase], merged[phase]) for phase, time in times.items()}


def context_seconds(machine: Machine, task: Training) -> tuple[float, float]:
    """Seconds of an update in which attention sends over cp: alone, and beside products."""
    config, split = machine.config, machine.split
    if split.cp == 1:
        return 0.0, 0.0
    tokens = task.batch // split.microbatches // split.groups * split.part(task.seq_len)
    turns = split.microbatches if split.pp == 1 else split.microbatches * split.chunks + split.pp - 1
    layers = turns * split.stages(config).slots
    sent = machine.sent(collectives.of_tokens(config, split, tokens, dtype=task.dtype, times=layers))
    share = CONTEXT_BESIDE[split.strategy(config)]
    return (1 - share) * sent, share * sent


def train(machine: Machine, task: Training) -> Time:
    """One update."""
    machine = dataclasses.replace(machine, pace=SUSTAINED)
    config, split = machine.config, machine.split
    M, pp = split.microbatches, split.pp
    rows = task.batch // M // split.groups
    held, tokens = memory.params(config, split), rows * split.part(task.seq_len)
    layers = split.stages(config).slots * split.chunks
    forward = machine.layer(rows, task.seq_len, task.seq_len)
    # what the backward pass computes again; in a pipeline it begins with a forward pass in any case
    once_more = dataclasses.replace(forward, weights=machine.products(tokens, down=config.norms_behind))
    again = {
        "none": Time(),
        "save-dots": Time(other=forward.other),
        "save-attention": dataclasses.replace(once_more, attention=0.0),
        "full": once_more,
    }[split.remat]
    once = forward * (4 if pp > 1 else 3) + again
    once += Time(attention=forward.attention / 2)  # going back it has five products, going forward two
    head = Time(weights=4 * machine.head(tokens))
    sent = collectives.train(config, split, batch=task.batch, seq_len=task.seq_len, dtype=machine.dtype)
    busy = (once * layers + head) * M
    bubble = split.pipeline().bubble * busy.total if pp > 1 else 0.0  # what is sent in vain is among what is sent
    update = 28.0 * memory.kept(held, split) / machine.bandwidth
    hidden = machine.sent(collectives.over_data(config, split, dtype=machine.dtype)) * BESIDE if split.zero == 3 else 0.0
    hidden += context_seconds(machine, task)[1]
    return busy + Time(communication=machine.sent(sent) - hidden, bubble=bubble, optimizer=update)


def train_flops(config: ModelConfig, length: int, *, frozen: bool = False) -> tuple[float, float]:
    """Operations to train on one token: with causal attention (PaLM's MFU, halved for the mask), and 6 a weight alone
    (4 where weights are frozen; adapters' own are not counted).

    The embedding is looked up, not multiplied; the head is.
    """
    weights = config.num_active_params - config.vocab_size * config.hidden_size * (0 if config.tie_word_embeddings else 1)
    attention = 6 * config.num_layers * config.num_heads * config.head_dim * length
    each = 4.0 if frozen else 6.0
    return each * weights + attention, each * weights
