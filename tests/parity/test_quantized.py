"""Weights of 8 bits: transformers, with the same weights rounded by a formula in NumPy, says what comes out on every mesh."""

import dataclasses
import importlib.util
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import torch
from conftest import shared
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxtp import LLM, Llama, SamplingParams, make_mesh
from jaxtp.audit.targets import abstract_llama
from jaxtp.checkpoint.hf import DEMO
from jaxtp.config.quantization import Scheme
from jaxtp.model.stacked import Stacked
from jaxtp.ops.quantized import quantize
from jaxtp.planner import Generation, Split, memory
from jaxtp.weights import describe, variables

PROMPTS = ["", "Once upon a time, there was a cat", "Lily", "The big dog and the little bird were friends."]
NEW = 60
MESHES = [
    {},
    {"tensor_parallel_size": 2},
    {"tensor_parallel_size": 4, "sequence_parallel": True},
    {"data_parallel_size": 2, "tensor_parallel_size": 4},
    {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "data_parallel_size": 2},
]


def rounded(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, scale) of a kernel [*O, I], in float64."""
    kernel = kernel.astype(np.float64)
    scale = np.abs(kernel).max(axis=-1) / 127
    return np.rint(kernel / np.where(scale, scale, 1)[..., None]), scale


def reference(folder):
    """transformers' model of a folder with the layers' kernels rounded."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            values, scale = rounded(layer.weight.detach().numpy())
            layer.weight.data = torch.from_numpy((values * scale[:, None]).astype(np.float32))
    return model


@pytest.fixture(scope="module")
def expected(stories):
    model, tokenizer = reference(stories), AutoTokenizer.from_pretrained(stories)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0]
        found.append(out[ids.shape[1] :].tolist())
    return found


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_greedy_tokens_equal_transformers(stories, expected, mesh):
    llm = LLM(stories, quantization="int8", progress=False, **mesh)
    requests = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=NEW))
    assert [r.outputs[0].token_ids for r in requests] == expected


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True}], ids=str
)
@pytest.mark.parametrize("tp", [1, 4, 8])
def test_logits_equal_transformers(tmp_path, tp, changes):
    folder = tiny.checkpoint(tmp_path / "model", num_kv_heads=4, **changes)
    ids = np.random.default_rng(0).integers(3, 98, (2, 24))
    with torch.no_grad():
        theirs = reference(folder)(torch.from_numpy(ids)).logits.numpy()
    model = Llama.from_pretrained(folder, mesh=make_mesh(tp=tp), quantization="int8", progress=False)
    mine = np.asarray(model(ids.astype(np.int32)))
    assert np.abs(mine - theirs).max() < 1e-5 * max(1, np.abs(theirs).max())
    plain = np.asarray(Llama.from_pretrained(folder, mesh=make_mesh(tp=tp), progress=False)(ids.astype(np.int32)))
    assert 1e-3 < np.abs(mine - plain).max() / np.abs(plain).max() < 0.1  # it is rounded, and not by much
    half = Llama.from_pretrained(folder, mesh=make_mesh(tp=tp), quantization="int8", dtype="bfloat16", progress=False)
    assert np.abs(np.asarray(half(ids.astype(np.int32))) - mine).max() < 0.05 * np.abs(mine).max()


def test_rounding_is_that_of_the_formula():
    kernel = np.random.default_rng(0).normal(size=(3, 4, 16)).astype(np.float32)
    kernel[1, 2] = 0  # a channel of zeros, as in a place without a layer
    found = jax.tree.map(np.asarray, quantize(jax.numpy.asarray(kernel), Scheme("int8")))
    values, scale = rounded(kernel)
    assert found.values.dtype == np.int8
    np.testing.assert_array_equal(found.values, values)
    np.testing.assert_allclose(found.scale[..., 0], np.where(scale, scale, 1), rtol=1e-6)
    assert np.abs(found.values * found.scale - kernel).max() <= scale.max() / 2 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("scheme", "steps"), [(Scheme("int4", group=128), 15), (Scheme("int4", group=128, least=32), 15), (Scheme("fp8"), None)]
)
@pytest.mark.parametrize("inputs", [256, 192, 172])
def test_no_weight_is_further_off_than_half_a_step(scheme, steps, inputs):
    kernel = np.random.default_rng(1).normal(size=(5, inputs)).astype(np.float32)
    found = quantize(jax.numpy.asarray(kernel), scheme)
    made = np.asarray(found.plain(np.dtype(np.float32)), np.float64)
    groups = {256: 2, 192: 3, 172: 43 if scheme.least == 1 else 1}[inputs] if scheme.group else 1
    assert found.scale.shape == (5, groups)
    largest = np.repeat(np.abs(kernel.reshape(5, groups, -1)).max(-1), inputs // groups, axis=1)
    step = largest / 7.5 if steps else np.maximum(np.abs(kernel) / 8, largest / 448 / 8)  # fp8 has three bits behind the first
    assert (np.abs(made - kernel) <= step / 2 * (1 + 1e-5)).all()


CONFIGS = {
    "plain": tiny.config(num_layers=8),
    "biases": tiny.config(qkv_bias=True, o_bias=True, mlp_bias=True, num_layers=3),
    "qk-norm": tiny.config(qk_norm=True, head_dim=16, tie_word_embeddings=True),
    "few KV heads": tiny.config(num_kv_heads=2, num_layers=5),
}


@pytest.mark.parametrize(
    ("name", "axes"), list(itertools.product(CONFIGS, [{"tp": 1}, {"tp": 8}, {"pp": 2, "tp": 2}, {"dp": 2, "tp": 4}])), ids=str
)
@pytest.mark.parametrize(("dtype", "kind"), [("float32", "int8"), ("bfloat16", "int8"), ("bfloat16", "fp8")])
def test_the_planner_knows_what_is_held(name, axes, dtype, kind):
    config, split = CONFIGS[name], Split(**axes)
    model = abstract_llama(config, make_mesh(**axes), split, dtype=dtype, quantization=kind)
    task = Generation(dtype=dtype, quantization=kind)
    assert memory.weights(config, split, task) == describe(model).device_bytes
    assert memory.weights(config, split, dataclasses.replace(task, quantization=None)) > describe(model).device_bytes


def test_random_weights_are_quantized_too():
    model = Llama.random(tiny.config(), mesh=make_mesh(tp=2), quantization="int8")
    kinds = {path.rpartition(".")[2]: weight.get_value().dtype.name for path, weight in variables(model)}
    assert {name for name, dtype in kinds.items() if dtype == "int8"} == {"qkv", "o", "gate_up", "down"}
    assert kinds["embed"] == kinds["head"] == kinds["weight"] == "float32"


def test_bad_input(tmp_path):
    folder = tiny.checkpoint(tmp_path / "model")
    with pytest.raises(ValueError, match="quantization='int3' is not supported; supported: int8, fp8, int4, awq"):
        LLM(folder, quantization="int3", progress=False)
    with pytest.raises(
        ValueError, match=r"quantization='awq': config.json has no quantization_config, so that .* int8, fp8, int4"
    ):
        LLM(folder, quantization="awq", progress=False)
    model = Llama.from_pretrained(folder, quantization="int8", progress=False)
    with pytest.raises(ValueError, match="save a model loaded without"):
        model.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="a model to train keeps its dtype"):
        Stacked(model)
    with pytest.raises(ValueError, match="is said when a model is loaded"):
        LLM(Llama.from_pretrained(folder, progress=False), quantization="int8", progress=False)
    assert LLM(model, tokenizer=folder, progress=False).generate("ab", SamplingParams(max_tokens=2))[0].outputs[0].token_ids


# of the demo's nats a token, at most, and of the divergence from what float32 says
COSTS = {
    "weights int8": (0.001, 2e-4),
    "weights fp8": (0.004, 2e-3),
    "weights int4": (0.03, 3e-2),
    "cache int8": (0.001, 2e-4),
    "cache fp8": (0.004, 2e-3),
    "all-reduces int8, tp 4": (0.001, 2e-4),
}


def test_what_few_bits_cost(monkeypatch):
    spec = importlib.util.spec_from_file_location("accuracy", Path(__file__).parents[2] / "scripts" / "accuracy.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "BATCHES", 1)
    rows = script.windows(DEMO, shared("tinyshakespeare.txt"))
    exact = script.logprobs(Llama.from_pretrained("demo", dtype="float32", progress=False), rows)
    picked = np.take_along_axis(exact, rows[:, 1:, None], -1)
    for name, options in script.KINDS:
        if name not in COSTS:
            continue
        llm = LLM("demo", dtype="float32", max_num_seqs=8, progress=False, **options)
        own = script.logprobs(llm.model, rows)
        nats, kl = COSTS[name]
        assert -np.take_along_axis(own, rows[:, 1:, None], -1).mean() + picked.mean() < nats, name
        assert 0 < (np.exp(exact) * (exact - own)).sum(-1).mean() < kl, name
