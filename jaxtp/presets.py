"""Well-known models by name, for planning and benchmarks without their weights.

Sizes are those of the published `config.json` of each model.
"""

from __future__ import annotations

from typing import Any

from jaxtp.config import ModelConfig, Rope

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
    "qwen2.5-7b": _model("qwen2", 152064, 3584, 18944, 28, 28, 4, 131072, _QWEN_ROPE, **_QWEN2),
    "qwen2.5-72b": _model("qwen2", 152064, 8192, 29568, 80, 64, 8, 131072, _QWEN_ROPE, **_QWEN2),
    "qwen3-0.6b": _model("qwen3", 151936, 1024, 3072, 28, 16, 8, 40960, _QWEN_ROPE, **_QWEN3, tie_word_embeddings=True),
    "qwen3-8b": _model("qwen3", 151936, 4096, 12288, 36, 32, 8, 40960, _QWEN_ROPE, **_QWEN3),
    "qwen3-32b": _model("qwen3", 151936, 5120, 25600, 64, 64, 8, 40960, _QWEN_ROPE, **_QWEN3),
}


def preset(name: str) -> ModelConfig:
    """The named model's config. Raises ValueError with the known names."""
    if name not in PRESETS:
        raise ValueError(f"no preset named {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
