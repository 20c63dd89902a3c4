"""Experts on meshes: logits, gradients and texts are those of one device."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from jaxtp import LLM, Llama, SamplingParams, make_mesh
from jaxtp.config import Experts, ModelConfig
from jaxtp.sharding import Rules

CONFIG = ModelConfig(
    model_type="qwen2_moe",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    experts=Experts(8, 3, 16, shared=32, dense=(0,)),
)


def model(sequence_parallel=False, layout="auto", **sizes):
    mesh = make_mesh(**sizes)
    rules = Rules().sequence_parallel() if sequence_parallel else Rules()
    rules = rules.expert_parallel(CONFIG, ep=mesh.shape["ep"], tp=mesh.shape["tp"], layout=layout)
    return Llama.random(CONFIG, mesh=mesh, rules=rules, expert_kernel="blocks")


def tokens():
    return np.random.default_rng(0).integers(0, 64, (4, 16)).astype(np.int32)


@functools.cache
def outcome(**options):
    """Logits, and the gradients of all weights."""
    made = model(**options)
    graph, state = nnx.split(made)
    loss = jax.jit(jax.grad(lambda state: (nnx.merge(graph, state)(tokens()) ** 2).mean()))
    with jax.set_mesh(made.layout.mesh):
        return np.asarray(made(tokens())), [np.asarray(leaf) for leaf in jax.tree.leaves(loss(state))]


@pytest.mark.parametrize(
    "options",
    [
        {"tp": 2},
        {"tp": 2, "layout": "width", "sequence_parallel": True},
        {"ep": 2, "tp": 2, "sequence_parallel": True},
        {"dp": 2, "ep": 2},
    ],
    ids=str,
)
def test_logits_and_gradients(options):
    (logits, gradients), (expected, wanted) = outcome(**options), outcome()
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * max(1, np.abs(theirs).max()))


def test_texts():
    """Greedy and drawn, beside others that come and go."""
    prompts = [[1, 2, 3], list(range(40)), [7], [9] * 17, [5, 6]]
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=6 + i) for i in range(5)]

    def texts(**sizes):
        llm = LLM(model(**sizes), max_model_len=64, max_num_seqs=4, progress=False)
        return [request.outputs[0].token_ids for request in llm.generate(prompts, params)]

    assert texts(ep=2, tp=2) == texts()
