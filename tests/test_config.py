"""config.json in and out; whatever is not implemented is refused by name."""

import json

import pytest

from jaxtp import PRESETS, ModelConfig, preset

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_round_trip(name):
    assert ModelConfig.from_hf(PRESETS[name].to_hf()) == PRESETS[name]


# total weights as published on each model's card
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.74),
        ("llama-3.1-8b", 8.03),
        ("llama-3.1-70b", 70.55),
        ("llama-3.1-405b", 405.85),
        ("llama-3.2-1b", 1.24),
        ("mistral-7b", 7.24),
        ("qwen2.5-7b", 7.62),
        ("qwen3-8b", 8.19),
        ("qwen3-0.6b", 0.60),
        ("mistral-nemo-12b", 12.25),
        ("ministral-8b", 8.02),
        ("gemma-2b", 2.51),
        ("gemma-7b", 8.54),
        ("gemma-2-2b", 2.61),
        ("gemma-2-9b", 9.24),
        ("gemma-2-27b", 27.23),
        ("gemma-3-1b", 1.00),
        ("gemma-3-4b", 3.88),
        ("gemma-3-27b", 27.01),
        ("phi-4", 14.66),
        ("olmo-2-7b", 7.30),
        ("granite-3.1-8b", 8.17),
        ("smollm3-3b", 3.08),
    ],
)
def test_presets_have_the_published_number_of_weights(name, billions):
    assert preset(name).num_params / 1e9 == pytest.approx(billions, abs=0.006)


def test_old_configs_get_the_family_s_defaults():
    old = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "model_type")}
    config = ModelConfig.from_hf(old)
    assert (config.num_kv_heads, config.head_dim, config.max_position_embeddings, config.rope.theta) == (8, 8, 2048, 10000.0)


def test_transformers_4_and_5_spell_rope_differently_and_mean_the_same():
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    new = {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **llama3}}
    old = {**LLAMA, "rope_scaling": {"type": "llama3", **llama3}, "rope_theta": 5e5}
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}},
            r"rope type 'proportional' is not supported; supported: .*'yarn', 'longrope'",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope type 'llama3' needs low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "spin": 1}}, r"unknown rope settings \['spin'\]"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quant_method=None is not supported; supported: awq, gptq"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"no_rope_layers": [1, 0]}, "settings that jaxtp does not know: no_rope_layers"),
        ({"model_type": "gpt2", "architectures": None}, "model_type 'gpt2' is not supported; supported: .*'llama'"),
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
        ({"model_type": "qwen2"}, "model_type 'qwen2' does not belong to the architecture"),
        ({"architectures": None, "model_type": None}, "names no architecture"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=8; legal"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**LLAMA, **change})


def test_a_config_without_architecture():
    with pytest.raises(ValueError, match=r"names no architecture; `architectures` must hold one of .*LlamaForCausalLM"):
        ModelConfig.from_hf({"hidden_size": 64})


def test_overrides_replace_and_remove():
    config = ModelConfig.from_hf({**LLAMA, "novelty": 1}, overrides={"novelty": None, "rope_theta": 7.0})
    assert config.rope.theta == 7.0


def test_a_missing_folder_and_a_broken_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist; a checkpoint folder holds"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        ModelConfig.from_hf(tmp_path)


def test_window_by_layer():
    qwen = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 9, "max_window_layers": 2}
    assert ModelConfig.from_hf(qwen).windows == (None, None, None)
    assert ModelConfig.from_hf({**qwen, "use_sliding_window": True}).windows == (None, None, 9)


def test_legal_tensor_parallel_sizes():
    assert ModelConfig.from_hf(LLAMA).legal_tp() == (1, 2, 4)  # the MLP width 172 = 4 · 43
    assert preset("llama-3.1-70b").legal_tp() == (1, 2, 4, 8, 16, 32, 64)
    assert preset("qwen2.5-7b").legal_tp() == (1, 2, 4)  # 28 query and 4 KV heads
    json.dumps(preset("llama-3.1-70b").to_hf())


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match=r"no preset named 'llama-9'; known: .*llama-3.1-8b"):
        preset("llama-9")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_scaling": {"rope_type": "default", "factor": 8.0}}, "rope type 'default' has no use for factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}}, "no use for low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "rope_type 'linear' and type 'yarn': which"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor='2' must be a number"),
        ({"rope_theta": 0}, "rope_theta=0.0 must be above 0"),
        ({"max_position_embeddings": "512"}, "max_position_embeddings='512' must be an int of at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
        ({"vocab_size": "512"}, "vocab_size='512' must be an int"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    raw = {"architectures": ["LlamaForCausalLM"], "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 8, **settings}
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(raw)
