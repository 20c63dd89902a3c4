"""Tokens sent to the experts that they chose: the same results and gradients as where all are, and no row more than need be."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec
from steps import shallow

from jaxtp import LLM, Plan, SamplingParams, make_mesh, parallel, preset
from jaxtp.audit.check import compiled_programs, gpu_mesh
from jaxtp.config import Experts
from jaxtp.ops.experts import mix
from jaxtp.parallel.experts import exchange
from jaxtp.planner import Generation, Split, cluster
from jaxtp.planner.experts import travels
from jaxtp.planner.programs import programs

E, K, D, F, N = 8, 3, 8, 4, 48
CHOICES = {
    "random": lambda rng: np.argsort(rng.random((N, E)), axis=1)[:, :K],
    "all on the same": lambda rng: np.tile(np.arange(K), (N, 1)),
    "some on none": lambda rng: np.where(rng.random((N, K)) < 0.5, E, np.argsort(rng.random((N, E)), axis=1)[:, :K]),
}


@pytest.mark.parametrize(
    ("ep", "choices", "few"), [*((ep, choices, 0) for ep in (2, 8) for choices in CHOICES), (8, "some on none", 1024)]
)
def test_results_and_gradients_are_those_of_one_device(ep, choices, few, monkeypatch):
    monkeypatch.setattr(parallel.experts, "FEW_TOKENS", few)
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(N, D)), rng.random((N, K))
    kernels = rng.normal(size=(E, F, 2, D)) / 3, rng.normal(size=(E, D, F)) / 3
    args = [np.float32(a) for a in (x, weights, *kernels)]
    chosen, mesh = np.int32(CHOICES[choices](rng)), make_mesh(ep=ep)

    def alone(x, weights, gate_up, down):
        return jnp.sin(mix(x, chosen, weights, gate_up, down, products="reference"))

    def over(*args):
        def local(x, weights, gate_up, down, chosen):
            def own(*rows):
                return mix(*rows, gate_up, down, products="blocks")

            return jnp.sin(exchange(own, x, chosen, weights, experts=E, mesh=mesh))

        return jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec("ep"), out_specs=PartitionSpec("ep"))(*args, there)

    def both(function):
        return jax.jit(jax.value_and_grad(lambda *args: function(*args).sum(), argnums=(0, 1, 2, 3)))

    *spread, there = (jax.device_put(a, NamedSharding(mesh, PartitionSpec("ep"))) for a in (*args, chosen))
    found, expected = both(over)(*spread), both(alone)(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


CONFIG = {"model_type": "qwen3_moe", "qk_norm": True, "experts": Experts(8, 3, 16, renormalize=True)}


def test_generation_is_the_same(tmp_path, monkeypatch):
    """On one device, and in stages, too."""
    monkeypatch.setattr(parallel.experts, "FEW_TOKENS", 0)
    folder = tiny.checkpoint(tmp_path, **CONFIG)
    prompts, params = [[1, 7, 3, 2, 9], [4, 4, 8]], SamplingParams(temperature=0, max_tokens=6)
    texts = [
        [out.outputs[0].token_ids for out in LLM(folder, max_model_len=32, progress=False, **sizes).generate(prompts, params)]
        for sizes in (
            {},
            {"expert_parallel_size": 4, "expert_dispatch": "ragged"},
            {"expert_parallel_size": 2, "pipeline_parallel_size": 2, "tensor_parallel_size": 2, "expert_dispatch": "ragged"},
        )
    ]
    assert texts[0] == texts[1] == texts[2]


def test_what_cannot_be(tmp_path):
    folder = tiny.checkpoint(tmp_path, **CONFIG)
    with pytest.raises(ValueError, match="expert_dispatch='ragged' sends tokens along ep, which is 1 here; leave it out"):
        LLM(folder, expert_dispatch="ragged", progress=False)
    with pytest.raises(ValueError, match="expert_dispatch='ring' is none of gather, ragged"):
        LLM(folder, expert_dispatch="ring", expert_parallel_size=2, progress=False)


def test_as_many_rows_travel_as_the_formula_says():
    """Of many tokens, each with k of the experts at random."""
    rng, config = np.random.default_rng(0), preset("qwen3-30b-a3b")
    experts, tokens = config.experts, 4000
    for ep in (2, 8, 64):
        chosen = np.argsort(rng.random((tokens, experts.count)), axis=1)[:, : experts.per_token]
        ranks = chosen // (experts.count // ep)
        goes = (ranks[..., None] == np.arange(1, ep)).any(axis=1)  # the tokens are of the first rank
        assert goes.sum() / tokens == pytest.approx(travels(config, ep), rel=0.03)
    assert travels(config, 64) < experts.per_token < 63  # what an all-gather would send


@pytest.mark.slow
def test_on_gpus_rows_are_sent_by_three_ragged_all_to_alls():
    """There, their choices, and back, in a layer of a prompt's step; in a step of few tokens as ever."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="the compiler for GPUs is not installed")
    config, split = shallow(preset("qwen3-30b-a3b"), 1), Split(ep=8, expert_dispatch="ragged")
    plan = Plan("qwen3-30b-a3b", config, cluster("8xH200"), split, Generation(8, 512, 8))
    prefill, decode = (program.as_text() for program in compiled_programs(plan, gpu_mesh("H200", ep=8)))
    rows = 8 * 512 // 8
    shapes = re.findall(r"= ((?:bf16|f32)\[\d+,\d+\])\S* ragged-all-to-all-done", prefill)
    D, k = config.hidden_size, config.experts.per_token
    assert sorted(shapes) == sorted([f"bf16[{rows * 8},{D}]", f"f32[{rows * 8},{2 * k}]", f"bf16[{rows * 8},{D}]"])
    assert "reduce-scatter" not in prefill
    assert "ragged-all-to-all" not in decode


def test_the_plan_counts_what_travels():
    config = preset("qwen3-30b-a3b")
    sent = {}
    for dispatch in ("gather", "ragged"):
        prefill, _ = programs(config, Split(ep=8, expert_dispatch=dispatch), Generation(8, 2048, 64))
        sent[dispatch] = sum(c.traffic * n for c, n in prefill.sent.items() if c.axes == ("ep",))
    assert sent["ragged"] / sent["gather"] == pytest.approx(travels(config, 8) / 7, rel=0.02)
