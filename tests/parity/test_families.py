"""Random tiny checkpoints of every family and option: logits and greedy tokens equal transformers', at tp 1, 2 and 4."""

import os

import numpy as np
import pytest
from peer import PROMPTS, greedy, logits, read_again, same, tokens, written

from jaxtp import LLM, Llama, make_mesh

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SOFTCAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}
LOCAL = {
    "num_hidden_layers": 3,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 5.0, 9.0]}
LONGROPE = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS}}
CASES = {
    "llama-1": ("Llama", {"num_key_value_heads": 8}),
    "llama-gqa": ("Llama", {}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "kv-replicated": ("Llama", {"num_key_value_heads": 2}),
    "own-head-dim": ("Llama", {"head_dim": 24}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "odd-vocabulary": ("Llama", {"vocab_size": 131}),
    "odd-vocabulary-tied": ("Llama", {"vocab_size": 131, "tie_word_embeddings": True}),
    "attention-bias": ("Llama", {"attention_bias": True, "num_key_value_heads": 2}),
    "mlp-bias": ("Llama", {"mlp_bias": True}),
    "rope-theta": ("Llama", {"rope_theta": 500000.0}),
    "rope-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "rope-dynamic": ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16}),
    "rope-llama3": ("Llama", {"rope_scaling": LLAMA3}),
    "rope-yarn": ("Llama", {"rope_scaling": YARN}),
    "rope-yarn-tuned": (
        "Llama",
        {
            "rope_scaling": {
                **YARN,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.2,
                "truncate": False,
            }
        },
    ),
    "rope-yarn-factor": ("Llama", {"rope_scaling": {**YARN, "attention_factor": 1.3}}),
    "mistral-nemo": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral-window": ("Mistral", {"sliding_window": 7, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "num_key_value_heads": 2}),
    "gemma": ("Gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24, "num_hidden_layers": 3, **SOFTCAPS},
    ),
    "gemma3": (
        "Gemma3",
        {"head_dim": 16, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2 + ["full_attention"], **LOCAL},
    ),
    "phi3": ("Phi3", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "phi3-window": ("Phi3", {"sliding_window": 7}),
    "phi3-partial": ("Phi3", {"hidden_size": 128, "partial_rotary_factor": 0.75}),
    "phi3-longrope": ("Phi3", {"max_position_embeddings": 256, "original_max_position_embeddings": 64, **LONGROPE}),
    "phi3-longrope-long": ("Phi3", {"original_max_position_embeddings": 8, **LONGROPE}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 2}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.5,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "num_hidden_layers": 3, "rope_theta": 5e6}),
    "smollm3-window": (
        "SmolLM3",
        {"no_rope_layers": [1, 0, 1], "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 6},
    ),
    "ministral": (
        "Ministral",
        {"sliding_window": 6, "head_dim": 16, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "qwen3-bias": ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
}


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request, tmp_path_factory):
    """(folder, logits of transformers for a batch of tokens, its greedy completions of PROMPTS)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = written(folder, *CASES[request.param])
    return folder, logits(model, tokens(2)), [greedy(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_logits(checkpoint, tp):
    folder, expected, _ = checkpoint
    model = Llama.from_pretrained(folder, mesh=make_mesh(tp=tp), progress=False)
    found = np.asarray(model(tokens(2)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


# on every mesh where a family differs in what decoding does: its cache, its KV heads, its window, its vocabulary; the others
# in turns, since the logits of each are compared on every mesh (ALL_MESHES=1: each on every mesh)
EVERYWHERE = ("llama-gqa", "kv-replicated", "odd-vocabulary", "mistral-window", "qwen2-window", "qwen3", "gemma2", "olmo2")
EVERYWHERE = tuple(CASES) if "ALL_MESHES" in os.environ else EVERYWHERE
GREEDY = [(case, tp) for i, case in enumerate(CASES) for tp in (1, 2, 4) if case in EVERYWHERE or tp == (1, 2, 4)[i % 3]]


@pytest.mark.parametrize(("checkpoint", "tp"), GREEDY, indirect=["checkpoint"])
def test_greedy_tokens(checkpoint, tp):
    folder, _, expected = checkpoint
    llm = LLM(folder, tensor_parallel_size=tp, progress=False, max_model_len=48)
    same(llm, expected)


def test_round_trip(checkpoint, tmp_path):
    """Loaded on four devices, saved in several files, read by transformers: the same logits; and the same config again."""
    folder, expected, _ = checkpoint
    model = Llama.from_pretrained(folder, mesh=make_mesh(tp=4), progress=False)
    model.save_pretrained(tmp_path / "out", max_shard_bytes=50_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    np.testing.assert_array_equal(logits(read_again(tmp_path / "out"), tokens(2)), expected)
    assert type(model.config).from_hf(tmp_path / "out") == model.config
