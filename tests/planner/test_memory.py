"""What the planner says each device holds is what the library's own arrays take there."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import tiny

from jaxtp import LLM, Llama, describe, make_mesh
from jaxtp.audit.targets import abstract_llama
from jaxtp.buckets import PAGE
from jaxtp.config import Experts
from jaxtp.generate import memory as at_hand
from jaxtp.planner import Generation, Split, experts, memory, plan
from jaxtp.planner.report import why
from jaxtp.planner.search import splits

CONFIGS = {
    "plain": tiny.config(num_layers=8),
    "tied": tiny.config(tie_word_embeddings=True, vocab_size=131),
    "biases": tiny.config(qkv_bias=True, o_bias=True, mlp_bias=True, num_layers=3),
    "qk-norm": tiny.config(qk_norm=True, head_dim=16),
    "norms on both sides": tiny.config(model_type="gemma2", norm_position="both", norm_form="unit_offset"),
    "norms over all heads": tiny.config(model_type="olmo2", norm_position="post", qk_norm=True, qk_norm_across_heads=True),
    "few KV heads": tiny.config(num_kv_heads=2, num_layers=5),
}
EXPERTS = {
    "mixtral": tiny.config(model_type="mixtral", experts=Experts(8, 2, 24, renormalize=True)),
    "qwen2_moe": tiny.config(model_type="qwen2_moe", qkv_bias=True, experts=Experts(16, 3, 8, shared=32)),
}
MESHES = [{"tp": 1}, {"tp": 2}, {"tp": 8}, {"dp": 2, "tp": 4}, {"pp": 2, "tp": 2}, {"pp": 2}, {"dp": 2, "pp": 2, "tp": 2}]
MESHES += [{"cp": 4, "tp": 2, "over_cp": "slots"}, {"pp": 2, "cp": 2, "over_cp": "slots"}]


@pytest.mark.parametrize(("name", "axes"), list(itertools.product(CONFIGS, MESHES)))
def test_weights_and_cache(name, axes):
    config, split = CONFIGS[name], Split(**axes)
    model = abstract_llama(config, make_mesh(**split.axes), split, dtype="float32")
    assert 4 * memory.params(config, split).total == describe(model).device_bytes
    rows, slots = split.rows(8), 256
    arrays = [a for pair in model.empty_cache(split.groups * rows * slots // PAGE, PAGE).layers for a in pair]
    held = sum(a.dtype.itemsize * int(jax.numpy.prod(jax.numpy.array(a.sharding.shard_shape(a.shape)))) for a in arrays)
    assert rows * slots // split.slot_ranks * memory.slot(config, split, Generation(dtype="float32")) == held


@pytest.mark.parametrize("layout", ["auto", "width"])
@pytest.mark.parametrize("axes", [{"tp": 2}, {"tp": 8}, {"ep": 4}, {"ep": 2, "tp": 2}, {"pp": 2, "ep": 2}, {"cp": 2, "tp": 4}])
@pytest.mark.parametrize("name", EXPERTS)
def test_weights_of_experts(name, axes, layout):
    config, split = EXPERTS[name], Split(**axes, over_cp="slots", expert_layout=layout)
    model = abstract_llama(config, make_mesh(**axes), split, dtype="float32")
    assert 4 * memory.params(config, split).total == describe(model).device_bytes


def test_how_many_experts_tokens_hit():
    """One token its own; many all; in between what drawing at random comes to."""
    config, rng = EXPERTS["qwen2_moe"], np.random.default_rng(0)
    assert experts.hit(config, 1) == pytest.approx(3)
    assert experts.hit(config, 1000) == pytest.approx(16)
    drawn = [len({e for _ in range(5) for e in rng.permutation(16)[:3]}) for _ in range(4000)]
    assert experts.hit(config, 5) == pytest.approx(np.mean(drawn), rel=0.01)


def test_plans_of_experts_try_ep():
    """And leave it out for a dense model; the weights that each GPU holds fall with ep as with tp."""
    found = plan("mixtral-8x7b", "8xH200", prompt_len=512, output_len=64)
    whole = [p for p in found.legal if p.split.ep * p.split.tp == 8]
    assert {(p.split.ep, p.split.tp) for p in whole} == {(1, 8), (2, 4), (4, 2), (8, 1)}
    assert "46.7 billion weights, of which a token meets 12.9" in str(found)
    assert "a step's 1 tokens go to 2 of 8 experts" in why(found.best, found.best)
    assert all(p.split.ep == 1 for p in plan("llama-3.1-8b", "8xH200"))


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (4, 1), (8, 1), (4, 2)])
def test_the_cache_holds_as_many_tokens_as_llm_allocates(tp, cp, tmp_path, monkeypatch):
    """With the memory of a GPU in place of this machine's."""
    folder, gpu = tiny.checkpoint(tmp_path / "model", num_layers=8), 1_500_000  # weights take most of it
    monkeypatch.setattr(at_hand, "_free", lambda model, used, utilization: int(gpu * utilization) - used)
    llm = LLM(folder, tensor_parallel_size=tp, context_parallel_size=cp, progress=False)
    expected = memory.capacity(llm.config, Split(tp=tp, cp=cp, over_cp="slots"), Generation(dtype="float32"), gpu)
    assert llm.budget.cache_tokens == expected > 0


def test_capacity_grows_faster_than_tp():
    """Weights shrink with tp, and what they leave grows: twice the GPUs hold more than twice the tokens."""
    plans = {tp: plan("llama-3.1-8b", f"{tp}xA100-40").best for tp in (1, 2, 4, 8)}
    assert all(p.split.tp == tp for tp, p in plans.items())
    tokens = [p.kv_tokens for p in plans.values()]
    assert tokens == [(int(39.4 * 2**30 * 0.9) - w) // s for w, s in _by_hand()]
    assert tokens[1] > 2.5 * tokens[0]
    assert all(b > 2 * a for a, b in itertools.pairwise(tokens))


def _by_hand():
    """Llama-3.1-8B in bfloat16: bytes of weights, and of a token's keys and values, on each of tp devices."""
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    for tp in (1, 2, 4, 8):
        yield 2 * (32 * (layer // tp + 2 * 4096) + 2 * 128256 * 4096 // tp + 4096), 2 * 32 * 1024 * 2 // tp


def test_zero_and_remat_save_what_they_are_for():
    from jaxtp.planner import Training
    from jaxtp.presets import preset

    def of(**settings):
        return memory.training(preset("llama-3.1-8b"), Split(dp=8, **settings), Training(8, 4096))

    assert of(zero=0).state == 8 * of(zero=1).state == 12 * preset("llama-3.1-8b").num_params
    totals = [of(zero=zero, remat="save-dots", microbatches=1).total for zero in (0, 1, 3)]
    assert totals == sorted(totals, reverse=True)
    kept = [of(zero=1, remat=remat).activations for remat in ("none", "save-dots", "save-attention", "full")]
    assert kept == sorted(kept, reverse=True)


def test_every_split_of_eight_devices_is_tried():
    found = list(splits(8, CONFIGS["plain"], task=Generation()))
    assert len(found) == len({dataclasses.astuple(s) for s in found}) == 11  # with cp where tp has dealt out the KV heads
    assert all(s.size == 8 for s in found)


def test_models_of_every_kind_are_read(tmp_path):
    folder = tiny.checkpoint(tmp_path / "model")
    best = plan(str(folder), "2xL40S", prompt_len=64, output_len=8).best
    assert best.config.hidden_size == Llama.from_pretrained(folder).config.hidden_size
