"""All-reduces in 8 bits: within their bound, the same on every device, as many bytes as they say, and in every mesh's model."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from steps import shallow

from jaxtp import LLM, Llama, SamplingParams, make_mesh, plan, preset
from jaxtp.audit import audit, compile_decode, compile_prefill, gpu_mesh
from jaxtp.config import Experts
from jaxtp.ops.linear import linear
from jaxtp.parallel.compressed import GROUP, all_reduce, reducer
from jaxtp.planner import compression

FORMS = ["one step", "two steps"]


@functools.cache
def shares(tp, size, seed=0):
    """[tp, size]: of numbers of every size; some groups are 0."""
    rng = np.random.default_rng(seed)
    found = rng.standard_normal((tp, size)) * np.exp(
        rng.uniform(-5, 5, (tp, size // GROUP + 1)).repeat(GROUP, axis=1)[:, :size]
    )
    found[:, : GROUP // 2] = 0
    return found.astype(np.float32)


def summed(tp, size, form):
    """Of every device: [tp, size]."""
    mesh = make_mesh(tp=tp)
    place = NamedSharding(mesh, P("tp"))
    own = functools.partial(all_reduce, axis="tp", devices=tp, form=form)
    run = jax.shard_map(own, mesh=mesh, in_specs=P("tp"), out_specs=P("tp"), check_vma=False)
    return np.asarray(jax.jit(run)(jax.device_put(shares(tp, size), place)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("size", [64, 1000, 4096])
def test_it_is_within_its_bound_and_the_same_everywhere(tp, size, form):
    found, parts = summed(tp, size, form), shares(tp, size)
    assert all((row == found[0]).all() for row in found)
    exact = parts.astype(np.float64).sum(axis=0)
    padded = -size % GROUP

    def steps(a):
        largest = np.abs(np.pad(a, (0, padded))).reshape(-1, GROUP).max(axis=-1)
        return (largest / 127).repeat(GROUP)[:size]

    bound = sum(steps(part) for part in parts) / 2
    if form == "two steps":  # what each sums is off already
        bound = bound + (steps(exact) + steps(bound)) / 2
    assert (np.abs(found[0] - exact) <= 1.01 * bound + 1e-7).all()  # scales are rounded, too
    assert (found[0][: GROUP // 2] == 0).all()


@pytest.mark.parametrize("axes", [{"tp": 4}, {"dp": 2, "tp": 2}], ids=str)
def test_bytes(axes):
    """Of a sum of [B, T, D]: an all-to-all and an all-gather of a byte a number and 1/32 of it, in place of the all-reduce; of
    two devices an all-gather of both shares.
    """
    mesh, (B, T, D) = make_mesh(**axes), (2, 512, 512)
    x = jax.ShapeDtypeStruct((B, T, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P("dp", None, "tp")))
    w = jax.ShapeDtypeStruct((D, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "tp")))
    out = NamedSharding(mesh, P("dp", None, None))
    with jax.set_mesh(mesh):
        program = jax.jit(lambda x, w: linear(x, w, out=out, reduce=reducer())).lower(x, w).compile()
    found = {c.kind: (c.dtype, c.bytes) for c in audit(program, mesh).collectives}
    numbers = B // axes.get("dp", 1) * T * D * (GROUP + 2) // GROUP
    if axes["tp"] == 2:
        assert found == {"all-gather": ("s8", 2 * numbers)}
    else:
        assert found == {"all-to-all": ("s8", numbers), "all-gather": ("s8", numbers)}
    assert not re.findall(r" all-reduce\(", program.as_text())


MESHES = [
    {"tensor_parallel_size": 2},
    {"tensor_parallel_size": 4},
    {"data_parallel_size": 2, "tensor_parallel_size": 2},
    {"pipeline_parallel_size": 2, "tensor_parallel_size": 2},
]


@functools.cache
def texts(stories, mesh, **options):
    llm = LLM(stories, dtype="float32", progress=False, **dict(mesh), **options)
    prompts = ["Once upon a time, there was a cat", "Lily", "The big dog and the little bird were friends. " * 8]
    return [r.outputs[0].token_ids for r in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24))]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_model_runs_with_it(stories, mesh):
    """Most texts stay; those of tp 2 are the same whatever other axes there are."""
    plain = texts(stories, ())
    found = texts(stories, tuple(mesh.items()), compress_all_reduce="int8")
    same = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(plain, found, strict=True)
    ]
    assert sum(same) > 24  # of 72 tokens, before the first that differs
    if mesh["tensor_parallel_size"] == 2:
        assert found == texts(stories, tuple(MESHES[0].items()), compress_all_reduce="int8")


def test_experts_and_few_bits(tmp_path):
    experts = Experts(count=8, per_token=3, width=64, renormalize=True)
    folder = tiny.checkpoint(tmp_path / "model", model_type="qwen3_moe", qk_norm=True, experts=experts, intermediate_size=64)
    for options in ({}, {"quantization": "int8"}):
        llm = LLM(folder, tensor_parallel_size=4, compress_all_reduce="int8", progress=False, **options)
        tokens = np.random.default_rng(0).integers(3, 98, (2, 24)).astype(np.int32)
        plain = LLM(folder, tensor_parallel_size=4, progress=False, **options)
        mine, exact = (np.asarray(each.model(tokens)) for each in (llm, plain))
        assert 1e-6 < np.abs(mine - exact).mean() / np.abs(exact).mean() < 0.05  # single tokens may choose other experts


def test_the_planner_says_where_it_pays():
    """Where links are slow, for prompts; never for a few rows, nor over NVLink."""
    nvlink, pcie = plan("llama-3.1-70b", "8xH100"), plan("llama-3.1-70b", "8xL40S")
    assert "compress_all_reduce" not in str(nvlink)
    assert "compress_all_reduce='int8' would save" in " ".join(str(pcie).split())
    for plans in (nvlink, pcie):
        few = compression.seconds(plans.best.machine, 1)
        assert few[1] > few[0]
    many = compression.seconds(pcie.best.machine, 512)
    assert 0.5 < many[1] / many[0] < 0.8  # half the bytes, and what it takes to pack them


@pytest.mark.slow
def test_compiled_for_gpus():
    """Llama-3.1-8B over 8: an all-to-all and an all-gather in place of each of a layer's two all-reduces, of few rows an
    all-gather; and 24 kernels of a layer more at most.
    """
    pytest.importorskip("jax_plugins.xla_cuda13", reason="the compiler's plugin is not installed: .[gpu-compiler]")
    config, mesh, D = shallow(preset("llama-3.1-8b"), 2), gpu_mesh("H200", tp=8), 4096
    reports = {}
    for kind in ("plain", "int8"):
        model = Llama(config, mesh=mesh, dtype="bfloat16", reduce=reducer() if kind == "int8" else None)
        prompts, rows = compile_prefill(model, tokens=512), compile_decode(model, batch=8, slots=1024, loop=False)
        reports[kind] = audit(prompts, mesh), audit(rows, mesh)
    prompts, rows = reports["int8"]
    sums, byte = 2 * config.num_layers, (GROUP + 2) / GROUP
    found = collections.Counter((c.kind, c.dtype, c.bytes) for c in prompts.collectives if c.bytes > 10_000)
    size = round(512 * D * byte)
    assert found == {("all-to-all", "s8", size): sums, ("all-gather", "s8", size): sums, ("all-reduce", "bf16", 2 * 512 * D): 1}
    found = collections.Counter((c.kind, c.dtype, c.bytes) for c in rows.collectives if c.bytes > 10_000)
    assert found == {("all-gather", "s8", round(8 * 8 * D * byte)): sums, ("all-reduce", "bf16", 2 * 8 * D): 1}
    for mine, plain in zip(reports["int8"], reports["plain"], strict=True):
        assert sum(mine.kernels.values()) <= sum(plain.kernels.values()) + 12 * sums


def test_bad_input(tmp_path):
    folder = tiny.checkpoint(tmp_path / "model")
    with pytest.raises(ValueError, match="compress_all_reduce='int4' is none of int8"):
        LLM(folder, compress_all_reduce="int4", progress=False)
    with pytest.raises(ValueError, match="sequence parallelism has no all-reduces after products"):
        LLM(folder, tensor_parallel_size=2, sequence_parallel=True, compress_all_reduce="int8", progress=False)
