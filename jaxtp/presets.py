"""Well-known models by name, for planning and benchmarks without their weights.

Sizes are those of the published `config.json` of each model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxtp.config import Experts, ModelConfig, Rope
from jaxtp.config.quantization import read

_LLAMA2 = Rope()
_LLAMA3 = Rope(theta=500000.0)


def _llama31(factor: float) -> Rope:
    return Rope(500000.0, "llama3", factor, original_max_position=8192, low_freq_factor=1.0, high_freq_factor=4.0)


def _model(
    kind: str, vocab: int, d: int, f: int, layers: int, heads: int, kv: int, context: int, rope: Rope, **more: Any
) -> ModelConfig:
    return ModelConfig(
        model_type=kind,
        vocab_size=vocab,
        hidden_size=d,
        intermediate_size=f,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        max_position_embeddings=context,
        rope=rope,
        dtype="bfloat16",
        **{"head_dim": d // heads, "rms_norm_eps": 1e-5, **more},
    )


_QWEN2 = {"qkv_bias": True, "rms_norm_eps": 1e-6}
_QWEN3 = {"qk_norm": True, "head_dim": 128, "rms_norm_eps": 1e-6}
_QWEN_ROPE = Rope(theta=1000000.0)

_NEMO = {"head_dim": 128}
_OLMO2 = {"qk_norm": True, "qk_norm_across_heads": True, "norm_position": "post", "norm_form": "float32", "rms_norm_eps": 1e-6}
_GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_scale": 0.0078125,
    "residual_multiplier": 0.22,
    "logits_scaling": 16.0,
    "tie_word_embeddings": True,
}


def _gemma(kind: str, vocab: int, d: int, f: int, layers: int, heads: int, kv: int, context: int, **more: Any) -> ModelConfig:
    settings = {
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "norm_form": "unit_offset",
        "activation": "gelu_tanh",
        "scaled_embedding": True,
        **more,
    }
    return _model(kind, vocab, d, f, layers, heads, kv, context, settings.pop("rope", Rope()), **settings)


def _gemma2(d: int, f: int, layers: int, heads: int, kv: int, *, scalar: int = 256, **more: Any) -> ModelConfig:
    """scalar: the inverse square of the scale of scores."""
    settings = {"norm_position": "both", "attention_scale": scalar**-0.5, "attention_softcap": 50.0, "logits_softcap": 30.0}
    windows = tuple(None if i % 2 else 4096 for i in range(layers))
    return _gemma("gemma2", 256000, d, f, layers, heads, kv, 8192, windows=windows, **settings, **more)


def _gemma3(
    vocab: int, d: int, f: int, layers: int, heads: int, kv: int, *, window: int = 1024, scalar: int = 256, **more: Any
) -> ModelConfig:
    """Their text alone. scalar: as of `_gemma2`."""
    settings = {"norm_position": "both", "qk_norm": True, "attention_scale": scalar**-0.5, "local_rope": Rope(), **more}
    windows = tuple(window if (i + 1) % 6 else None for i in range(layers))
    context, rope = settings.pop("context", 131072), settings.pop("rope", Rope(1e6, "linear", 8.0))
    return _gemma("gemma3_text", vocab, d, f, layers, heads, kv, context, windows=windows, rope=rope, **settings)


def _mixtral(width: int, balance: float) -> Experts:
    return Experts(8, 2, width, renormalize=True, balance=balance)


def _qwen3(width: int) -> Experts:
    return Experts(128, 8, width, renormalize=True)


PRESETS: dict[str, ModelConfig] = {
    "llama-2-7b": _model("llama", 32000, 4096, 11008, 32, 32, 32, 4096, _LLAMA2),
    "llama-2-13b": _model("llama", 32000, 5120, 13824, 40, 40, 40, 4096, _LLAMA2),
    "llama-2-70b": _model("llama", 32000, 8192, 28672, 80, 64, 8, 4096, _LLAMA2),
    "llama-3-8b": _model("llama", 128256, 4096, 14336, 32, 32, 8, 8192, _LLAMA3),
    "llama-3-70b": _model("llama", 128256, 8192, 28672, 80, 64, 8, 8192, _LLAMA3),
    "llama-3.1-8b": _model("llama", 128256, 4096, 14336, 32, 32, 8, 131072, _llama31(8.0)),
    "llama-3.1-70b": _model("llama", 128256, 8192, 28672, 80, 64, 8, 131072, _llama31(8.0)),
    "llama-3.1-405b": _model("llama", 128256, 16384, 53248, 126, 128, 8, 131072, _llama31(8.0)),
    "llama-3.2-1b": _model("llama", 128256, 2048, 8192, 16, 32, 8, 131072, _llama31(32.0), tie_word_embeddings=True),
    "llama-3.2-3b": _model("llama", 128256, 3072, 8192, 28, 24, 8, 131072, _llama31(32.0), tie_word_embeddings=True),
    "llama-3.3-70b": _model("llama", 128256, 8192, 28672, 80, 64, 8, 131072, _llama31(8.0)),
    "tinyllama-1.1b": _model("llama", 32000, 2048, 5632, 22, 32, 4, 2048, _LLAMA2),
    "mistral-7b": _model("mistral", 32000, 4096, 14336, 32, 32, 8, 32768, _LLAMA2, windows=(4096,) * 32),
    "mistral-nemo-12b": _model("mistral", 131072, 5120, 14336, 40, 32, 8, 131072, _QWEN_ROPE, **_NEMO),
    "ministral-8b": _model("mistral", 131072, 4096, 12288, 36, 32, 8, 32768, Rope(theta=1e8), **_NEMO, windows=(32768,) * 36),
    "gemma-2b": _gemma("gemma", 256000, 2048, 16384, 18, 8, 1, 8192),
    "gemma-7b": _gemma("gemma", 256000, 3072, 24576, 28, 16, 16, 8192),
    "gemma-2-2b": _gemma2(2304, 9216, 26, 8, 4),
    "gemma-2-9b": _gemma2(3584, 14336, 42, 16, 8),
    "gemma-2-27b": _gemma2(4608, 36864, 46, 32, 16, scalar=144, head_dim=128),
    "gemma-3-1b": _gemma3(262144, 1152, 6912, 26, 4, 1, window=512, context=32768, rope=_QWEN_ROPE),
    "gemma-3-4b": _gemma3(262208, 2560, 10240, 34, 8, 4),
    "gemma-3-12b": _gemma3(262208, 3840, 15360, 48, 16, 8),
    "gemma-3-27b": _gemma3(262208, 5376, 21504, 62, 32, 16, scalar=168, head_dim=128),
    "phi-4": _model("phi3", 100352, 5120, 17920, 40, 40, 10, 16384, Rope(theta=250000.0)),
    "olmo-2-7b": _model("olmo2", 100352, 4096, 11008, 32, 32, 32, 4096, _LLAMA3, **_OLMO2),
    "olmo-2-13b": _model("olmo2", 100352, 5120, 13824, 40, 40, 40, 4096, _LLAMA3, **_OLMO2),
    "granite-3.1-8b": _model("granite", 49155, 4096, 12800, 40, 32, 8, 131072, Rope(theta=1e7), **_GRANITE),
    "smollm3-3b": _model(
        "smollm3",
        128256,
        2048,
        11008,
        36,
        16,
        4,
        65536,
        Rope(theta=5e6),
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rotated=tuple((i + 1) % 4 != 0 for i in range(36)),
    ),
    "mixtral-8x7b": _model("mixtral", 32000, 4096, 14336, 32, 32, 8, 32768, _QWEN_ROPE, experts=_mixtral(14336, 0.02)),
    "mixtral-8x22b": _model("mixtral", 32000, 6144, 16384, 56, 48, 8, 65536, _QWEN_ROPE, experts=_mixtral(16384, 0.001)),
    "qwen2.5-7b": _model("qwen2", 152064, 3584, 18944, 28, 28, 4, 131072, _QWEN_ROPE, **_QWEN2),
    "qwen2.5-72b": _model("qwen2", 152064, 8192, 29568, 80, 64, 8, 131072, _QWEN_ROPE, **_QWEN2),
    "qwen3-0.6b": _model("qwen3", 151936, 1024, 3072, 28, 16, 8, 40960, _QWEN_ROPE, **_QWEN3, tie_word_embeddings=True),
    "qwen3-8b": _model("qwen3", 151936, 4096, 12288, 36, 32, 8, 40960, _QWEN_ROPE, **_QWEN3),
    "qwen3-32b": _model("qwen3", 151936, 5120, 25600, 64, 64, 8, 40960, _QWEN_ROPE, **_QWEN3),
    "qwen3-30b-a3b": _model("qwen3_moe", 151936, 2048, 6144, 48, 32, 4, 40960, _QWEN_ROPE, **_QWEN3, experts=_qwen3(768)),
    "qwen3-235b-a22b": _model("qwen3_moe", 151936, 4096, 12288, 94, 64, 4, 40960, _QWEN_ROPE, **_QWEN3, experts=_qwen3(1536)),
}


def _quantized(name: str, said: dict[str, Any]) -> ModelConfig:
    return replace(PRESETS[name], schemes=read(said))


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
# Meta's own leaves attention, and the first and the last MLP, in bfloat16
_META = {
    "quant_method": "fbgemm_fp8",
    "modules_to_not_convert": ["self_attn", "model.layers.0.mlp", "model.layers.125.mlp", "lm_head"],
}
PRESETS |= {
    "llama-3.1-8b-awq": _quantized("llama-3.1-8b", _AWQ),
    "llama-3.1-8b-gptq": _quantized("llama-3.1-8b", _GPTQ),
    "llama-3.1-70b-awq": _quantized("llama-3.1-70b", _AWQ),
    "llama-3.1-70b-gptq": _quantized("llama-3.1-70b", _GPTQ),
    "llama-3.1-405b-fp8": _quantized("llama-3.1-405b", _META),
    "llama-3.1-405b-awq": _quantized("llama-3.1-405b", _AWQ),
    "qwen2.5-72b-awq": _quantized("qwen2.5-72b", _AWQ),
    "qwen3-8b-awq": _quantized("qwen3-8b", _AWQ),
    "qwen3-8b-fp8": _quantized("qwen3-8b", _BLOCKS),
    "qwen3-32b-awq": _quantized("qwen3-32b", _AWQ),
    "qwen3-32b-fp8": _quantized("qwen3-32b", _BLOCKS),
    "qwen3-30b-a3b-fp8": _quantized("qwen3-30b-a3b", _BLOCKS),
}


def preset(name: str) -> ModelConfig:
    """The named model's config. Raises ValueError with the known names."""
    if name not in PRESETS:
        raise ValueError(f"no preset named {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
