"""The settings of a training run: one typed tree, from a YAML file and then the command line.

A key that no setting has is an error, as is a value of another type.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic
import tyro

from jaxtp import checks
from jaxtp.config import Experts, ModelConfig, Rope
from jaxtp.files import local, read_yaml
from jaxtp.parallel.schedules import Schedule
from jaxtp.presets import preset
from jaxtp.sharding import ExpertDispatch, ExpertLayout
from jaxtp.train.corpus import Format
from jaxtp.train.lora import Options
from jaxtp.train.optim import Optimizer
from jaxtp.train.records import TrainOn
from jaxtp.train.routers import Routers
from jaxtp.train.stopping import EarlyStopping


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A new model of the Llama family; vocab_size None is the tokenizer's."""

    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    """In place of each layer's MLP; 0: there are none."""
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    """Of each expert; default intermediate_size."""

    def config(self, *, vocab_size: int, eos: int | None) -> ModelConfig:
        """The ModelConfig; the family follows from the options (QK-norm: Qwen3, q/k/v bias: Qwen2, else Llama; with experts
        their mixtures, and Mixtral). Raises ValueError for experts that cannot be.
        """
        kinds = ("qwen3_moe", "qwen2_moe", "mixtral") if self.num_experts else ("qwen3", "qwen2", "llama")
        experts = None
        if self.num_experts:
            width = self.moe_intermediate_size or self.intermediate_size
            experts = Experts(self.num_experts, self.num_experts_per_tok, width, renormalize=True)
        return ModelConfig(
            model_type=kinds[0] if self.qk_norm else kinds[1] if self.qkv_bias else kinds[2],
            experts=experts,
            vocab_size=self.vocab_size or vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_heads,
            max_position_embeddings=self.max_position_embeddings,
            rms_norm_eps=self.rms_norm_eps,
            rope=Rope(self.rope_theta),
            tie_word_embeddings=self.tie_word_embeddings,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            bos_token_id=eos,
            eos_token_ids=() if eos is None else (eos,),
        )


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained: the weights of a checkpoint (`start`, a folder or hub id), or new ones of a preset or a shape."""

    start: str | None = None
    preset: str | None = None
    shape: Shape = field(default_factory=Shape)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the computation; parameters, gradients and optimiser states are float32."""
    kernel: Literal["reference", "xla", "cudnn"] | None = None


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the tokens come from."""

    train: tuple[str, ...] = ()
    """Files, patterns, or folders of them: text, JSONL, JSON, Parquet, or .npy arrays of token ids."""
    validation: tuple[str, ...] = ()
    """As `train`; empty: the last `validation_share` of the training data."""
    validation_share: float = 0.0
    kind: Format = "auto"
    """What the records of files hold; auto: what the first of each file does. jsonl reads lines, whatever a file's name."""
    text_key: str = "text"
    """The key of a record's text."""
    train_on: TrainOn = "assistant"
    """What is learned of conversations and of prompts with completions: all that the assistant says, its last words, or all."""
    tokenizer: str | None = None
    """Folder of the tokenizer; default that of `model.start`, or tokenizer/ in the run's own folder where one is trained."""
    train_tokenizer: int = 0
    """Vocabulary of a byte-level BPE learned from the training text where the tokenizer's folder does not hold one yet."""
    sequence_length: int = 256
    batch_size: int = 32
    """Rows of each update, over all devices and microbatches."""
    pack: bool = False
    """Whole documents side by side in a row; else running text cut into rows. Conversations are always packed."""


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the work is spread."""

    dp: int = -1
    """Data-parallel groups; -1: all that pp, cp, ep and tp leave."""
    pp: int = 1
    """Stages over which the layers are split; the microbatches (`accumulate`) go through them one after another."""
    cp: int = 1
    """Parts that each row of tokens is cut into: attention goes over them, for rows that one device cannot hold."""
    context_strategy: Literal["auto", "gathered", "ring", "heads"] = "auto"
    """How attention goes over cp; auto: what sends the fewest bytes (see `jaxtp.parallel.context`)."""
    ep: int = 1
    """Groups of devices that hold different experts; they share the batch as those of dp do."""
    tp: int = 1
    expert_layout: ExpertLayout = "auto"
    """How a layer's experts are cut over tp: whole ones, or each one's width; auto: whole where their number allows it."""
    expert_dispatch: ExpertDispatch = "gather"
    """How tokens come to experts on ep: all to all of its groups, or each to those that it chose (ragged)."""
    zero: Literal[0, 1, 2, 3] = 1
    sequence_parallel: bool = False
    accumulate: int = 1
    """Microbatches of an update."""
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b"] = "1f1b"
    """The order in which a pipeline takes them; see `jaxtp.draw_schedule`."""
    chunks: int = 1
    """Chunks of layers on each rank of the pipeline, for interleaved_1f1b."""
    tp_across_nodes: bool = False
    """Let tp join devices of several nodes, over the network."""
    layers_per_stage: tuple[int, ...] | None = None
    """Of each stage in the model's order; default: balanced."""
    remat: Literal["none", "full", "save-dots", "save-attention"] = "save-dots"
    """What the backward pass computes again instead of keeping; by default what lies between the products."""
    xla_flags: bool = True
    """Compile with the options of `jaxtp.xla_flags`."""
    virtual_devices: int = 0
    """Run on this many virtual CPU devices (on each node)."""


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """What is kept of a run, in `TrainConfig.folder`."""

    every: int = 500
    """Steps; 0: only at the end."""
    keep: int = 2
    """The last so many."""
    best: int = 1
    """And those with the lowest validation loss."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is told of a run."""

    every: int = 10
    tensorboard: bool = True
    wandb: str | None = None
    """Project on Weights & Biases (its package must be installed)."""
    sample_every: int = 0
    """Steps between samples of text; 0: none."""
    sample_prompt: str = ""
    sample_tokens: int = 100
    profile_steps: str | None = None
    """FIRST:LAST, steps whose profile is written (for TensorBoard and Perfetto)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. `folder` holds its checkpoints and logs; a run whose folder has checkpoints goes on from the last."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # holds for everything below as well

    folder: str
    steps: int = 1000
    seed: int = 0
    model: Model = field(default_factory=Model)
    lora: Options = field(default_factory=Options)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    log: Log = field(default_factory=Log)
    z_loss: float = 0.0
    routers: Routers = field(default_factory=Routers)
    validate_every: int = 100
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    max_nonfinite: int = 5
    """Steps in a row with a loss or gradient that is not finite, after which the run stops."""

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("max_nonfinite", self.max_nonfinite), ("log.every", self.log.every)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        checks.seed("seed", self.seed)
        rows, parts = self.data.batch_size, self.parallel.accumulate
        if rows < 1 or parts < 1 or rows % parts:
            raise ValueError(f"parallel.accumulate={parts} must divide data.batch_size={rows}")
        split = self.parallel
        if split.pp < 1:
            raise ValueError(f"parallel.pp={split.pp} must be at least 1")
        if split.pp == 1 and (split.chunks > 1 or split.layers_per_stage):
            raise ValueError(
                "parallel.chunks and parallel.layers_per_stage are a pipeline's; they need parallel.pp of at least 2"
            )
        if split.pp > 1:
            Schedule(split.schedule, split.pp, split.accumulate, split.chunks)  # raises where they do not fit
        if split.cp < 1:
            raise ValueError(f"parallel.cp={split.cp} must be at least 1")
        if self.data.sequence_length < 2:
            raise ValueError(f"data.sequence_length={self.data.sequence_length} must be at least 2")
        if not 0 <= self.data.validation_share < 1:
            raise ValueError(f"data.validation_share={self.data.validation_share} must be in [0, 1)")
        if self.model.start and self.model.preset:
            raise ValueError("model.start and model.preset exclude one another: weights of a checkpoint, or new ones")
        for name in ("rank", "start"):
            value = getattr(self.lora, name)
            if value and not self.model.start:
                raise ValueError(f"lora.{name}={value} needs model.start, the checkpoint that the adapters are for")
        if self.early_stopping.patience and not (self.data.validation or self.data.validation_share):
            raise ValueError(
                f"early_stopping.patience={self.early_stopping.patience} counts validations: give data.validation, or "
                "data.validation_share"
            )

    @property
    def tokenizer(self) -> Path | None:
        """Where its tokenizer is, or is written to; None: the one of `model.start`, or none."""
        if self.data.tokenizer:
            return local(self.data.tokenizer)
        return Path(self.folder, "tokenizer") if self.data.train_tokenizer and not self.model.start else None


def load(path: str | Path | None, overrides: Sequence[str] = (), *, prog: str = "train") -> TrainConfig:
    """A config from a YAML file (None: the defaults), then command-line flags such as `--optimizer.learning-rate 1e-3`.

    Raises FileNotFoundError, or ValueError that names each key which is unknown or of another type.
    """
    if path is None:
        return tyro.cli(TrainConfig, args=list(overrides), prog=prog)
    return tyro.cli(TrainConfig, args=list(overrides), default=parse(_yaml(Path(path)), where=str(path)), prog=prog)


def check_places(config: TrainConfig) -> None:
    """Raises ValueError, before anything is made, for remote addresses, and for a folder that cannot be written."""
    data = config.data
    named = [("folder", config.folder), ("model.start", config.model.start), ("data.tokenizer", data.tokenizer)]
    named += [("data.train", path) for path in data.train] + [("data.validation", path) for path in data.validation]
    for name, path in named:
        try:
            local(path or "")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    folder = local(config.folder).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"folder: {folder} cannot be written; {there} is {'read-only' if there.is_dir() else 'a file'}")


def parse(raw: Any, *, where: str = "the config") -> TrainConfig:
    """A config from plain dicts, as YAML gives them."""
    try:
        return pydantic.TypeAdapter(TrainConfig).validate_python(raw)
    except pydantic.ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"]))
            if problem["type"] == "unexpected_keyword_argument":
                lines.append(f"{key} is no setting; settings there: {', '.join(_keys(problem['loc'][:-1]))}")
            else:
                lines.append(f"{key}: {problem['msg']}" if key else problem["msg"])
        raise ValueError(f"{where}\n  " + "\n  ".join(lines)) from None


def plain(config: TrainConfig) -> dict[str, Any]:
    """The config as plain dicts and lists, to be written."""
    return pydantic.TypeAdapter(TrainConfig).dump_python(config, mode="json")


def model_config(config: TrainConfig, *, vocab_size: int, eos: int | None) -> ModelConfig:
    """The shape of a new model."""
    if config.model.preset:
        return preset(config.model.preset)
    return config.model.shape.config(vocab_size=vocab_size, eos=eos)


def _yaml(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    return read_yaml(path) or {}


def _keys(where: Sequence[Any]) -> list[str]:
    kind: Any = TrainConfig
    for key in where:
        kind = {f.name: f.default_factory for f in dataclasses.fields(kind)}[key]
    return [f.name for f in dataclasses.fields(kind)]
