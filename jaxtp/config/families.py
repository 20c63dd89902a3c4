"""What each `model_type` of Hugging Face fixes: one row a family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtp.config.experts import ExpertKeys


@dataclass(frozen=True)
class Family:
    """One row. Biases None: the config says (`attention_bias`, `mlp_bias`). defaults: of keys that a config leaves out."""

    architecture: str
    aliases: tuple[str, ...] = ()  # older names of the architecture
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    mlp_bias: bool | None = False
    qk_norm: bool = False
    windowed: bool = False  # `sliding_window` holds for every layer
    window_switch: bool = False  # `use_sliding_window`, `max_window_layers`, `layer_types` choose the layers
    experts: ExpertKeys | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


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
}


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
