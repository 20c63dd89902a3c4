"""What is asked of a model, and a way to split it over devices."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from jaxtp import buckets
from jaxtp.config import ModelConfig
from jaxtp.config.quantization import Quantization
from jaxtp.mesh import AXES, across_nodes, told
from jaxtp.ops.coded import CacheDtype, check_cache_dtype
from jaxtp.ops.pages import Read, choose_read
from jaxtp.parallel.context import Context, Strategy, choose_strategy
from jaxtp.parallel.schedules import Name, Schedule
from jaxtp.parallel.stages import Stages
from jaxtp.sharding import ExpertDispatch, ExpertLayout, Rules, check_layout

Remat = Literal["none", "full", "save-dots", "save-attention"]
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = ("float32", "bfloat16")  # to train in


@dataclass(frozen=True)
class Generation:
    """`batch` prompts of `prompt_len` tokens at once, each completed by `output_len`.

    max_model_len: tokens of a request at most, for which concurrency is told; default prompt and output. utilization: the
    share of each GPU that weights and cache may take. quantization: of the blocks' kernels, as
    `ModelConfig.quantized` takes it. kv_cache_dtype: of keys and values, "int8" or "fp8" with a scale for each token and head.
    """

    batch: int = 1
    prompt_len: int = 1024
    output_len: int = 256
    max_model_len: int | None = None
    dtype: str = "bfloat16"
    utilization: float = 0.9
    quantization: Quantization | None = None
    kv_cache_dtype: CacheDtype = "auto"

    def __post_init__(self) -> None:
        _positive(batch=self.batch, prompt_len=self.prompt_len, output_len=self.output_len)
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization={self.utilization} must be in (0, 1]")
        _known(self.dtype, SIZES)
        check_cache_dtype(self.kv_cache_dtype)
        if self.max_model_len is not None and self.max_model_len < self.total:
            raise ValueError(f"max_model_len={self.max_model_len} is less than prompt_len + output_len = {self.total}")

    @property
    def total(self) -> int:
        """Tokens of a row at its end."""
        return self.prompt_len + self.output_len

    @property
    def request(self) -> int:
        """Tokens that are set aside for a request."""
        return self.max_model_len or self.total


@dataclass(frozen=True)
class Training:
    """Updates from `batch` rows of `seq_len` tokens, with AdamW on float32 parameters. utilization: as of `Generation`."""

    batch: int = 64
    seq_len: int = 4096
    dtype: str = "bfloat16"
    utilization: float = 0.95

    def __post_init__(self) -> None:
        _positive(batch=self.batch, seq_len=self.seq_len)
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization={self.utilization} must be in (0, 1]")
        _known(self.dtype, DTYPES)


Task = Generation | Training


def _positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")


def _known(dtype: str, among: Iterable[str]) -> None:
    if dtype not in among:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(among)}")


@dataclass(frozen=True)
class Split:
    """How the work is spread: the axes of the mesh, and what else there is to choose. Of training alone: zero, microbatches,
    schedule, chunks, remat, context_strategy.

    over_cp: what lies over cp, in training the tokens of rows, in generation the slots of the cache (and weights, beside tp).
    microbatches: of an update (and, in a pipeline, what goes through its stages). chunks: of layers on a pipeline's rank.
    expert_dispatch: what "ragged" sends hangs on what tokens choose; plans count what that is on average.
    """

    dp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    tp: int = 1
    over_cp: Literal["tokens", "slots"] = "tokens"
    sequence_parallel: bool = False
    zero: int = 0
    microbatches: int = 1
    schedule: Name = "1f1b"
    chunks: int = 1
    remat: Remat = "none"
    context_strategy: Strategy | None = None
    expert_layout: ExpertLayout = "auto"
    expert_dispatch: ExpertDispatch = "gather"

    @property
    def axes(self) -> dict[str, int]:
        """The mesh's sizes, in its order."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def size(self) -> int:
        """Devices."""
        return self.dp * self.pp * self.cp * self.ep * self.tp

    @property
    def groups(self) -> int:
        """Of rows: those of dp, each cut over ep."""
        return self.dp * self.ep

    @property
    def router_ranks(self) -> int:
        """Ranks of ep whose tokens come to a router in training: of all where experts see them there."""
        return self.ep if self.expert_dispatch == "gather" and self.pp == 1 else 1

    @property
    def slot_ranks(self) -> int:
        """Devices over which the slots of a row's cache lie."""
        return self.cp if self.over_cp == "slots" else 1

    @property
    def ways(self) -> int:
        """Into how many parts MLPs and tables are cut, and what follows attention."""
        return self.tp * self.slot_ranks

    @property
    def summed(self) -> tuple[str, ...]:
        """The axes that these parts lie on."""
        return ("cp", "tp") if self.slot_ranks > 1 else ("tp",)

    def page_tokens(self, task: Generation) -> int:
        """Tokens that the pages of each row hold at its end, on all devices that share them."""
        size = buckets.PAGE * self.slot_ranks
        return -(-task.total // size) * size

    @property
    def context(self) -> Context | None:
        """How attention goes over cp."""
        return Context(self.cp, self.context_strategy) if self.cp > 1 else None

    def strategy(self, config: ModelConfig) -> Strategy:
        """What attention goes over cp by."""
        held = max(config.num_kv_heads, self.tp)
        return choose_strategy(
            cp=self.cp, kv_heads=held // self.tp, group=config.num_heads // held, override=self.context_strategy
        )

    def part(self, tokens: int) -> int:
        """Of a row's tokens, those of each rank of cp: filled up to chunks of one size."""
        return self.context.padded(tokens) // self.cp if self.context and self.over_cp == "tokens" else tokens

    def rules(self, config: ModelConfig) -> Rules:
        """The layout of weights and activations. Raises ValueError where experts cannot be cut so."""
        rules = Rules().sequence_parallel() if self.sequence_parallel else Rules()
        if self.cp > 1:
            rules = rules.cache_parallel() if self.over_cp == "slots" else rules.context_parallel()
        rules = rules.pipeline_parallel() if self.pp > 1 else rules
        layout, dispatch = self.expert_layout, self.expert_dispatch
        return rules.expert_parallel(config, ep=self.ep, tp=self.tp, cp=self.slot_ranks, layout=layout, dispatch=dispatch)

    def stages(self, config: ModelConfig) -> Stages:
        """Where layers stand."""
        return Stages.split(config.num_layers, ranks=self.pp, chunks=self.chunks)

    def pipeline(self) -> Schedule:
        """Of the microbatches of an update."""
        return Schedule(self.schedule, self.pp, self.microbatches, self.chunks)

    @property
    def peeled(self) -> bool:
        """Whether a pipeline's first and last ticks are one each, which XLA takes out of their loops."""
        return self.pp * self.chunks == 2 and self.pp > 1 and self.schedule != "gpipe"

    def rows(self, batch: int) -> int:
        """Of a batch, those of each group."""
        return -(-batch // self.groups)

    def lanes(self, batch: int) -> int:
        """Of these, those of a step, padded: in stages a tick's share."""
        return buckets.power(-(-self.rows(batch) // self.pp))

    def turns(self, batch: int) -> int:
        """In how many parts the rows go through stages."""
        rows = self.rows(batch)
        return -(-rows // -(-rows // self.pp))

    def told(self) -> str:
        """In words, what differs from one device."""
        return told(self.axes, "1 GPU")


@dataclass(frozen=True)
class Step:
    """What each group of rows takes through the model at once: rows that make a token, and chunks of prompts that reach so far.

    In stages it is what each rank has in a tick.
    """

    rows: int
    chunks: int = 0
    reach: int = 0

    @property
    def lanes(self) -> int:
        """Tokens that the head sees."""
        return self.rows + self.chunks

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.rows + self.prompt_tokens

    @property
    def prompt_tokens(self) -> int:
        """Those of prompts."""
        return self.chunks * buckets.chunk_tokens("gpu")


def read_of(config: ModelConfig, split: Split, dtype: str, bits: CacheDtype = "auto") -> Read:
    """How GPUs read the cache."""
    windows, stages = any(config.windows), split.pp > 1
    kind = jnp.dtype(dtype)
    return choose_read(
        platform="gpu",
        dtype=kind,
        head_dim=config.head_dim,
        windows=windows,
        stages=stages,
        softcap=config.attention_softcap,
        bits=bits,
    )


def decode_step(split: Split, task: Generation) -> Step:
    """A token for each row; in stages, for its share of them."""
    return Step(split.lanes(task.batch))


def prompt_steps(config: ModelConfig, split: Split, task: Generation) -> Counter[Step]:
    """How prompts are taken in as long as no row makes a token yet: chunk after chunk, prompt after prompt, as many in a step
    as it may have; and how often.
    """
    size, each = buckets.chunk_tokens("gpu"), config.hidden_size * SIZES[task.dtype]
    tokens = buckets.step_tokens("gpu", token_bytes=each, shared=split.ways > 1)
    most, of_each = buckets.chunk_lanes(tokens, rows=0, chunk=size), -(-task.prompt_len // size)
    steps, rest = divmod(of_each * split.rows(task.batch), most)
    period, found = of_each // math.gcd(of_each, most), Counter[Step]()  # of the place in a prompt that a step ends at

    def note(number: int, chunks: int, times: int) -> None:
        last = (number * most + chunks - 1) % of_each + 1
        end = task.prompt_len if last < chunks else min(last * size, task.prompt_len)
        found[Step(0, min(buckets.lanes(chunks), most), buckets.chunk_reach(end, split.page_tokens(task)))] += times

    for number in range(min(period, steps)):
        note(number, most, -(-(steps - number) // period))
    if rest:
        note(steps, rest, 1)
    return found


def problem(config: ModelConfig, split: Split, task: Task, *, per_node: int | None = None) -> str | None:
    """Why this model cannot be run so, in the words of what would refuse it; None where it can.

    per_node: devices of a node, within which tp stays, and cp where weights lie over it.
    """
    try:
        check(config, split, task, per_node=per_node)
    except ValueError as error:
        return str(error)
    return None


def check(config: ModelConfig, split: Split, task: Task, *, per_node: int | None = None) -> None:
    """The same as an error."""
    over = "slots" if isinstance(task, Generation) else "tokens"
    if split.cp > 1 and split.over_cp != over:
        raise ValueError(f"{split.told()}: over cp lie {over}, and not {split.over_cp}; use Split(over_cp={over!r})")
    if 0 < sum(config.sparse) < config.num_layers:
        raise ValueError(f"{config.model_type}: models of layers with experts and layers without are not planned; they run")
    if isinstance(task, Training):
        split.strategy(config)
        if split.pp > 1:
            split.pipeline()
        check_rows(task.batch, split.microbatches, dp=split.dp, ep=split.ep)
    together = split.ways * (split.ep if split.slot_ranks > 1 else 1)  # ep lies between cp and tp
    if per_node and per_node % together and split.size > per_node:
        raise ValueError(across_nodes({axis: split.axes[axis] for axis in split.summed}, per_node))
    check_layout(config, split.tp, split.rules(config), cp=split.cp)
    stages = split.stages(config)
    check_length(config, task)
    if isinstance(task, Training):
        check_zero(config, zero=split.zero, shares=split.groups * split.cp, pp=split.pp)
    stages.alike(config.kinds)


def lengths(most: int, prompt_len: int | None = None, output_len: int | None = None) -> tuple[int, int]:
    """(prompt_len, output_len) of a request where they are not said: 1024 and 256, less where a row holds fewer than 1280."""
    output_len = min(256, max(1, most // 4)) if output_len is None else output_len
    return min(1024, max(1, most - output_len)) if prompt_len is None else prompt_len, output_len


def check_length(config: ModelConfig, task: Task) -> None:
    """Raises ValueError where rows are longer than the model's positions."""
    if isinstance(task, Training):
        wanted = {"seq_len": task.seq_len}
    else:
        wanted = {"prompt_len + output_len": task.total, "max_model_len": task.request}
    for name, tokens in wanted.items():
        config.check_length(name, tokens)


def check_rows(batch: int, microbatches: int, *, dp: int, ep: int = 1) -> None:
    """Raises ValueError where an update's rows cannot be cut into microbatches that dp, or dp and ep together, divide."""
    if batch % microbatches:
        raise ValueError(f"{microbatches} microbatches must divide the {batch} rows of an update")
    rows = batch // microbatches
    if rows % (dp * ep):
        legal, name = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0), "dp" if ep == 1 else "dp·ep"
        raise ValueError(
            f"{name}={dp * ep} does not divide the {rows} rows of a microbatch (batch of {batch}, microbatches: "
            f"{microbatches}); legal {name}: {legal}"
        )


def check_whole_rows(config: ModelConfig, *, cp: int, capacity: float | None) -> None:
    """Raises ValueError where experts are trained over cp with a capacity."""
    if config.experts and cp > 1 and capacity is not None:
        raise ValueError(
            f"cp={cp} with routers.capacity={capacity}: whole rows are looked at, of which each rank of cp has a part; leave "
            "the capacity out"
        )


def check_zero(config: ModelConfig, *, zero: int, shares: int, pp: int) -> None:
    """Raises ValueError where a ZeRO stage does not go with the rest. shares: devices over which tokens are spread."""
    if zero not in (0, 1, 2, 3):
        raise ValueError(f"zero={zero} must be 0, 1, 2 or 3")
    if pp > 1 and zero > 1:
        raise ValueError(
            f"zero={zero} would scatter or gather over dp at every microbatch of a pipeline; with pp use zero 0 or 1"
        )
    if zero and config.hidden_size % shares:
        legal = ", ".join(str(n) for n in range(1, min(config.hidden_size, 1024) + 1) if config.hidden_size % n == 0)
        raise ValueError(f"zero={zero}: dp·cp·ep={shares} does not divide hidden_size {config.hidden_size}; legal: {legal}")
