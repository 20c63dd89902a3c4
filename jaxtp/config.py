"""ModelConfig: the mathematics of a Llama-family model, read from and written to a Hugging Face `config.json`.

Nothing here knows of devices. A family of models is one row of `FAMILIES`; a setting that this library does not
implement raises and is named, because a model that runs with a setting ignored is a wrong model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, named as in `transformers.modeling_rope_utils`.

    `kind` is one of `ROPE_TYPES`. `original_max_position` is the context length of pre-training (`llama3`, `yarn`).
    The fields after it belong to one kind each and are None (take the kind's default) elsewhere.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float | None = None
    original_max_position: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None


# What each kind must and may hold in `config.json`: our field -> Hugging Face's key.
_ROPE_KEYS = {
    "factor": "factor",
    "original_max_position": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
}
_ROPE_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position"),
    "yarn": ("factor",),
}
_ROPE_OPTIONAL = {
    "yarn": ("original_max_position", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "dynamic": ("original_max_position",),
}


@dataclass(frozen=True)
class Family:
    """What one `model_type` of Hugging Face fixes. Biases None: the config says (`attention_bias`)."""

    architecture: str
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    qk_norm: bool = False
    windowed: bool = False  # `sliding_window` holds for every layer
    window_switch: bool = False  # `use_sliding_window`, `max_window_layers`, `layer_types` choose the layers
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family(
        "MistralForCausalLM",
        qkv_bias=False,
        o_bias=False,
        windowed=True,
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        qkv_bias=True,
        o_bias=False,
        window_switch=True,
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qk_norm=True,
        window_switch=True,
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
        },
    ),
}

# Keys of config.json that change nothing in the forward pass of a dense decoder.
_HARMLESS = frozenset(
    (
        "architectures model_type transformers_version torch_dtype dtype use_cache initializer_range attention_dropout "
        "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id pretraining_tp name_or_path auto_map "
        "output_attentions output_hidden_states return_dict chunk_size_feed_forward is_encoder_decoder is_decoder "
        "id2label label2id problem_type tokenizer_class is_llama_config transformers.js_config max_length prefix "
        "unsloth_fixed unsloth_version torchscript use_bfloat16 tf_legacy_loss pruned_heads task_specific_params "
        "finetuning_task attn_implementation"
    ).split()
)
# Keys that may stand there only with the value that this library computes.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "rope_interleaved": (False,),
}
_COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    "max_position_embeddings",
)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelConfig:
    """The shape and mathematics of one model. Sizes are counts; `rms_norm_eps` has no unit.

    `windows[i]` is the sliding window of layer i in tokens (a query sees itself and the `window - 1` tokens before it),
    None for full attention. `dtype` is the checkpoint's, None where it does not say.
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
    rope: Rope = Rope()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an int of at least 1")
        if not self.rope.theta > 0:
            raise ValueError(f"rope_theta={self.rope.theta} must be above 0")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_kv_heads} does not divide num_attention_heads={self.num_heads}; "
                f"legal: {_divisors(self.num_heads)}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs")
        if len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)} windows for {self.num_layers} layers")

    # -- sizes -----------------------------------------------------------------------------------------------------

    @property
    def num_params(self) -> int:
        """Number of weights, tied ones counted once."""
        d, h = self.hidden_size, self.head_dim
        qkv = (self.num_heads + 2 * self.num_kv_heads) * h
        layer = qkv * d + d * self.num_heads * h + 3 * self.intermediate_size * d + 2 * d
        layer += qkv * self.qkv_bias + d * self.o_bias + (2 * self.intermediate_size + d) * self.mlp_bias
        layer += 2 * h * self.qk_norm
        tables = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + tables + d

    def legal_tp(self, limit: int | None = None) -> tuple[int, ...]:
        """Tensor-parallel sizes that this model can be split into (up to `limit`).

        tp must divide the query heads and the MLP width, and either divide the KV heads or be a multiple of them (each
        KV head is then held by tp / KV heads devices). The vocabulary is padded, so it forbids nothing.
        """
        limit = limit or self.num_heads
        return tuple(t for t in _divisors(self.num_heads) if t <= limit and not self.tp_problems(t))

    def tp_problems(self, tp: int) -> tuple[str, ...]:
        """Why this model cannot be split into `tp` parts; empty where it can."""
        if tp < 1:
            raise ValueError(f"tp={tp} must be at least 1")
        problems = []
        if self.num_heads % tp:
            problems.append(f"{self.num_heads} query heads")
        if self.num_kv_heads % tp and tp % self.num_kv_heads:
            problems.append(f"{self.num_kv_heads} KV heads (nor is it a multiple of them)")
        if self.intermediate_size % tp:
            problems.append(f"the MLP width {self.intermediate_size}")
        return tuple(problems)

    # -- Hugging Face ----------------------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any], *, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
        """Reads a `config.json` (a checkpoint folder, the file, or its content).

        `overrides` replaces keys before anything is read; the value None removes a key.
        Raises FileNotFoundError where there is none and ValueError for whatever this library does not implement.
        """
        raw, where = _read_json(source)
        for key, value in (overrides or {}).items():
            raw.pop(key, None)
            if value is not None:
                raw[key] = value
        family = _family(raw, where)
        return _Reader({**family.defaults, **raw}, where).config(family)

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
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope.theta,
            "rope_scaling": _rope_to_hf(self.rope),
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None,
        }
        if self.dtype:
            out["torch_dtype"] = self.dtype
        if family.qkv_bias is None:
            out["attention_bias"] = self.qkv_bias
        if self.model_type == "llama":
            out["mlp_bias"] = self.mlp_bias
        window = next((w for w in self.windows if w), None)
        if family.windowed:
            out["sliding_window"] = window
        if family.window_switch:
            out["use_sliding_window"] = window is not None
            out["sliding_window"] = window
            out["layer_types"] = ["sliding_attention" if w else "full_attention" for w in self.windows]
        return out


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _read_json(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    if isinstance(source, Mapping):
        return dict(source), "the config"
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint folder holds config.json and *.safetensors")
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found, str(path)


def _family(raw: Mapping[str, Any], where: str) -> Family:
    known = {f.architecture: name for name, f in FAMILIES.items()}
    architectures = raw.get("architectures")
    if not architectures and "model_type" not in raw:
        raise ValueError(f"{where} names no architecture; `architectures` must hold one of {sorted(known)}")
    for name in architectures or ():
        if name not in known:
            raise ValueError(f"{where}: architecture {name} is not supported; supported: {sorted(known)}")
    if architectures and "model_type" not in raw:
        return FAMILIES[known[architectures[0]]]
    if raw["model_type"] not in FAMILIES:
        raise ValueError(f"{where}: model_type {raw['model_type']!r} is not supported; supported: {sorted(FAMILIES)}")
    family = FAMILIES[raw["model_type"]]
    if architectures and family.architecture not in architectures:
        raise ValueError(f"{where}: model_type {raw['model_type']!r} does not belong to the architecture {architectures}")
    return family


class _Reader:
    """Takes settings out of a raw config one by one; whatever is left at the end was not understood."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    def take(self, key: str, default: Any = None) -> Any:
        value = self.raw.pop(key, None)
        return default if value is None else value

    def need(self, key: str) -> Any:
        if self.raw.get(key) is None:
            raise ValueError(f"{self.where} lacks {key}")
        return self.raw.pop(key)

    def count(self, key: str) -> int:
        value = self.need(key)
        if not isinstance(value, int):
            raise ValueError(f"{self.where}: {key}={value!r} must be an int")
        return value

    def config(self, family: Family) -> ModelConfig:
        raw = self.raw
        eos = raw.get("eos_token_id")
        dtype = raw.get("dtype") or raw.get("torch_dtype")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"{self.where}: dtype {dtype!r} is not supported; supported: {DTYPES}")
        heads, hidden, layers = (self.count(key) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
        bias = bool(self.take("attention_bias", False)) if family.qkv_bias is None else False
        max_position = self.take("max_position_embeddings", 2048)
        config = ModelConfig(
            model_type=next(name for name, f in FAMILIES.items() if f is family),
            vocab_size=self.need("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.need("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=self.take("num_key_value_heads", heads),
            head_dim=self.take("head_dim", hidden // max(heads, 1)),
            max_position_embeddings=max_position,
            rms_norm_eps=self.take("rms_norm_eps", 1e-6),
            rope=self.rope(max_position),
            tie_word_embeddings=self.take("tie_word_embeddings", False),
            qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=bias if family.o_bias is None else family.o_bias,
            mlp_bias=self.take("mlp_bias", False) if family.architecture == "LlamaForCausalLM" else False,
            qk_norm=family.qk_norm,
            windows=self.windows(family, layers),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,),
            dtype=dtype,
        )
        self.refuse_the_rest()
        return config

    def rope(self, max_position: int) -> Rope:
        """Reads `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (transformers 4)."""
        params = dict(self.take("rope_parameters", {}))
        params.update(self.take("rope_scaling", {}))
        theta = params.pop("rope_theta", None)
        theta = self.take("rope_theta", 10000.0 if theta is None else theta)
        legacy = params.pop("type", None)
        kind = params.pop("rope_type", legacy) or "default"
        if legacy not in (None, kind):
            raise ValueError(f"{self.where}: rope_scaling has rope_type {kind!r} and type {legacy!r}: which?")
        if kind not in ROPE_TYPES:
            raise ValueError(f"{self.where}: rope type {kind!r} is not supported; supported: {ROPE_TYPES}")
        if params.pop("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"{self.where}: partial_rotary_factor other than 1 is not supported")
        values = {ours: params.pop(theirs, None) for ours, theirs in _ROPE_KEYS.items()}
        if params:
            raise ValueError(f"{self.where}: unknown rope settings {sorted(params)}")
        for name in _ROPE_REQUIRED[kind]:
            if values[name] is None:
                raise ValueError(f"{self.where}: rope type {kind!r} needs {_ROPE_KEYS[name]}")
        used = _ROPE_REQUIRED[kind] + _ROPE_OPTIONAL.get(kind, ())
        if kind == "yarn" and values["original_max_position"] is None:
            values["original_max_position"] = max_position
        wrong = [k for k, v in {"theta": theta, **values}.items() if isinstance(v, str)]
        wrong += [name for name, value in values.items() if value is not None and name not in used]
        # the pre-training context may stand beside any kind; only those that name it use it
        wrong = [name for name in wrong if name != "original_max_position" or isinstance(values[name], str)]
        if wrong:
            shown = ", ".join(_ROPE_KEYS.get(name, "rope_theta") for name in wrong)
            raise ValueError(f"{self.where}: rope type {kind!r} has no use for {shown}, or not as text")
        return Rope(theta=float(theta), kind=kind, **{name: values[name] for name in used})

    def windows(self, family: Family, layers: int) -> tuple[int | None, ...]:
        if not (family.windowed or family.window_switch):
            return (None,) * layers
        window = self.raw.pop("sliding_window", None)
        if family.windowed:
            return (window,) * layers
        switched_on = self.take("use_sliding_window", False)
        from_layer = self.take("max_window_layers", 28)
        kinds = self.take("layer_types")
        if kinds is None:
            kinds = ["sliding_attention" if switched_on and i >= from_layer else "full_attention" for i in range(layers)]
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown or len(kinds) != layers:
            raise ValueError(f"{self.where}: layer_types must name full_attention or sliding_attention for {layers} layers")
        if not switched_on:
            return (None,) * layers
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    def refuse_the_rest(self) -> None:
        for key, legal in _FIXED.items():
            if key in self.raw and self.raw[key] not in legal:
                raise ValueError(f"{self.where}: {key}={self.raw[key]!r} is not supported; supported: {list(legal)}")
        unknown = sorted(k for k in self.raw if k not in _HARMLESS and k not in _FIXED and not k.startswith("_"))
        if unknown:
            shown = ", ".join(f"{k}={self.raw[k]!r}" for k in unknown)
            raise ValueError(
                f"{self.where}: settings that jaxtp does not know: {shown}. Where they do not change the computation, "
                f"remove them with overrides (hf_overrides), e.g. {{{unknown[0]!r}: None}}"
            )


def _rope_to_hf(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    values = {theirs: getattr(rope, ours) for ours, theirs in _ROPE_KEYS.items()}
    return {"rope_type": rope.kind, **{k: v for k, v in values.items() if v is not None}}
