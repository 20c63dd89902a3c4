"""What each `model_type` of Hugging Face fixes: one row a family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtp.config.experts import ExpertKeys
from jaxtp.log import logger

Activation = Literal["silu", "gelu_tanh"]
NormPosition = Literal["pre", "post", "both"]  # of a block's attention and MLP
NormForm = Literal["rounded", "float32", "unit_offset"]  # see `ops.norm`


@dataclass(frozen=True)
class Family:
    """One row. Biases None: the config says (`attention_bias`, `mlp_bias`); so does `hidden_act` where activation is None.
    keys: that a config has beside Llama's. defaults: of keys that a config leaves out.
    """

    architecture: str
    aliases: tuple[str, ...] = ()  # older names of the architecture
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    mlp_bias: bool | None = False
    qk_norm: bool = False
    windowed: bool = False  # `sliding_window` holds for every layer
    window_switch: bool = False  # `use_sliding_window`, `max_window_layers`, `layer_types` choose the layers
    window_pattern: int | None = None  # every so manieth layer has none, where `layer_types` does not say (0: all have one)
    norm_position: NormPosition = "pre"
    norm_form: NormForm = "rounded"
    qk_norm_across_heads: bool = False
    activation: Activation | None = None
    scaled_embedding: bool = False  # by √hidden_size
    fused: bool = False  # q, k and v are one tensor of a checkpoint, gate and up another
    ropes: tuple[str, ...] = ()  # kinds that transformers takes for it; default all
    keys: tuple[str, ...] = ()
    experts: ExpertKeys | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


_GEMMA: dict[str, Any] = {"norm_form": "unit_offset", "activation": "gelu_tanh", "scaled_embedding": True}
_GEMMA_DEFAULTS = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", aliases=("LLaMAForCausalLM",), mlp_bias=None),
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
        defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "sliding_window": 4096},
    ),
    "ministral": Family(
        "MinistralForCausalLM",
        qkv_bias=False,
        o_bias=False,
        window_pattern=0,
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "gemma": Family("GemmaForCausalLM", **_GEMMA, defaults={**_GEMMA_DEFAULTS, "num_key_value_heads": 16}),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        **_GEMMA,
        norm_position="both",
        window_pattern=2,
        keys=("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        defaults={
            **_GEMMA_DEFAULTS,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        **_GEMMA,
        norm_position="both",
        qk_norm=True,
        window_pattern=6,
        keys=("query_pre_attn_scalar", "final_logit_softcapping", "rope_local_base_freq", "sliding_window_pattern"),
        defaults={
            **_GEMMA_DEFAULTS,
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        qkv_bias=False,
        o_bias=False,
        windowed=True,
        fused=True,
        ropes=("default", "longrope"),
        keys=("partial_rotary_factor",),
        defaults={"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        norm_position="post",
        norm_form="float32",
        qk_norm=True,
        qk_norm_across_heads=True,
        defaults={"rms_norm_eps": 1e-5},
    ),
    "granite": Family(
        "GraniteForCausalLM",
        mlp_bias=None,
        keys=("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
        defaults={
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        mlp_bias=None,
        window_switch=True,
        keys=("no_rope_layers", "no_rope_layer_interval"),
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        qkv_bias=False,
        o_bias=False,
        windowed=True,
        experts=ExpertKeys("num_local_experts", "intermediate_size", renormalize=True, layers=False),
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        qkv_bias=True,
        o_bias=False,
        window_switch=True,
        experts=ExpertKeys(shared=True),
        defaults={
            "num_key_value_heads": 16,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        qk_norm=True,
        window_switch=True,
        experts=ExpertKeys(),
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        qk_norm=True,
        qk_norm_across_heads=True,
        experts=ExpertKeys(width="intermediate_size", layers=False),
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "router_aux_loss_coef": 0.01,
        },
    ),
}


# Configs of more than text: the architecture, and the family of its text part, which alone is read
MULTIMODAL = {"gemma3": ("Gemma3ForConditionalGeneration", "gemma3_text")}
_BESIDE = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "tie_word_embeddings", "quantization_config")


def text_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config as it is, or of one of more than text its `text_config` with what is said beside it. Raises ValueError where
    there is none.
    """
    named = raw.get("architectures")
    named = named if isinstance(named, list | tuple) else ()
    for model_type, (architecture, text) in MULTIMODAL.items():
        if raw.get("model_type") != model_type and architecture not in named:
            continue
        found = raw.get("text_config")
        if not isinstance(found, Mapping):
            raise ValueError(
                f"text_config={found!r} must be an object: of {architecture} the text part is read, and that says it"
            )
        logger.info("%s: its text part is read (%s); images are not supported", architecture, FAMILIES[text].architecture)
        said = {key: raw[key] for key in _BESIDE if raw.get(key) is not None}
        return {**found, **said, "model_type": text, "architectures": [FAMILIES[text].architecture]}
    return raw


def family_of(model_type: Any, architectures: Any) -> str:
    """The family of a config, by its `model_type` and its `architectures`. Raises ValueError where it is none of ours."""
    known = {name: row for row, family in FAMILIES.items() for name in (family.architecture, *family.aliases)}
    supported = sorted(family.architecture for family in FAMILIES.values())
    named = architectures or []
    if not isinstance(named, list | tuple) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"architectures={architectures!r} must be a list of names")
    if not named and model_type is None:
        raise ValueError(f"names no architecture; `architectures` must hold one of {supported}")
    for name in named:
        if name not in known:
            raise ValueError(f"architecture {name} is not supported; supported: {supported}")
    if model_type is None:
        return known[named[0]]
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {sorted(FAMILIES)}")
    if named and model_type not in (known[name] for name in named):
        raise ValueError(f"model_type {model_type!r} does not belong to the architecture {named}")
    return model_type
