"""Rules, plans in Hugging Face's form, checks before any device work, and golden files of the layouts."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny

from jaxtp import Llama, Rules, describe, make_mesh, preset
from jaxtp.sharding import check_layout
from jaxtp.tp_plan import plan_of, rules_from_plan

GOLDEN = Path(__file__).parent / "golden"
TOKENS = np.random.default_rng(0).integers(0, 128, (2, 16))
AUTO = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
    "lm_head": "colwise",
    "embed_tokens": "embedding_rowwise",
}
ATTENTION = {k: v for k, v in AUTO.items() if "self_attn" in k}
MLP = {k: v for k, v in AUTO.items() if "mlp" in k}


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-70b", "qwen3-0.6b", "qwen2.5-7b", "mixtral-8x7b", "qwen3-8b-fp8"])
def test_shardings_and_bytes_are_those_of_the_golden_file(name):
    """UPDATE_GOLDEN=1 writes the files anew."""
    found, config = {}, preset(name)
    for tp, ep in ((1, 1), (2, 1), (4, 1), (8, 1), (1, 8), (2, 4)):
        if tp not in config.legal_tp() or (ep > 1 and not config.experts):
            continue
        rules = Rules().expert_parallel(config, ep=ep, tp=tp)
        llama = Llama(config, mesh=make_mesh(tp=tp, ep=ep), rules=rules, dtype="bfloat16")
        weights = [w for w in describe(llama).weights if ".0." in w.path or "layers" not in w.path]
        cache = llama.empty_cache(ep, 4096).layers[0][0]
        found[f"tp={tp}" if ep == 1 else f"ep={ep} tp={tp}"] = {
            **{w.path: f"{dict(w.dims)} {w.spec} {w.device_bytes}" for w in weights},
            "all weights": describe(llama).device_bytes,
            "cache": f"{cache.shape} {cache.sharding.spec} {np.prod(cache.sharding.shard_shape(cache.shape)) * 2}",
        }
    path = GOLDEN / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(path.read_text())


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-70b"])
def test_weights_and_cache_are_one_tp_th_on_each_device(name):
    whole = describe(Llama(preset(name), mesh=make_mesh(), dtype="bfloat16"))
    norms = sum(w.total_bytes for w in whole.weights if "norm" in w.path)
    for tp in (2, 4, 8):
        llama = Llama(preset(name), mesh=make_mesh(tp=tp), dtype="bfloat16")
        assert describe(llama).device_bytes == (whole.total_bytes - norms) // tp + norms
        cache = llama.empty_cache(1, 4096).layers[0][0]
        assert np.prod(cache.sharding.shard_shape(cache.shape)) == np.prod(cache.shape) // tp


def test_kv_heads_are_replicated_where_tp_exceeds_them():
    llama = Llama(tiny.config(num_kv_heads=2), mesh=make_mesh(tp=4))
    assert llama.layers[0].attention.qkv.get_value().shape == (4, 2 + 2, 8, 64)
    assert llama.empty_cache(1, 16).layers[0][0].shape[1] == 4


def test_a_vocabulary_that_tp_does_not_divide_is_padded():
    llama = Llama(tiny.config(vocab_size=130), mesh=make_mesh(tp=4))
    assert llama.embed.get_value().shape == (132, 64)


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        ({"intermediate_size": 172}, 8, r"tp=8 does not divide the MLP width 172; legal tp for this model: 1, 2, 4"),
        ({}, 3, r"tp=3 does not divide 8 query heads and 4 KV heads .*legal tp for this model: 1, 2, 4, 8"),
        ({"num_heads": 12, "num_kv_heads": 4}, 6, r"4 KV heads \(nor is it a multiple of them\); legal .*: 1, 2, 4, 12"),
    ],
)
def test_illegal_sizes_are_refused_with_the_legal_ones(changes, tp, message):
    with pytest.raises(ValueError, match=message):
        check_layout(tiny.config(**changes), tp, Rules())


def test_rules_refuse_unknown_dims_and_axes_used_twice():
    with pytest.raises(ValueError, match="no dim is named 'feet'"):
        Rules().using(feet="tp")
    with pytest.raises(ValueError, match="would use one mesh axis twice"):
        Llama(tiny.config(), mesh=make_mesh(tp=2), rules=Rules().using(embed="tp"))


def test_describe_prints_and_shows():
    found = describe(Llama(tiny.config(), mesh=make_mesh(dp=2, tp=4)))
    text = str(found)
    assert "layers.*.attention.qkv" in text
    assert "(tp, -, -, -)" in text
    assert "replicated" in text
    assert f"{found.total_bytes / 2**20:,.2f}" in text
    assert "<pre" in found._repr_html_()
    assert found.total_bytes == 4 * tiny.config().num_params


# -- plans ---------------------------------------------------------------------------------------------------------------


def logits(tmp_path, plan, tp=4, **changes):
    folder = tiny.checkpoint(tmp_path / "ckpt", tokenizer=False, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Llama.from_pretrained(folder, mesh=make_mesh(tp=tp), tp_plan=plan, progress=False)
    one = Llama.from_pretrained(folder, mesh=make_mesh(), progress=False)
    return model, np.asarray(model(TOKENS)), np.asarray(one(TOKENS))


PLANS = {
    "auto": "auto",
    "spelled-out": AUTO,
    "with-prefix": {f"model.{k}": v for k, v in AUTO.items() if k != "lm_head"} | {"model.lm_head": "colwise_rep"},
    "attention-only": ATTENTION,
    "mlp-only": MLP,
    "replicated": {"*": "replicate"},
    "one-layer": {"layers.1.mlp.gate_proj": "colwise", "layers.1.mlp.up_proj": "colwise", "layers.1.mlp.down_proj": "rowwise"},
    "gathered": {**AUTO, "lm_head": "colwise_gather_output", "layers.*.mlp.[gu]*": "colwise_gather_output"},
    "rows-first": {"layers.*.mlp.gate_proj": "rowwise", "layers.*.mlp.up_proj": "rowwise", "layers.*.mlp.down_proj": "colwise"},
    "qkv-by-rows": {"layers.*.self_attn.[qkv]_proj": "rowwise_rep", "layers.*.self_attn.o_proj": "replicate"},
    "embedding-by-columns": {"embed_tokens": "embedding_colwise"},
    "sequence-parallel": {**AUTO, "layers.*.input_layernorm": "sequence_parallel",
                          "layers.*.post_attention_layernorm": "sequence_parallel", "norm": "sequence_parallel"},
}  # fmt: skip


OF_A_HEAD = ("gathered", "embedding-by-columns")  # plans for a head that is not the embedding


@pytest.mark.parametrize(
    ("name", "tied"), [*((name, False) for name in PLANS), *((name, True) for name in PLANS if name not in OF_A_HEAD)]
)
def test_every_plan_gives_the_same_logits(tmp_path, name, tied):
    _, found, expected = logits(tmp_path, PLANS[name], tie_word_embeddings=tied)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_a_plan_shards_what_it_names_and_nothing_else(tmp_path):
    model, _, _ = logits(tmp_path, PLANS["one-layer"])
    sharded = [w.path for w in describe(model).weights if not w.replicated]
    assert sharded == ["layers.1.mlp.down", "layers.1.mlp.gate_up"]


def test_plans_are_printed_as_they_are_read():
    config = tiny.config()
    assert plan_of(Rules(), config) == AUTO
    for plan in ("one-layer", "gathered", "rows-first", "sequence-parallel", "attention-only"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rules = rules_from_plan(PLANS[plan], config)
            assert rules_from_plan(plan_of(rules, config), config) == rules


FUSED = {k: v for k, v in AUTO.items() if not k.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))}
FUSED |= {"layers.*.self_attn.qkv_proj": "colwise", "layers.*.mlp.gate_up_proj": "colwise"}


@pytest.mark.parametrize(
    ("changes", "plan", "norms"),
    [
        ({"model_type": "phi3"}, FUSED, ("input", "post_attention")),
        ({"model_type": "olmo2", "norm_position": "post"}, AUTO, ("post_attention", "post_feedforward")),
        (
            {"model_type": "gemma2", "norm_position": "both"},
            AUTO,
            ("input", "post_attention", "pre_feedforward", "post_feedforward"),
        ),
    ],
)
def test_plans_name_the_modules_that_a_family_has(changes, plan, norms):
    config = tiny.config(**changes)
    assert plan_of(Rules(), config) == plan
    plan = {**plan, **{f"layers.*.{norm}_layernorm": "sequence_parallel" for norm in norms}, "norm": "sequence_parallel"}
    rules = rules_from_plan(plan, config)
    assert plan_of(rules, config) == plan
    assert rules_from_plan(plan_of(rules, config), config) == rules
    with pytest.raises(ValueError, match=f"missing on layers.*{norms[-1]}_layernorm"):
        rules_from_plan({k: v for k, v in plan.items() if not k.endswith(f"{norms[-1]}_layernorm")}, config)


def test_what_a_plan_forgets_is_reported():
    with pytest.warns(UserWarning, match=r"leaves these unsharded: embed_tokens, .*layers.\*.mlp.down_proj"):
        rules_from_plan(ATTENTION, tiny.config())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("best", 'a plan is "auto" or a dict of globs to styles'),
        ({"layers.*.mlp.gate_proj": "diagonal"}, "'diagonal' is no style; styles: colwise"),
        ({"layers.*.attn.q_proj": "colwise"}, r"'layers.\*.attn.q_proj' matches no module; modules: embed_tokens"),
        ({**AUTO, "layers.*.mlp.up_proj": "rowwise"}, "one weight here and need one style"),
        ({**AUTO, "norm": "sequence_parallel"}, "missing on layers.*input_layernorm"),
        ({**AUTO, "lm_head": "sequence_parallel"}, "lm_head cannot be sequence_parallel"),
    ],
)
def test_plans_that_make_no_sense_are_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        rules_from_plan(plan, tiny.config())


def test_a_plan_may_allow_what_the_whole_model_does_not():
    """Only attention is sharded: the MLP width need not be divisible."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_layout(tiny.config(intermediate_size=99), 4, rules_from_plan(ATTENTION, tiny.config()))
