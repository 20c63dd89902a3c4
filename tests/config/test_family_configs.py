"""Configs of families beside Llama, in the shape of their well-known checkpoints: read as transformers reads them, and back."""

import json
import logging

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxtp import ModelConfig
from jaxtp.ops.rope import frequencies

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "vocab_size": 100}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA = {
    **{**SIZES, **HEADS, "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "head_dim": 32},
    **{"hidden_act": "gelu", "hidden_activation": None, "rope_scaling": None, "rope_theta": 10000.0},
}
GEMMA2 = {
    **{**SIZES, **HEADS, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 32},
    **{"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
    **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 144},
    **{"sliding_window": 4096, "sliding_window_size": 4096, "attention_bias": False, "eos_token_id": 1, "bos_token_id": 2},
}
GEMMA3 = {
    **{**SIZES, **HEADS, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 32},
    **{"hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None, "final_logit_softcapping": None},
    **{"query_pre_attn_scalar": 168, "rope_local_base_freq": 10000, "rope_theta": 1000000, "sliding_window": 512},
    **{"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window_pattern": 6, "cache_implementation": "hybrid"},
}
NESTED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA3_NESTED = {k: v for k, v in GEMMA3.items() if k not in ("rope_scaling", "rope_theta", "rope_local_base_freq")}
GEMMA3_NESTED |= {"rope_parameters": NESTED}
# what the 4B names of itself; the rest are transformers' defaults
GEMMA3_4B = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
GEMMA3_4B |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
MULTIMODAL = {
    **{"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": GEMMA3_4B},
    **{"vision_config": {"model_type": "siglip_vision_model"}, "boi_token_index": 255999, "mm_tokens_per_image": 256},
    **{"torch_dtype": "bfloat16", "eos_token_id": [1, 106]},
}
PHI3 = {
    **{**SIZES, **HEADS, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_act": "silu"},
    **{"embd_pdrop": 0.0, "resid_pdrop": 0.0, "rope_theta": 10000.0, "rope_scaling": None, "sliding_window": 2047},
    **{"original_max_position_embeddings": 4096, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}},
}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.5, 1.7, 2], "long_factor": [1.0, 1.4, 2.0, 5.0, 9.0, 33]}
PHI4_MINI = {
    **{**PHI3, "partial_rotary_factor": 0.75, "rope_scaling": {**FACTORS, "type": "longrope"}, "tie_word_embeddings": True},
    **{"max_position_embeddings": 131072, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False},
}
EIGHT = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
OLMO2 = {**SIZES, **HEADS, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "rope_theta": 500000}
GRANITE = {
    **{**SIZES, **HEADS, "architectures": ["GraniteForCausalLM"], "model_type": "granite", "mlp_bias": False},
    **{"attention_multiplier": 0.0078125, "embedding_multiplier": 12.0, "logits_scaling": 16.0, "residual_multiplier": 0.22},
}
SMOLLM3 = {
    **{**SIZES, **HEADS, "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "no_rope_layer_interval": 4},
    **{"no_rope_layers": [1, 1, 1, 0, 1, 1], "layer_types": ["full_attention"] * 6, "max_window_layers": 28},
    **{"use_sliding_window": False, "sliding_window": None, "rope_scaling": None, "rope_theta": 5000000.0},
}
MINISTRAL = {**SIZES, **HEADS, "architectures": ["MinistralForCausalLM"], "model_type": "ministral", "head_dim": 32}
FOUND = {
    "gemma": GEMMA,
    "gemma-2": GEMMA2,
    "gemma-2-by-layer": {**GEMMA2, "layer_types": ["full_attention", *["sliding_attention"] * 5]},
    "gemma-3": GEMMA3,
    "gemma-3-written-by-transformers-5": GEMMA3_NESTED,
    "gemma-3-4b": GEMMA3_4B,
    "phi-3": PHI3,
    "phi-3-long": {**PHI3, "max_position_embeddings": 131072, "rope_scaling": {**EIGHT, "type": "longrope"}},
    "phi-4-mini": PHI4_MINI,
    "olmo-2": OLMO2,
    "granite": GRANITE,
    "smollm3": SMOLLM3,
    "smollm3-by-interval": {k: v for k, v in SMOLLM3.items() if k not in ("no_rope_layers", "layer_types")},
    "ministral": {**MINISTRAL, "layer_types": ["full_attention", "sliding_attention"] * 3},
    "ministral-all": {**MINISTRAL, "sliding_window": 9},
}


def theirs_of(raw):
    raw = json.loads(json.dumps(raw))
    return transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)


@pytest.mark.parametrize("name", FOUND)
def test_configs_are_read_as_transformers_reads_them_and_written_as_it_reads_them(name):
    ours = ModelConfig.from_hf(FOUND[name])
    for theirs in (theirs_of(FOUND[name]), theirs_of(ours.to_hf())):
        same_config(ours, theirs)
    assert ModelConfig.from_hf(ours.to_hf()) == ours
    assert ModelConfig.from_hf(json.loads(theirs_of(ours.to_hf()).to_json_string(use_diff=False))) == ours


def same_config(ours, theirs):
    names = {"max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "vocab_size", "hidden_size", "intermediate_size"}
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert (ours.num_layers, ours.num_heads) == (theirs.num_hidden_layers, theirs.num_attention_heads)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads

    act = theirs.hidden_activation if ours.model_type in ("gemma2", "gemma3_text") else theirs.hidden_act
    assert ours.activation == {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}[act]
    multipliers = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    if ours.model_type == "granite":
        assert [getattr(ours, name) for name in multipliers] == [getattr(theirs, name) for name in multipliers]
        assert ours.attention_scale == theirs.attention_multiplier
    elif hasattr(theirs, "query_pre_attn_scalar"):
        assert ours.attention_scale == theirs.query_pre_attn_scalar**-0.5
        assert (ours.attention_softcap, ours.logits_softcap) == (theirs.attn_logit_softcapping, theirs.final_logit_softcapping)

    window = getattr(theirs, "sliding_window", None)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * ours.num_layers
    assert list(ours.windows) == [window if kind == "sliding_attention" else None for kind in kinds]
    turns = getattr(theirs, "no_rope_layers", [1] * ours.num_layers)
    assert [kind.rope is not None for kind in ours.kinds] == [bool(each) for each in turns]

    spelled = theirs.rope_parameters
    ropes = [(ours.rope, spelled, None)]
    if "full_attention" in spelled:
        ropes = [(ours.rope, spelled["full_attention"], "full_attention")]
        ropes += [(ours.local_rope, spelled["sliding_attention"], "sliding_attention")]
    for rope, params, layer_type in ropes:
        inv, scale = frequencies(rope, ours.head_dim)
        turned = int(ours.head_dim * params.get("partial_rotary_factor", 1.0))
        wanted, factor = params["rope_theta"] ** -(np.arange(0, turned, 2) / turned), 1.0
        if params["rope_type"] != "default":
            wanted, factor = ROPE_INIT_FUNCTIONS[params["rope_type"]](theirs, "cpu", layer_type=layer_type)
        np.testing.assert_allclose(inv, np.asarray(wanted), rtol=2e-6)
        assert scale == pytest.approx(factor, rel=1e-6)


def test_of_a_multimodal_checkpoint_the_text_is_read(caplog):
    caplog.set_level(logging.INFO, logger="jaxtp")
    config = ModelConfig.from_hf(MULTIMODAL)
    assert "its text part is read (Gemma3ForCausalLM); images are not supported" in caplog.text
    text = theirs_of(GEMMA3_4B)
    same_config(config, text)
    assert (config.dtype, config.eos_token_ids, config.bos_token_id) == ("bfloat16", (1, 106), 2)
    assert config.to_hf()["architectures"] == ["Gemma3ForCausalLM"]
    # the factor of its RoPE is in max_position_embeddings already
    assert config.context == config.max_position_embeddings == 131072
    with pytest.raises(ValueError, match="text_config=None must be an object: of Gemma3ForConditionalGeneration"):
        ModelConfig.from_hf({**MULTIMODAL, "text_config": None})


def test_what_transformers_4_reads_of_longrope():
    """It takes three fields, under these names alone, and the context of pre-training outside."""
    written = ModelConfig.from_hf(PHI4_MINI).to_hf()
    assert written["rope_scaling"] == {"type": "longrope", **{k: list(map(float, v)) for k, v in FACTORS.items()}}
    assert (written["original_max_position_embeddings"], written["partial_rotary_factor"]) == (4096, 0.75)


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_longrope_under_its_first_names(name):
    first, now = ({**PHI3, "max_position_embeddings": 131072, "rope_scaling": {**EIGHT, "type": t}} for t in (name, "longrope"))
    assert ModelConfig.from_hf(first) == ModelConfig.from_hf(now)


def test_what_transformers_4_reads_of_local_rope():
    written = ModelConfig.from_hf(GEMMA3_NESTED).to_hf()
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (1e6, 1e4)
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({**GEMMA, "hidden_act": "silu"}, r"hidden_act='silu' is not supported; supported: \['gelu', 'gelu_pytorch_tanh'\]"),
        ({**GEMMA2, "hidden_activation": "gelu"}, r"hidden_activation='gelu' is not supported; supported: \['gelu_pytorch"),
        ({**OLMO2, "hidden_act": ["silu"]}, r"hidden_act=\['silu'\] is not supported"),
        ({**GEMMA2, "query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0 must be at least 1"),
        ({**GEMMA2, "attn_logit_softcapping": "50"}, "attn_logit_softcapping='50' must be a number"),
        ({**GEMMA2, "final_logit_softcapping": -1.0}, "final_logit_softcapping=-1.0 must be above 0 and finite"),
        ({**GEMMA2, "sliding_window": None, "sliding_window_size": None}, "sliding_attention, which needs sliding_window"),
        ({**GEMMA2, "sliding_window_size": 5}, "sliding_window=4096 and sliding_window_size=5: which"),
        ({**GEMMA2, "use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ({**GEMMA3, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        ({**GEMMA3, "rope_local_base_freq": "x"}, "rope_theta='x' must be a number"),
        ({**GEMMA3, "sliding_window_pattern": 0}, "sliding_window_pattern=0 must be at least 1"),
        (
            {**GEMMA3_NESTED, "rope_parameters": {**NESTED, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "sliding_attention has the rope type 'linear'; only default is supported",
        ),
        ({**GEMMA3_NESTED, "rope_parameters": {**NESTED, "full_attention": 5}}, "must hold an object for each type of layers"),
        (
            {**PHI3, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope type 'linear' is not supported for this model_type",
        ),
        ({**PHI3, "partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5 must be above 0 and at most 1"),
        ({**PHI3, "partial_rotary_factor": "1"}, "partial_rotary_factor='1' must be a number"),
        ({**PHI3, "partial_rotary_factor": 0.2}, "head_dim=16 · partial_rotary_factor=0.2 must be even"),
        ({**OLMO2, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported for this model_type"),
        (
            {**PHI4_MINI, "partial_rotary_factor": 0.5},
            "short_factor in rope_scaling has 6 numbers; 8 channels turn, in 4 pairs",
        ),
        ({**PHI3, "rope_scaling": {"type": "longrope"}}, "rope type 'longrope' needs short_factor"),
        (
            {**PHI3, "rope_scaling": {**EIGHT, "type": "longrope", "long_factor": 2}},
            "long_factor=2 in rope_scaling must be a list",
        ),
        ({**PHI3, "rope_scaling": {**EIGHT, "type": "longrope", "long_factor": [0.0] * 8}}, "long_factor in .* above 0"),
        (
            {**PHI3, "rope_scaling": {**EIGHT, "type": "longrope"}, "original_max_position_embeddings": 1},
            "'longrope' needs original_max_position_embeddings above 1, not 1",
        ),
        ({**PHI3, "lm_head_bias": True}, "lm_head_bias=True is not supported"),
        ({**GRANITE, "residual_multiplier": None}, "residual_multiplier=None must be a number"),
        ({**GRANITE, "logits_scaling": 0}, "logits_scaling=0 must be above 0 and finite"),
        ({**OLMO2, "embedding_multiplier": 2.0}, "settings that jaxtp does not know: embedding_multiplier=2.0"),
        ({**SMOLLM3, "no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\] must be a list of a 1 .* for each of 6 layers"),
        ({**SMOLLM3, "no_rope_layers": [1, 0, 2, 1, 1, 1]}, "no_rope_layers=.* must be a list"),
        ({**SMOLLM3, "no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval=0 must be at least 1"),
        ({**SMOLLM3, "layer_types": ["sliding_attention"] * 6}, "layer_types names others than full_attention"),
    ],
)
def test_what_cannot_be_is_refused_by_name(raw, said):
    with pytest.raises(ValueError, match=said) as error:
        ModelConfig.from_hf(raw)
    assert "\n" not in str(error.value)


def test_experts_have_one_activation():
    mixtral = {**SIZES, **HEADS, "model_type": "mixtral", "hidden_act": "gelu_pytorch_tanh"}
    with pytest.raises(ValueError, match="experts have SwiGLU alone; the activation 'gelu_tanh' is not supported with them"):
        ModelConfig.from_hf(mixtral)


def test_whatever_stands_in_a_config_is_read_or_refused():
    values = [None, True, False, 0, 1, -1, 2**70, 1.5, float("inf"), float("nan"), "", "2", [], [1], ["a"], {}, {"a": 1}]
    rng, read, said = np.random.default_rng(0), 0, []
    for _ in range(2000):
        raw = dict([*FOUND.values(), MULTIMODAL][rng.integers(len(FOUND) + 1)])
        raw[str(rng.choice([*raw, "rope_parameters", "layer_types"]))] = values[rng.integers(len(values))]
        try:
            config = ModelConfig.from_hf(raw)
        except ValueError as error:
            said.append(str(error))
            continue
        read += 1
        assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert 200 < read < 1800
    assert not any("\n" in line for line in said)
