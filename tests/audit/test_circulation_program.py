"""What a tick of generation over stages does, read from the compiled programs: on CPUs, and compiled for H200s."""

import functools

import pytest
import tiny
from steps import shallow

from jaxtp import Llama, Rules, make_mesh, preset
from jaxtp.audit import audit, compile_decode, compile_prefill, gpu_mesh
from jaxtp.engine.build import chunk_tokens, step_tokens
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
    """The model, its decode step, or tick of it, and what it does; attention as products alone."""
    made = model(tiny.config(num_layers=8), make_mesh(pp=pp, tp=tp))
    compiled = compile_decode(made, batch=batch, slots=128, read="gather")
    return made, compiled, audit(compiled, made.layout.mesh)


@pytest.mark.parametrize(("pp", "tp"), [(2, 1), (4, 1), (2, 2)])
def test_no_stage_idles_in_a_step(pp, tp):
    """As many rows as stages or more: what all devices compute in the ticks of a step is what one would, and no more; but the
    angles of its rows, which each device has for itself (`ops.rope`: on CPUs by two products with the identity).
    """

    def angles(rows):
        return 2 * 2 * rows * (tiny.config().head_dim // 2) ** 2

    alone = on_cpus(8)[2].flops - angles(8)
    assert pp * (on_cpus(8, pp=pp, tp=tp)[2].flops - angles(8 // pp)) * pp * tp == pytest.approx(alone, rel=1e-6)


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
        for cache in (one.empty_cache(16, 64), four.empty_cache(16, 64))
    ]
    assert held[0] == 4 * held[1]


# -- compiled for H200s --------------------------------------------------------------------------------------------------


@functools.cache
def gpus(pp, tp):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="the compiler's plugin is not installed: .[gpu-compiler]")
    return gpu_mesh("H200", pp=pp, tp=tp)


def check(report, llama, mesh, *, rows, tokens, lanes):
    """Exactly the collectives of theory, for a tick in which each stage has so many tokens; nothing copied."""
    config, pp, tp = llama.config, mesh.shape["pp"], mesh.shape["tp"]
    residual = tokens * config.hidden_size * 2
    assert all(c.loops == 0 and c.dtype in ("bf16", "f32+s32") for c in report.collectives)
    assert all(c.kernel for c in report.collectives if c.kind == "all-reduce")  # none by NCCL
    found = {(c.kind, c.axes, c.bytes): 0 for c in report.collectives}
    for c in report.collectives:
        found[c.kind, c.axes, c.bytes] += 1
    assert found == {
        ("all-reduce", ("tp",), residual): 2 * len(llama.layers),  # of the stage's layers
        ("all-reduce", ("pp", "tp"), residual): 1,  # the embedding of what enters
        ("all-reduce", ("pp",), lanes * config.hidden_size * 2): 1,  # what leaves, to the head that all ranks hold
        ("collective-permute", ("pp",), residual): 1,
        ("all-gather", ("pp", "tp"), lanes * pp * tp * 8): 1,  # the best token of each device
    }
    cache = rows * len(llama.layers) * 2 * (config.num_kv_heads // tp) * 4096 * config.head_dim * 2
    assert report.aliased_bytes >= cache
    assert report.copies(MIB) == []


def check_decode(config, mesh, batch):
    """The cache is updated where it is, and a tick has its share of the rows."""
    llama, pp = model(config, mesh, dtype="bfloat16"), mesh.shape["pp"]
    compiled = compile_decode(llama, batch=batch, slots=4096)
    report = audit(compiled, mesh)
    assert " conditional(" not in compiled.as_text()
    check(report, llama, mesh, rows=batch, tokens=batch // pp, lanes=batch // pp)
    assert report.temp_bytes <= 2 * MIB + batch * MIB
    return report


@pytest.mark.parametrize("batch", [2, 64])
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


def test_prompts_go_along_with_rows():
    """In the chunks that the budget leaves beside the rows of a tick."""
    config, mesh, rows = shallow(preset("llama-3.1-8b"), 4), gpus(2, 4), 8
    llama = model(config, mesh, dtype="bfloat16")
    size = chunk_tokens(llama)
    chunks = (step_tokens(llama) - rows) // size
    report = audit(compile_prefill(llama, tokens=chunks * size, batch=2 * rows, slots=4096), mesh)
    assert report.calls["__cudnn$fmhaScaleBiasSoftmax"] == report.calls["__cudnn$fmhaSoftmax"] == config.num_layers // 2
    check(report, llama, mesh, rows=2 * rows, tokens=rows + chunks * size, lanes=rows + chunks)
    assert report.temp_bytes < 32 * MIB


def test_prompts_under_sequence_parallelism():
    """From stage to stage goes what each device has of the stream."""
    config, mesh, tokens = shallow(preset("llama-3.1-8b"), 4), gpus(2, 4), 512
    llama = model(config, mesh, sequence_parallel=True, dtype="bfloat16")
    report = audit(compile_prefill(llama, tokens=tokens, slots=4096), mesh)
    stream = tokens * config.hidden_size * 2
    sent = {c.axes: 0 for c in report.collectives}
    for c in report.collectives:
        sent[c.axes] += c.traffic
    layers = config.num_layers // 2
    assert sent["tp",] == layers * 4 * stream * 3 // 4 + stream * 3 // 4  # and the embeddings, scattered over tokens
    assert {c.bytes for c in report.collectives if c.kind == "collective-permute"} == {stream // 4}
    assert sent["pp",] == 2 * stream // 4  # the permute, and what enters: the embedding lies over pp as well
