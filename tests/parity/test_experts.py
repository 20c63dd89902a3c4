"""Random tiny mixtures of experts: logits, greedy tokens and checkpoints equal transformers', on their meshes."""

import dataclasses
import os

import numpy as np
import pytest
import torch
import transformers
from peer import PROMPTS, greedy, logits, read_again, same, tokens, written
from safetensors.numpy import load_file, save_file

from jaxtp import LLM, Llama, make_mesh
from jaxtp.config import ModelConfig
from jaxtp.weights import describe

CASES = {
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "mixtral-odd": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 7}),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
        },
    ),
    "qwen2-moe-renormalized": (
        "Qwen2Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 16},
    ),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32}),
    "qwen3-moe-dense-first": (
        "Qwen3Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [0],
            "num_hidden_layers": 3,
            "head_dim": 16,
        },
    ),
}
MESHES = [{}, {"tp": 2}, {"tp": 4}, {"ep": 2}, {"ep": 4}, {"ep": 2, "tp": 2}, {"dp": 2, "ep": 2}]


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request, tmp_path_factory):
    """(name, folder, logits of transformers for a batch of tokens, its greedy completions of PROMPTS)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = written(folder, *CASES[request.param])
    return request.param, folder, logits(model, tokens(4)), [greedy(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("layout", ["whole", "width"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_logits(checkpoint, mesh, layout):
    name, folder, expected, _ = checkpoint
    parts = mesh.get("ep", 1) * mesh.get("tp", 1)
    if layout == "whole" and name == "mixtral-odd" and parts == 4:
        cut = "ep=4 does not divide the 6" if mesh.get("ep") == 4 else "would cut the 6 experts by ep·tp=4, which does not"
        with pytest.raises(ValueError, match=cut):
            Llama.from_pretrained(folder, mesh=make_mesh(**mesh), expert_layout=layout, progress=False)
        return
    if layout == "width" and mesh.get("tp", 1) == 1:
        return  # the same program
    model = Llama.from_pretrained(folder, mesh=make_mesh(**mesh), expert_layout=layout, progress=False)
    np.testing.assert_allclose(np.asarray(model(tokens(4))), expected, atol=1e-5, rtol=1e-5)


GREEDY = {
    "mixtral": [{"tp": 2}, {"ep": 2}, {"pp": 2, "ep": 2}],
    "mixtral-odd": [{"tp": 4}],
    "qwen2-moe": [{"ep": 2, "tp": 2}, {"pp": 2}],
    "qwen2-moe-renormalized": [{}],
    "qwen3-moe": [{"ep": 4}, {"dp": 2, "ep": 2}, {"pp": 2, "tp": 2}],
    "olmoe": [{"ep": 2, "tp": 2}],
    "qwen3-moe-dense-first": [{"ep": 2}],
}
if "ALL_MESHES" in os.environ:
    # 6 experts; stages of which one has another pattern than the other
    STAGES = [{"pp": 2}, {"pp": 2, "tp": 2}, {"pp": 2, "ep": 2}]
    CANNOT = {"mixtral-odd": [{"ep": 4}], "qwen3-moe-dense-first": STAGES}
    EVERY = [*MESHES, *STAGES]
    GREEDY = {name: [mesh for mesh in EVERY if mesh not in CANNOT.get(name, [])] for name in CASES}
NAMES = {"tp": "tensor_parallel_size", "ep": "expert_parallel_size", "dp": "data_parallel_size", "pp": "pipeline_parallel_size"}


@pytest.mark.parametrize(
    ("checkpoint", "mesh"), [(case, mesh) for case, each in GREEDY.items() for mesh in each], indirect=["checkpoint"], ids=str
)
def test_greedy_tokens(checkpoint, mesh):
    _, folder, _, expected = checkpoint
    llm = LLM(folder, progress=False, max_model_len=48, **{NAMES[axis]: size for axis, size in mesh.items()})
    same(llm, expected)


def test_round_trip(checkpoint, tmp_path):
    """Loaded with experts on four devices, saved in several files, read by transformers: the same logits, the same config."""
    _, folder, expected, _ = checkpoint
    model = Llama.from_pretrained(folder, mesh=make_mesh(ep=2, tp=2), progress=False)
    model.save_pretrained(tmp_path / "out", max_shard_bytes=50_000)
    np.testing.assert_array_equal(logits(read_again(tmp_path / "out"), tokens(4)), expected)
    assert type(model.config).from_hf(tmp_path / "out") == model.config


def test_all_tokens_on_one_expert(tmp_path):
    """A router that sends everything to the experts 2 and 5, so that the others get nothing: the same as transformers."""

    def change(model):
        model.model.embed_tokens.weight[:, 0] = 10  # the first channel, which alone is looked at, is always positive
        for layer in model.model.layers:
            layer.mlp.gate.weight[:] = 0
            layer.mlp.gate.weight[:, 0] = torch.tensor([0.0, -1, 2, -2, -3, 1.5, -4, -5])

    model = written(tmp_path, *CASES["mixtral"], change)
    expected = logits(model, tokens(4))
    for mesh in ({}, {"tp": 4}, {"ep": 4}, {"ep": 2, "tp": 2}):
        found = np.asarray(Llama.from_pretrained(tmp_path, mesh=make_mesh(**mesh), progress=False)(tokens(4)))
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_eight_bits_are_the_same_on_every_mesh(tmp_path):
    written(tmp_path, *CASES["qwen3-moe"])
    alone, *others = [
        np.asarray(Llama.from_pretrained(tmp_path, mesh=make_mesh(**mesh), quantization="int8", progress=False)(tokens(4)))
        for mesh in ({}, {"tp": 2}, {"ep": 2, "tp": 2})
    ]
    plain = np.asarray(Llama.from_pretrained(tmp_path, progress=False)(tokens(4)))
    assert 1e-4 < np.abs(alone - plain).max() < 0.3
    for other in others:
        np.testing.assert_allclose(other, alone, atol=1e-5, rtol=1e-5)


def test_each_device_holds_its_own_experts_alone(tmp_path):
    written(tmp_path, *CASES["qwen3-moe"])
    model = Llama.from_pretrained(tmp_path, mesh=make_mesh(ep=4, tp=2), progress=False)
    moe = model.layers[0].moe
    assert {shard.data.shape for shard in moe.gate_up[...].addressable_shards} == {(1, 32, 2, 64)}
    widths = Llama.from_pretrained(tmp_path, mesh=make_mesh(ep=4, tp=2), expert_layout="width", progress=False)
    assert {shard.data.shape for shard in widths.layers[0].moe.down[...].addressable_shards} == {(2, 64, 16)}
    for mine in (moe, widths.layers[0].moe):
        assert {shard.data.shape for shard in mine.router[...].addressable_shards} == {(8, 64)}


def test_sequence_parallel(tmp_path):
    model = written(tmp_path, *CASES["qwen2-moe"])
    expected = logits(model, tokens(4))
    for mesh in ({"tp": 4}, {"ep": 2, "tp": 2}):
        laid = Llama.from_pretrained(tmp_path, mesh=make_mesh(**mesh), sequence_parallel=True, progress=False)
        np.testing.assert_allclose(np.asarray(laid(tokens(4))), expected, atol=1e-5, rtol=1e-5)


def test_what_cannot_be(tmp_path):
    written(tmp_path, *CASES["mixtral"])
    with pytest.raises(ValueError, match=r"ep=3 does not divide the 8 experts; legal ep for this model: 1, 2, 4, 8"):
        Llama.from_pretrained(tmp_path, mesh=make_mesh(ep=3), progress=False)
    with pytest.raises(ValueError, match="ep=2 is for experts, of which this llama has none; use dp or tp"):
        LLM("demo", expert_parallel_size=2, progress=False)
    with pytest.raises(ValueError, match="expert_layout='halves' is none of auto, whole, width"):
        Llama.from_pretrained(tmp_path, expert_layout="halves", progress=False)
    with pytest.raises(ValueError, match="expert_kernel='fast' is none of reference, chosen, pairs, every, blocks"):
        Llama.from_pretrained(tmp_path, expert_kernel="fast", progress=False)
    with pytest.raises(ValueError, match="expert_kernel='grouped' needs Hopper GPUs"):
        Llama.from_pretrained(tmp_path, expert_kernel="grouped", progress=False)
    with pytest.raises(ValueError, match='a mixture of experts takes "auto"'):
        Llama.from_pretrained(tmp_path, tp_plan={"lm_head": "colwise"}, progress=False)
    config = Llama.from_pretrained(tmp_path, progress=False).config
    with pytest.raises(ValueError, match="num_experts_per_tok=9 exceeds num_experts=8"):
        type(config).from_hf(tmp_path, overrides={"num_experts_per_tok": 9})
    with pytest.raises(ValueError, match="num_local_experts=8 and num_experts=4: which"):
        type(config).from_hf(tmp_path, overrides={"num_experts": 4})
    with pytest.raises(ValueError, match=r"router_jitter_noise=0\.1 is not supported"):
        type(config).from_hf(tmp_path, overrides={"router_jitter_noise": 0.1})


def test_missing_experts_are_named(tmp_path):
    written(tmp_path, *CASES["mixtral"])
    tensors = load_file(tmp_path / "model.safetensors")
    gone = [tensors.pop(name) for name in [*tensors] if ".1.block_sparse_moe.experts.3." in name]
    assert len(gone) == 3
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.block_sparse_moe\.experts\.3\.w2\.weight, "):
        Llama.from_pretrained(tmp_path, progress=False)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_defaults_are_those_of_transformers(family):
    theirs = transformers.AutoConfig.for_model(family)
    config = ModelConfig.from_hf(theirs.to_dict())
    assert config.experts.count == theirs.num_experts
    assert config.experts.per_token == theirs.num_experts_per_tok
    sparse = {"model_type": family, "vocab_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 32}
    told = ModelConfig.from_hf({**sparse, "intermediate_size": 128})
    assert dataclasses.replace(told.experts, width=config.experts.width) == config.experts


def test_number_of_weights(checkpoint):
    _, folder, _, _ = checkpoint
    model = Llama.from_pretrained(folder, progress=False)
    held = sum(weight.total_bytes for weight in describe(model).weights) // 4
    assert model.config.num_params == held
    experts = model.config.experts
    idle = sum(model.config.sparse) * (experts.count - experts.per_token) * 3 * experts.width * 64
    assert model.config.num_active_params == held - idle
