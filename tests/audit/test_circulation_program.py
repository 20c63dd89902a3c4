"""What generation over stages does, read from the compiled programs: on CPUs, and compiled for H200s."""

import functools

import pytest
import tiny
from steps import shallow

from jaxtp import Llama, Rules, make_mesh, preset
from jaxtp.audit import audit, compile_decode, compile_prefill, gpu_mesh, hlo
from jaxtp.parallel.circulate import staged
from jaxtp.parallel.stages import Stages

MIB = 2**20


def model(config, mesh, *, sequence_parallel=False, dtype="float32") -> Llama:
    rules = Rules().sequence_parallel() if sequence_parallel else Rules()
    layout = (
        staged(Stages.split(config.num_layers, ranks=mesh.shape["pp"]), rules=rules)
        if mesh.shape["pp"] > 1
        else {"rules": rules}
    )
    return Llama(config, mesh=mesh, dtype=dtype, **layout)


@functools.cache
def on_cpus(batch, *, pp=1, tp=1):
    """The model, its decode step and what it does."""
    made = model(tiny.config(num_layers=8), make_mesh(pp=pp, tp=tp))
    compiled = compile_decode(made, batch=batch, slots=128)
    return made, compiled, audit(compiled, made.layout.mesh)


def step_flops(batch, **mesh):
    """Of the matrix products of a decode step on each device."""
    found = hlo.computations(on_cpus(batch, **mesh)[1].as_text())
    assert sum(i.opcode == "while" for i in found["ENTRY"]) == 1  # whose trips the compiler does not know
    return hlo.flops(found)


@pytest.mark.parametrize(("pp", "tp"), [(2, 1), (4, 1), (2, 2)])
def test_no_stage_idles_in_a_step(pp, tp):
    """As many groups as stages: what all devices compute in a step is what one would, and no more."""
    assert step_flops(8, pp=pp, tp=tp) * pp * tp == pytest.approx(step_flops(8), rel=1e-6)
    if tp == 1:  # a single row takes as many ticks, each of a row
        assert step_flops(1, pp=pp) == pytest.approx(step_flops(1), rel=0.15)


def test_the_cache_and_the_blocks_lie_with_their_stage():
    (one, _, first), (four, _, second) = on_cpus(8), on_cpus(8, pp=4)
    for report in (first, second):
        assert not any(c.kind == "all-gather" and c.bytes > 4096 for c in report.collectives)
    held = [
        sum(
            a.dtype.itemsize * functools.reduce(int.__mul__, a.sharding.shard_shape(a.shape))
            for pair in cache.layers
            for a in pair
        )
        for cache in (one.empty_cache(8, 128), four.empty_cache(8, 128, groups=4))
    ]
    assert held[0] == 4 * held[1]


# -- compiled for H200s --------------------------------------------------------------------------------------------------


@functools.cache
def gpus(pp, tp):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="the compiler's plugin is not installed: .[gpu-compiler]")
    return gpu_mesh("H200", pp=pp, tp=tp)


def check_decode(config, mesh, batch):
    """Exactly the collectives of theory, all small, all in the loop; nothing copied; the cache updated where it is."""
    llama, pp, tp = model(config, mesh, dtype="bfloat16"), mesh.shape["pp"], mesh.shape["tp"]
    compiled = compile_decode(llama, batch=batch, slots=4096)
    report = audit(compiled, mesh)
    rows, residual = batch // pp, batch // pp * config.hidden_size * 2
    assert all(c.loops == 1 and c.dtype in ("bf16", "f32+s32") for c in report.collectives)
    found = {(c.kind, c.axes, c.bytes): 0 for c in report.collectives}
    for c in report.collectives:
        found[c.kind, c.axes, c.bytes] += 1
    layers = len(llama.layers) * pp  # places, a tick of every stage each
    assert found == {
        ("all-reduce", ("tp",), residual): 2 * layers,
        ("all-reduce", ("pp", "tp"), residual): pp,  # the embedding of what enters
        ("all-reduce", ("pp",), residual): pp,  # what leaves, to the head that all ranks hold
        ("collective-permute", ("pp",), residual): pp,
        ("all-gather", ("pp", "tp"), rows * pp * tp * 8): pp,  # the best token of each device
    }
    assert " conditional(" not in compiled.as_text()
    cache = batch // pp * layers * 2 * (config.num_kv_heads // tp) * 4096 * config.head_dim * 2
    assert report.aliased_bytes >= cache
    assert report.copies(MIB) == []
    assert report.temp_bytes <= 2 * MIB + batch * MIB
    return report


@pytest.mark.parametrize("batch", [2, 8, 64])
def test_decode(batch):
    check_decode(shallow(preset("llama-3.1-8b"), 4), gpus(2, 4), batch)


@pytest.mark.slow
def test_decode_of_llama_70b_at_tp_4_and_pp_2():
    config = shallow(preset("llama-3.1-70b"), 8)
    report = check_decode(config, gpus(2, 4), 8)
    layers = config.num_layers
    weights = 2 * (layers * (8192 * (64 + 16) * 128 + 64 * 128 * 8192 + 3 * 8192 * 28672) + 2 * 128256 * 8192)
    cache = 8 * layers * 2 * 8 * 4096 * 128 * 2
    assert report.argument_bytes == pytest.approx((weights + cache) / 8, rel=0.01)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_prefill(sequence_parallel):
    config, mesh = shallow(preset("llama-3.1-8b"), 4), gpus(2, 4)
    layers = config.num_layers
    llama = model(config, mesh, sequence_parallel=sequence_parallel, dtype="bfloat16")
    report = audit(compile_prefill(llama, batch=4, tokens=2048), mesh)
    assert report.calls["__cudnn$fmhaSoftmax"] == layers
    stream = 2 * 2048 * config.hidden_size * 2
    sent = {c.axes: 0 for c in report.collectives}
    for c in report.collectives:
        sent[c.axes] += c.traffic
    # a layer's two sums, and from stage to stage what each device has of the stream, for two groups
    entering = 2 * stream * 3 // 4 if sequence_parallel else 0  # the embeddings, scattered over tokens
    assert sent["tp",] == 2 * layers * (2 * stream * 3 // 4) + entering
    assert report.count("collective-permute") == 2
    assert {c.bytes for c in report.collectives if c.kind == "collective-permute"} == {
        stream // (4 if sequence_parallel else 1)
    }
    assert report.temp_bytes < 300 * MIB
