"""Configs that people have: in the shape of well-known checkpoints, read as transformers reads them."""

import json
import math

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxtp import ModelConfig
from jaxtp.ops.rope import frequencies

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
}
LLAMA = {**SIZES, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
GENERATION = {
    **{"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "bad_words_ids": None},
    **{"length_penalty": 1.0, "repetition_penalty": 1.0, "return_dict_in_generate": False, "suppress_tokens": None},
}
FOUND = {
    "llama-1": {
        **LLAMA,
        **{"architectures": ["LLaMAForCausalLM"], "max_sequence_length": 2048, "pad_token_id": -1, "bos_token_id": 0},
        **{"eos_token_id": 1, "torch_dtype": "float16", "transformers_version": "4.27.0.dev0"},
    },
    "vicuna-16k": {
        **LLAMA,
        **{"max_position_embeddings": 4096, "max_sequence_length": 16384, "rope_scaling": {"factor": 4.0, "type": "linear"}},
        **{"pretraining_tp": 1, "_name_or_path": "x", "_flash_attn_2_enabled": True},
    },
    "codellama": {**LLAMA, "rope_theta": 1000000, "rope_scaling": None, "max_position_embeddings": 16384},
    "smollm": {
        **LLAMA,
        **{"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"kv_cache_dtype": {"fp16": "x"}}},
        **{"tie_word_embeddings": True, "rope_theta": 100000, "attention_bias": False, "mlp_bias": False, "head_dim": None},
    },
    "whole-generation-config": {**LLAMA, **GENERATION, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
    "yarn-llama-2": {
        **LLAMA,
        **{"rope_scaling": {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True}},
        **{"max_position_embeddings": 65536, "auto_map": {"AutoModelForCausalLM": "modeling_llama_together_yarn.X"}},
    },
    "llama-3.1": {
        **LLAMA,
        **{"rope_scaling": {**LLAMA3, "rope_type": "llama3"}, "rope_theta": 500000.0, "max_position_embeddings": 131072},
        **{"eos_token_id": [97, 98, 99], "dtype": "bfloat16", "mlp_bias": False},
    },
    "written-by-transformers-5": {
        **LLAMA,
        **{"rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 500000.0}, "max_position_embeddings": 131072},
    },
    "nulls": {**LLAMA, "sliding_window": None, "quantization_config": None, "attn_implementation": None, "novelty": None},
    "theta-inside": {**LLAMA, "rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "original-outside": {
        **{**LLAMA, "rope_scaling": {"type": "yarn", "factor": 2.0}, "max_position_embeddings": 128},
        **{"original_max_position_embeddings": 64},
    },
    "yarn-of-deepseek": {
        **LLAMA,
        "rope_scaling": {
            **{"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1},
            **{"mscale": 0.707, "mscale_all_dim": 1.0},
        },
        "max_position_embeddings": 163840,
    },
    "dynamic": {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "mistral-0.1": {**MISTRAL, "sliding_window": 4096, "max_position_embeddings": 32768, "use_cache": True},
    "nemo": {**MISTRAL, "sliding_window": None, "head_dim": 32, "max_position_embeddings": 1024000, "rope_theta": 1e6},
    "distilled-qwen-2.5": {
        **QWEN2,
        **{"use_mrope": False, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 21},
        **{"max_position_embeddings": 131072, "attention_dropout": 0.0, "rope_theta": 10000},
    },
    "windows-by-layer": {**QWEN2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen-2.5-long": {
        **QWEN2,
        **{"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        "max_position_embeddings": 32768,
    },
    "qwen-3": {**QWEN3, "tie_word_embeddings": True, "attention_bias": False, "rope_theta": 1000000, "sliding_window": None},
}


@pytest.mark.parametrize("name", FOUND)
def test_configs_of_known_checkpoints_are_read_as_transformers_reads_them(name):
    ours, raw = ModelConfig.from_hf(FOUND[name]), json.loads(json.dumps(FOUND[name]))
    theirs = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, getattr(theirs, "head_dim", 16) or 16)
    assert (ours.rms_norm_eps, ours.tie_word_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert ours.dtype == (None if theirs.dtype is None else str(theirs.dtype).removeprefix("torch."))
    eos = FOUND[name].get("eos_token_id")
    assert list(ours.eos_token_ids) == (eos if isinstance(eos, list) else [] if eos is None else [eos])
    window = getattr(theirs, "sliding_window", None)
    layers = getattr(theirs, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * 4
    assert list(ours.windows) == [window if kind == "sliding_attention" else None for kind in layers]

    kind = theirs.rope_parameters["rope_type"]
    inv, scale = frequencies(ours.rope, ours.head_dim)
    if kind == "default":
        wanted, factor = theirs.rope_parameters["rope_theta"] ** -(np.arange(0, ours.head_dim, 2) / ours.head_dim), 1.0
    else:
        wanted, factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    np.testing.assert_allclose(inv, np.asarray(wanted), rtol=2e-6)
    assert scale == pytest.approx(factor, rel=1e-6)
    again = ModelConfig.from_hf(ours.to_hf())
    assert again == ours


def test_attn_factor_is_a_factor_on_the_attention_factor(caplog):
    """As vLLM and the checkpoint's makers mean it: 0.878 = 1 / (0.1 ln 4 + 1), so cos and sin are not scaled."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = ModelConfig.from_hf({**QWEN3, "rope_scaling": {**yarn, "attn_factor": 0.8782488562869419}})
    assert frequencies(config.rope, 16)[1] == 1.0
    assert "attn_factor" in caplog.text
    assert frequencies(ModelConfig.from_hf({**QWEN3, "rope_scaling": yarn}).rope, 16)[1] == 0.1 * math.log(4) + 1
    assert config.to_hf()["rope_scaling"]["attention_factor"] == 1.0  # which transformers reads


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": "64"}, "hidden_size='64' must be an int"),
        ({"vocab_size": 100.0}, "vocab_size=100.0 must be an int"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True must be an int"),
        ({"vocab_size": 2**40}, "vocab_size=1099511627776 must be at most 2147483647"),
        ({"tie_word_embeddings": "true"}, "tie_word_embeddings='true' must be true or false"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6' must be a number"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0 must be at least 0"),
        ({"eos_token_id": "2"}, "eos_token_id='2' must be an int, a list of them, or null"),
        ({"eos_token_id": [2, None]}, "eos_token_id=.* must be an int, a list"),
        ({"bos_token_id": [1]}, r"bos_token_id=\[1\] must be an int or null"),
        ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM' must be a list of names"),
        ({"architectures": [5]}, "must be a list of names"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"torch_dtype": ["float16"]}, "dtype .* is not supported"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' must be an object"),
        ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, "rope type .* is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor=True must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor=0 must be above 0"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope type 'su' is not supported; supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope type 'mrope' is not supported"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "unknown rope settings .*mrope_section"),
        ({"rope_theta": "1e6"}, "rope_theta='1e6' must be a number"),
        ({"rope_theta": float("nan")}, "rope_theta=nan must be above 0 and finite"),
        ({"use_mrope": True}, "use_mrope=True is not supported"),
        ({"rope_condense_ratio": 8}, "settings that jaxtp does not know: rope_condense_ratio=8"),
        ({"sliding_window": 512}, "settings that jaxtp does not know: sliding_window=512"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types=.* one for each of 4 layers"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types names others than full_attention"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            r"quantization_config \(gptq\): bits=None is not supported; supported: 4, 8",
        ),
    ],
)
def test_what_cannot_be_is_one_line_that_names_the_file(tmp_path, change, said):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, **change}))
    with pytest.raises(ValueError, match=said) as error:
        ModelConfig.from_hf(tmp_path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("window", [0, -1, True, 2**31, 4096.0, "4096"])
def test_a_sliding_window_is_an_int_that_devices_can_count(window):
    with pytest.raises(ValueError, match=f"sliding_window={window!r} must be"):
        ModelConfig.from_hf({**MISTRAL, "sliding_window": window})
    assert ModelConfig.from_hf({**QWEN2, "sliding_window": window}).windows == (None,) * 4  # it is switched off


@pytest.mark.parametrize("content", ["[]", "5", '"x"', "null", "{", "", "\ufeff[]"])
def test_a_file_that_holds_no_config(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"^\S*config\.json (holds no JSON object|is not valid JSON)"):
        ModelConfig.from_hf(tmp_path)


def test_byte_order_marks_and_other_encodings(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(LLAMA).encode())
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(LLAMA)
    (tmp_path / "config.json").write_bytes(json.dumps(LLAMA).encode("utf-16"))
    with pytest.raises(ValueError, match=r"config\.json is UTF-16"):
        ModelConfig.from_hf(tmp_path)


def test_overrides_reach_rope_in_either_spelling():
    """What is laid over a config counts, wherever the file has it; a new scaling keeps the base."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    new = {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    assert ModelConfig.from_hf(new, overrides={"rope_theta": 7.0}).rope.theta == 7.0
    for spelling in ("rope_scaling", "rope_parameters"):
        rope = ModelConfig.from_hf(new, overrides={spelling: yarn}).rope
        assert (rope.kind, rope.theta, rope.factor) == ("yarn", 5e5, 4.0)
        rope = ModelConfig.from_hf(new, overrides={spelling: None}).rope
        assert (rope.kind, rope.theta) == ("default", 5e5)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("change", "context"),
    [
        ({}, 64),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 256),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.5}}, 160),
        ({"rope_scaling": YARN}, 256),  # Qwen 2.5's recipe: max_position_embeddings is what was trained
        ({"rope_scaling": YARN, "max_position_embeddings": 256}, 256),  # and others': what it comes to
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 256),
        ({"rope_scaling": {**LLAMA3, "rope_type": "llama3"}, "max_position_embeddings": 131072}, 131072),
    ],
)
def test_the_context_is_what_rope_scaling_makes_of_it(change, context):
    config = ModelConfig.from_hf({**LLAMA, "max_position_embeddings": 64, **change})
    assert config.context == context
    config.check_length("x", context)
    if config.rope.kind != "dynamic":
        with pytest.raises(ValueError, match=f"^x={context + 1} exceeds the model's max_position_embeddings="):
            config.check_length("x", context + 1)


def test_whatever_stands_in_a_config_is_read_or_refused():
    """Settings of any type in any place: a ValueError of one line, or a config whose frequencies exist and that comes back."""
    values = [None, True, False, 0, 1, -1, 2**70, 1.5, math.inf, math.nan, "", "2", [], [1], ["a"], {}, {"a": 1}]
    settings = ["type", "rope_type", "factor", "original_max_position_embeddings", "attn_factor", "mscale", "truncate"]
    more = ["rope_parameters", "rope_scaling", "sliding_window", "layer_types", "dtype", "original_max_position_embeddings"]
    rng, read, said = np.random.default_rng(0), 0, []
    for _ in range(3000):
        raw = dict(FOUND[rng.choice(list(FOUND))])
        for _ in range(rng.integers(1, 3)):
            raw[str(rng.choice([*raw, *more]))] = values[rng.integers(len(values))]
        if isinstance(raw.get("rope_scaling"), dict) and rng.random() < 0.5:
            raw["rope_scaling"] = {**raw["rope_scaling"], str(rng.choice(settings)): values[rng.integers(len(values))]}
        try:
            config = ModelConfig.from_hf(raw)
        except ValueError as error:
            said.append(str(error))
            continue
        read += 1
        assert np.isfinite(frequencies(config.rope, config.head_dim)[0]).all()
        assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert 200 < read < 2500
    assert not any("\n" in line for line in said)
