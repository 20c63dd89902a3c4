"""The programs that eight H200s would run, compiled here and read: communication, memory, copies, kernels.

Needs XLA's plugin for GPUs (`pip install -e ".[gpu-compiler]"` and cuDNN).
"""

import dataclasses
import functools

import pytest
from steps import shallow

from jaxtp import Llama, Rules, preset
from jaxtp.audit import audit, compile_decode, compile_prefill, gpu_mesh

pytest.importorskip("jax_plugins.xla_cuda13", reason="the compiler's plugin is not installed: .[gpu-compiler]")

SLOTS = 4096
KERNELS_PER_LAYER = 24  # the budget; at one row XLA makes more of them than at many
OTHER_KERNELS = 25  # the embedding's, the head's and the sampler's
MIB = 2**20


@functools.cache
def mesh(tp: int):
    return gpu_mesh("H200", tp=tp)


def model(name: str, tp: int, *, sequence_parallel: bool = False, layers: int | None = None) -> Llama:
    config = preset(name)
    if layers:
        config = shallow(config, layers)
    rules = Rules().sequence_parallel() if sequence_parallel else Rules()
    return Llama(config, mesh=mesh(tp), rules=rules, dtype="bfloat16")


def smallest_shard(config, tp: int, batch: int) -> int:
    """Bytes on a device of the smallest kernel of a layer, or of a layer's keys, whichever is less."""
    kernel = config.hidden_size * config.num_heads * config.head_dim * 2 // tp
    cache = batch * config.num_kv_heads * SLOTS * config.head_dim * 2 // tp
    return min(kernel, cache)


CASES = [("llama-3.1-8b", tp, batch, 4) for tp in (1, 2, 4, 8) for batch in (1, 8, 64)] + [("llama-3.1-70b", 8, 8, 8)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tp", "batch", "layers"), CASES)
def test_decode(name, tp, batch, layers):
    llama = model(name, tp, layers=layers)
    config = llama.config
    report = audit(compile_decode(llama, batch=batch, slots=SLOTS), mesh(tp))

    # two all-reduces a layer and the embedding's; the head gathers one (value, id) of each device
    residual = batch * config.hidden_size * 2
    reduces = [c for c in report.collectives if c.kind == "all-reduce"]
    others = [c for c in report.collectives if c.kind != "all-reduce"]
    assert len(reduces) == (2 * config.num_layers + 1 if tp > 1 else 0)
    assert {(c.axes, c.dtype, c.bytes, c.loops) for c in reduces} <= {(("tp",), "bf16", residual, 1)}
    assert [(c.kind, c.axes, c.bytes) for c in others] == ([("all-gather", ("tp",), batch * tp * 8)] if tp > 1 else [])
    assert all(c.traffic == 2 * (tp - 1) * residual // tp for c in reduces)

    # the cache is updated where it lies, and nothing of a weight's or a layer's cache's size is moved
    cache = 2 * config.num_layers * batch * config.num_kv_heads * SLOTS * config.head_dim * 2 // tp
    assert report.aliased_bytes >= cache
    assert report.copies(smallest_shard(config, tp, batch)) == []
    assert report.temp_bytes <= 2 * MIB + batch * 1 * MIB
    assert report.kernels[1] <= KERNELS_PER_LAYER * config.num_layers + OTHER_KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_prefill(tp, sequence_parallel):
    tokens = 2048
    llama = model("llama-3.1-8b", tp, sequence_parallel=sequence_parallel, layers=4)
    layers = llama.config.num_layers
    report = audit(compile_prefill(llama, batch=1, tokens=tokens), mesh(tp))
    residual = tokens * llama.config.hidden_size * 2
    found = sorted((c.kind, c.dtype, c.bytes) for c in report.collectives)
    if tp == 1:
        assert found == []
    elif sequence_parallel:
        last = [("all-reduce", "f32", llama.config.hidden_size * 4)]  # the hidden states of the prompts' last tokens
        gathers, scatters = [("all-gather", "bf16", residual)], [("reduce-scatter", "bf16", residual)]
        assert found == sorted(last + gathers * 2 * layers + scatters * (2 * layers + 1))
    else:
        assert found == [("all-reduce", "bf16", residual)] * (2 * layers + 1)
    assert report.calls["__cudnn$fmhaSoftmax"] == layers
    assert report.copies(smallest_shard(llama.config, tp, 1)) == []
    assert report.temp_bytes <= 32 * MIB + 192 * MIB // tp  # whatever the depth


def test_a_chunk_of_a_long_prompt_goes_through_cudnn_too():
    llama = model("llama-3.1-8b", 8, layers=2)
    report = audit(compile_prefill(llama, batch=1, tokens=2048, slots=8192, fresh=False), mesh(8))
    assert report.calls["__cudnn$fmhaScaleBiasSoftmax"] == 2  # the mask goes in as a bias


def test_head_dims_that_cudnn_does_not_take_fall_back_to_xla():
    config = dataclasses.replace(preset("llama-3.2-1b"), head_dim=36, num_layers=1, windows=())
    report = audit(compile_prefill(Llama(config, mesh=mesh(4), dtype="bfloat16"), batch=1, tokens=256), mesh(4))
    assert not any("fmha" in call for call in report.calls)


def test_sampling_never_gathers_the_logits():
    from jaxtp.ops.sampling import Features

    llama = model("llama-3.1-8b", 8, layers=1)
    features = Features(random=True, min_p=True, truncate=True, penalties=True, logprobs=5)
    report = audit(compile_decode(llama, batch=4, slots=256, features=features), mesh(8))
    logits = 4 * llama.config.vocab_size * 4
    assert max(c.bytes for c in report.collectives if c.kind != "all-reduce") < logits / 1000
    assert max(c.bytes for c in report.collectives) < logits / 50
