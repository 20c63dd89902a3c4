"""The config of one model: sizes and mathematics."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxtp import files
from jaxtp.checks import INT32, whole
from jaxtp.config.experts import Experts
from jaxtp.config.families import FAMILIES, Activation, NormForm, NormPosition
from jaxtp.config.keys import ACTIVATIONS, DTYPE_NAMES, DTYPES, NUMBERS
from jaxtp.config.quantization import Schemes, chosen
from jaxtp.config.reader import read
from jaxtp.config.rope import Rope, rope_to_hf

_COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    "max_position_embeddings",
)


RopeName = Literal["global", "local"]


class Kind(NamedTuple):
    """What sets a layer apart from others: layers of one kind run the same program on weights of the same shapes."""

    window: int | None = None
    sparse: bool = False
    rope: RopeName | None = "global"


@dataclass(frozen=True)
class ModelConfig:
    """The shape and mathematics of one model. Sizes are counts; `rms_norm_eps` has no unit.

    `windows[i]` is the sliding window of layer i in tokens (a query sees itself and the `window - 1` tokens before it),
    None for full attention. `experts` stand in place of MLPs. `rotated[i]` says whether layer i has RoPE (empty: all have);
    layers with a window have `local_rope` where there is one. `dtype` is the checkpoint's, None where it does not say;
    `schemes` say how its kernels are quantized, if they are.

    norm_position: norms stand before attention and MLP ("pre"), behind them ("post"), or both. norm_form: see `ops.norm`.
    qk_norm_across_heads: the norms of q and k are over all heads together, not each. attention_scale: of scores, default
    1/√head_dim. attention_softcap, logits_softcap: see `ops.attention.capped`. What is looked up is multiplied with
    embedding_multiplier, and with √hidden_size, rounded to the model's dtype, where scaled_embedding. residual_multiplier: of
    what attention and MLP add. logits_scaling: what logits are divided by.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: Rope = field(default_factory=Rope)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_across_heads: bool = False
    norm_position: NormPosition = "pre"
    norm_form: NormForm = "rounded"
    activation: Activation = "silu"
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    scaled_embedding: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    local_rope: Rope | None = None
    rotated: tuple[bool, ...] = ()
    windows: tuple[int | None, ...] = ()
    experts: Experts | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str | None = None
    schemes: Schemes | None = None

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if all(self.rotated):
            object.__setattr__(self, "rotated", ())
        for name in _COUNTS:
            whole(name, getattr(self, name), least=1, most=INT32)
        for window in set(self.windows) - {None}:
            whole("sliding_window", window, least=1, most=INT32)
        if not 0 <= self.rms_norm_eps < math.inf:
            raise ValueError(f"rms_norm_eps={self.rms_norm_eps} must be at least 0 and finite")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_kv_heads} does not divide num_attention_heads={self.num_heads}; "
                f"legal: {_divisors(self.num_heads)}"
            )
        for rope in filter(None, (self.rope, self.local_rope)):
            rope.check(self.head_dim)
        for ours, theirs in NUMBERS.items():
            value = getattr(self, ours)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{theirs}={value} must be above 0 and finite")
        if self.experts and self.activation != "silu":
            raise ValueError(f"experts have SwiGLU alone; the activation {self.activation!r} is not supported with them")
        if len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)} windows for {self.num_layers} layers")
        if self.rotated and len(self.rotated) != self.num_layers:
            raise ValueError(f"{len(self.rotated)} rotated for {self.num_layers} layers")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of each layer."""
        each = zip(self.windows, self.sparse, self.rotated or (True,) * self.num_layers, strict=True)
        return tuple(Kind(window, sparse, self._rope_of(window) if turns else None) for window, sparse, turns in each)

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied with."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def _rope_of(self, window: int | None) -> RopeName:
        return "local" if window and self.local_rope else "global"

    @property
    def ropes(self) -> dict[RopeName, Rope]:
        """The rotary embeddings that its layers have."""
        both: dict[RopeName, Rope | None] = {"global": self.rope, "local": self.local_rope}
        used = {kind.rope for kind in self.kinds}
        return {name: rope for name, rope in both.items() if rope and name in used}

    @property
    def sparse(self) -> tuple[bool, ...]:
        """Whether each layer has experts."""
        return tuple(self.experts is not None and i not in self.experts.dense for i in range(self.num_layers))

    # -- lengths and sizes -----------------------------------------------------------------------------------------------------

    @property
    def context(self) -> int:
        """Tokens of a sequence at most: `max_position_embeddings`, or what RoPE scaling makes of it (`Rope.context`)."""
        if self.local_rope:  # Gemma 3's max_position_embeddings has the factor in it
            return self.max_position_embeddings
        return min(self.rope.context(self.max_position_embeddings), INT32)

    def check_length(self, name: str, tokens: int, *, way: str = "") -> None:
        """Raises ValueError where a sequence is longer than the context (`dynamic` RoPE adapts to any length). way: out of it,
        for the message.
        """
        if tokens > self.context and self.rope.kind != "dynamic":
            scaled = (
                f" (scaled by {self.rope.kind} RoPE to {self.context})" if self.context > self.max_position_embeddings else ""
            )
            most = f"max_position_embeddings={self.max_position_embeddings}{scaled}"
            raise ValueError(f"{name}={tokens} exceeds the model's {most}{way and '; '}{way}")

    def dtype_of(self, asked: str | None) -> str:
        """The dtype asked for, or where that is None or "auto" the checkpoint's (float32 where it says none).

        Raises ValueError for one that is not supported.
        """
        name = (None if asked == "auto" else asked) or self.dtype or "float32"
        if not isinstance(name, str) or name not in DTYPE_NAMES:
            raise ValueError(f"dtype={name!r} is not supported; supported: {', '.join(DTYPES)}")
        return DTYPE_NAMES[name]

    def quantized(self, quantization: str | None) -> ModelConfig:
        """This config with its kernels in few bits: as its checkpoint has them, which `quantization` may name, or rounded at
        load, "int8", "fp8" or "int4". Raises ValueError for what is not known, or contradicts the checkpoint.
        """
        return replace(self, schemes=chosen(quantization, self.schemes))

    @property
    def num_params(self) -> int:
        """Number of weights, tied ones counted once."""
        d, h = self.hidden_size, self.head_dim
        qkv = (self.num_heads + 2 * self.num_kv_heads) * h
        layer = qkv * d + d * self.num_heads * h + self.block_norms * d
        layer += qkv * self.qkv_bias + d * self.o_bias + self.qk_norm_params
        tables = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + sum(map(self.mlp_params, self.sparse)) + tables + d

    @property
    def block_norms(self) -> int:
        """Norms over the residual stream in a block."""
        return 4 if self.norm_position == "both" else 2

    @property
    def norms_behind(self) -> bool:
        """Whether norms stand behind attention and MLP, and need what these give to go backward."""
        return self.norm_position != "pre"

    @property
    def qk_norm_params(self) -> int:
        """Weights of a layer's norms of q and k."""
        heads = self.num_heads + self.num_kv_heads if self.qk_norm_across_heads else 2
        return heads * self.head_dim * self.qk_norm

    @property
    def num_active_params(self) -> int:
        """Of these, those that a token meets: of each layer's experts the chosen ones."""
        experts = self.experts
        idle = (experts.count - experts.per_token) * 3 * experts.width * self.hidden_size if experts else 0
        return self.num_params - sum(self.sparse) * idle

    def mlp_params(self, sparse: bool) -> int:
        """Weights of a layer's MLP, or of its router and experts."""
        d, experts = self.hidden_size, self.experts
        if sparse and experts:
            return d * (experts.count * (1 + 3 * experts.width) + (3 * experts.shared + 1) * (experts.shared > 0))
        return 3 * self.intermediate_size * d + (2 * self.intermediate_size + d) * self.mlp_bias

    def legal_tp(self, limit: int | None = None) -> tuple[int, ...]:
        """Tensor-parallel sizes that this model can be split into (up to `limit`).

        tp must divide the query heads and the MLP width, and either divide the KV heads or be a multiple of them (each
        KV head is then held by tp / KV heads devices). The vocabulary is padded, so it forbids nothing.
        """
        limit = limit or self.num_heads
        return tuple(t for t in _divisors(self.num_heads) if t <= limit and not self.tp_problems(t))

    def tp_problems(self, tp: int, cp: int = 1) -> tuple[str, ...]:
        """Why this model cannot be split into `tp` parts; empty where it can. cp: into so many more, but for the KV heads."""
        if tp < 1:
            raise ValueError(f"tp={tp} must be at least 1")
        problems, parts = [], tp * cp
        if self.num_heads % parts:
            problems.append(f"{self.num_heads} query heads")
        if self.num_kv_heads % tp and tp % self.num_kv_heads:
            problems.append(f"{self.num_kv_heads} KV heads (nor is it a multiple of them)")
        if self.intermediate_size % parts and not all(self.sparse):
            problems.append(f"the MLP width {self.intermediate_size}")
        if self.experts and self.experts.shared % parts:
            problems.append(f"the shared MLP width {self.experts.shared}")
        if self.experts and self.experts.count % parts and self.experts.width % parts:
            problems.append(f"the {self.experts.count} experts (nor their MLP width {self.experts.width})")
        return (*problems, *self._cut_groups(tp, parts))

    def _cut_groups(self, tp: int, parts: int) -> list[str]:
        """Groups of inputs and blocks of outputs, of quantized kernels, that would be cut: queries, keys and values by tp, all
        others into so many parts.
        """
        queries, kv = (heads * self.head_dim for heads in (self.num_heads, max(self.num_kv_heads, tp)))
        mlp = self.intermediate_size if not all(self.sparse) else self.experts.shared if self.experts else 0
        inputs, outputs = {"o_proj": queries}, {}
        if mlp:
            inputs["the MLP's down_proj"] = outputs["the MLP's gate_proj and up_proj"] = mlp
        own = self.cut_groups(tp, {}, {"q_proj": queries, "k_proj and v_proj": kv})
        return [*own, *self.cut_groups(parts, inputs, outputs)]

    def cut_groups(self, parts: int, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> list[str]:
        """Of modules whose inputs, or outputs, are cut into so many parts: the groups, or blocks, that this would cut."""
        if parts == 1 or self.schemes is None:
            return []
        problems = []
        for scheme in self.schemes.kinds:
            for name, size in inputs.items():
                n = scheme.groups(size)
                if n > 1 and n % parts:
                    problems.append(f"the {n} groups of {scheme.inputs(size)} of {name}'s {size} inputs")
            if scheme.block > 1:
                cut = [(name, size) for name, size in outputs.items() if size % (parts * scheme.block)]
                problems += [f"the blocks of {scheme.block} of {name}'s {size} outputs" for name, size in cut]
        return problems

    # -- Hugging Face ----------------------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any], *, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
        """Reads a `config.json` (a checkpoint folder, the file, or its content).

        `overrides` replaces keys before anything is read; the value None removes a key.
        Raises FileNotFoundError where there is none and ValueError for whatever this library does not implement.
        """
        raw, where = _content(source)
        try:
            return cls(**read(raw, overrides or {}))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` that `transformers` (4 and 5) reads as this model."""
        family = FAMILIES[self.model_type]
        out: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": _ACTIVATION_NAMES[self.activation],
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            **rope_to_hf(self.rope, max_position=self.max_position_embeddings),
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "pad_token_id": None,  # transformers' own of some families lies beyond small vocabularies
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None,
        }
        if self.dtype:
            out["torch_dtype"] = self.dtype
        if self.schemes and self.schemes.said:
            out["quantization_config"] = json.loads(self.schemes.said)
        if family.qkv_bias is None:
            out["attention_bias"] = self.qkv_bias
        if family.mlp_bias is None:
            out["mlp_bias"] = self.mlp_bias
        window = next((w for w in self.windows if w), None)
        if family.windowed:
            out["sliding_window"] = window
        if self.experts:
            out |= self._experts_to_hf()
        if family.window_switch:
            out["use_sliding_window"] = window is not None
        if family.window_switch or family.window_pattern is not None:
            out["sliding_window"] = window
            out["layer_types"] = ["sliding_attention" if w else "full_attention" for w in self.windows]
        if family.activation:
            out["hidden_activation"] = out["hidden_act"]
        out |= {theirs: getattr(self, ours) for ours, theirs in NUMBERS.items() if theirs in family.keys}
        if "query_pre_attn_scalar" in family.keys:
            out["query_pre_attn_scalar"] = round(self.score_scale**-2)
        if "partial_rotary_factor" in family.keys:
            out["partial_rotary_factor"] = self.rope.partial_rotary_factor
        if "no_rope_layers" in family.keys:
            out["no_rope_layers"] = [int(kind.rope is not None) for kind in self.kinds]
        if self.local_rope:
            out["rope_local_base_freq"] = self.local_rope.theta
        return out

    def _experts_to_hf(self) -> dict[str, Any]:
        experts, keys = self.experts, FAMILIES[self.model_type].experts
        assert experts
        assert keys
        out: dict[str, Any] = {
            keys.count: experts.count,
            keys.width: experts.width,
            "num_experts_per_tok": experts.per_token,
            "router_aux_loss_coef": experts.balance,
        }
        if keys.renormalize is None:
            out["norm_topk_prob"] = experts.renormalize
        if keys.shared:
            out["shared_expert_intermediate_size"] = experts.shared
        if keys.layers:
            out["decoder_sparse_step"] = 1
            out["mlp_only_layers"] = [*experts.dense]
        return out


_ACTIVATION_NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _content(source: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """What a `config.json` holds, and what to call it."""
    if isinstance(source, Mapping):
        return source, "the config"
    path = files.local(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint folder holds config.json and *.safetensors")
    return files.read_object(path), str(path)
