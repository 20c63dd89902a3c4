"""Random tiny mixtures of experts: logits, greedy tokens and checkpoints equal transformers', on every mesh that experts lie on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxtp import LLM, Llama, SamplingParams, make_mesh

SETTINGS = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
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
MESHES = [{}, {"tp": 2}, {"tp": 4}, {"ep": 2}, {"ep": 2, "tp": 2}, {"dp": 2, "ep": 2}]
PROMPTS = [[5, 9, 11], list(range(3, 25)), [7], [100, 2, 8, 4, 4, 4, 60, 1, 99]]
NEW = 20


def checkpoint_of(case, folder, change=lambda model: None):
    """transformers' model, written to a folder."""
    family, options = CASES[case]
    config = getattr(transformers, f"{family}Config")(**{**SETTINGS, **options})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(1 + 0.1 * torch.randn_like(weight) if "norm" in name else 0.1 * torch.randn_like(weight))
        change(model)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request, tmp_path_factory):
    """(name, folder, logits of transformers for a batch of tokens, its greedy completions of PROMPTS)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = checkpoint_of(request.param, folder)
    with torch.no_grad():
        logits = model(torch.tensor(tokens())).logits.numpy()
        completions = [greedy(model, prompt) for prompt in PROMPTS]
    return request.param, folder, logits, completions


def tokens():
    return np.random.default_rng(0).integers(0, 128, (4, 24))


def greedy(model, prompt):
    out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, use_cache=True, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("layout", ["whole", "width"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_logits(checkpoint, mesh, layout):
    name, folder, expected, _ = checkpoint
    parts = mesh.get("ep", 1) * mesh.get("tp", 1)
    if layout == "whole" and (name == "mixtral-odd" and parts == 4):
        with pytest.raises(ValueError, match="would cut the 6 experts by ep·tp=4, which does not divide"):
            Llama.from_pretrained(folder, mesh=make_mesh(**mesh), expert_layout=layout, progress=False)
        return
    if layout == "width" and mesh.get("tp", 1) == 1:
        return  # the same program
    model = Llama.from_pretrained(folder, mesh=make_mesh(**mesh), expert_layout=layout, progress=False)
    np.testing.assert_allclose(np.asarray(model(tokens())), expected, atol=1e-5, rtol=1e-5)


GREEDY = {
    "mixtral": [{"tp": 2}, {"ep": 2}, {"pp": 2, "ep": 2}],
    "mixtral-odd": [{"tp": 4}],
    "qwen2-moe": [{"ep": 2, "tp": 2}, {"pp": 2}],
    "qwen2-moe-renormalized": [{}],
    "qwen3-moe": [{"ep": 4}, {"dp": 2, "ep": 2}, {"pp": 2, "tp": 2}],
    "qwen3-moe-dense-first": [{"ep": 2}],
}
NAMES = {"tp": "tensor_parallel_size", "ep": "expert_parallel_size", "dp": "data_parallel_size", "pp": "pipeline_parallel_size"}


@pytest.mark.parametrize(
    ("checkpoint", "mesh"), [(case, mesh) for case, each in GREEDY.items() for mesh in each], indirect=["checkpoint"], ids=str
)
def test_greedy_tokens(checkpoint, mesh):
    _, folder, _, expected = checkpoint
    llm = LLM(folder, progress=False, max_model_len=48, **{NAMES[axis]: size for axis, size in mesh.items()})
    requests = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=NEW))
    assert [request.outputs[0].token_ids for request in requests] == expected


def test_round_trip(checkpoint, tmp_path):
    """Loaded with experts on four devices, saved in several files, read by transformers: the same logits, the same config."""
    _, folder, expected, _ = checkpoint
    model = Llama.from_pretrained(folder, mesh=make_mesh(ep=2, tp=2), progress=False)
    model.save_pretrained(tmp_path / "out", max_shard_bytes=50_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.tensor(tokens())).logits.numpy(), expected)
    assert type(model.config).from_hf(tmp_path / "out") == model.config
