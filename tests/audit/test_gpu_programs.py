"""The steps that H200s would run, compiled here and read: communication, memory, copies, kernels.

Needs XLA's plugin for GPUs (`pip install -e ".[gpu-compiler]"` and cuDNN).
"""

import dataclasses
import functools
import os

import pytest
from steps import shallow

from jaxtp import Llama, Rules, preset
from jaxtp.audit import audit, compile_decode, compile_prefill, gpu_mesh
from jaxtp.engine.build import choose_read, chunk_tokens, step_tokens

pytest.importorskip("jax_plugins.xla_cuda13", reason="the compiler's plugin is not installed: .[gpu-compiler]")

SLOTS = 4096
ROWS = 32  # that make a token beside chunks of prompts
KERNELS = {"slab": 20, "cudnn": 14}  # of a layer, at most; at one row, whose products XLA makes sums of, more
KERNELS_OF_A_ROW = 23
KERNELS_MIXED = {"slab": 28, "cudnn": 20}
OTHER_KERNELS = 22  # the embedding's, the head's and the sampler's
MIB = 2**20


@functools.cache
def mesh(tp: int):
    return gpu_mesh("H200", tp=tp)


def model(name: str, tp: int, *, sequence_parallel: bool = False, layers: int = 4) -> Llama:
    rules = Rules().sequence_parallel() if sequence_parallel else Rules()
    return Llama(shallow(preset(name), layers), mesh=mesh(tp), rules=rules, dtype="bfloat16")


def pool(config, tp: int, rows: int) -> int:
    """Bytes on a device of all layers' keys and values, for so many rows of `SLOTS` slots."""
    return 2 * config.num_layers * rows * config.num_kv_heads * SLOTS * config.head_dim * 2 // tp


def check_collectives(report, config, tp: int, tokens: int, lanes: int, *, loops: int) -> None:
    """Two all-reduces a layer and the embedding's, none by NCCL; the head gathers one (value, id) of each device."""
    residual = tokens * config.hidden_size * 2
    reduces = [c for c in report.collectives if c.kind == "all-reduce"]
    others = [c for c in report.collectives if c.kind != "all-reduce"]
    assert len(reduces) == (2 * config.num_layers + 1 if tp > 1 else 0)
    assert {(c.axes, c.dtype, c.bytes, c.loops) for c in reduces} <= {(("tp",), "bf16", residual, loops)}
    assert {c.kernel for c in reduces} <= {"one-shot", "two-shot"}
    assert [(c.kind, c.axes, c.bytes) for c in others] == ([("all-gather", ("tp",), lanes * tp * 8)] if tp > 1 else [])
    assert all(c.traffic == 2 * (tp - 1) * residual // tp for c in reduces)


DECODE = [
    *(("llama-3.1-8b", 8, batch, read) for batch in (1, 8, 64) for read in KERNELS),
    *(("llama-3.1-8b", 1, batch, read) for batch in (1, 8) for read in KERNELS),
    *(("llama-3.1-70b", 8, 8, read) for read in KERNELS),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tp", "batch", "read"), DECODE)
def test_decode(name, tp, batch, read):
    llama = model(name, tp)
    config = llama.config
    report = audit(compile_decode(llama, batch=batch, slots=SLOTS, read=read), mesh(tp))
    check_collectives(report, config, tp, batch, batch, loops=1)
    # the cache is updated where it lies, and nothing of a weight's or a layer's cache's size is moved
    assert report.aliased_bytes >= pool(config, tp, batch)
    assert report.copies(MIB) == []
    assert report.temp_bytes <= 2 * MIB + batch * MIB
    least = KERNELS_OF_A_ROW if batch == 1 else KERNELS[read]
    assert report.kernels[1] <= least * config.num_layers + OTHER_KERNELS
    assert report.calls.get("__cudnn$fmhaSoftmax", 0) == (config.num_layers if read == "cudnn" else 0)


def test_a_single_step_has_no_loop():
    """For which the host would wait: else it is the loop's body."""
    llama = model("llama-3.1-8b", 8)
    program = compile_decode(llama, batch=8, slots=SLOTS, loop=False)
    assert " while(" not in program.as_text()
    report = audit(program, mesh(8))
    check_collectives(report, llama.config, 8, 8, 8, loops=0)
    assert report.aliased_bytes >= pool(llama.config, 8, 8)
    assert report.copies(MIB) == []
    assert report.temp_bytes <= 10 * MIB
    assert report.kernels[0] <= KERNELS["cudnn"] * llama.config.num_layers + OTHER_KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("read", KERNELS)
@pytest.mark.parametrize(("name", "tp"), [("llama-3.1-8b", 1), ("llama-3.1-8b", 8), ("llama-3.1-70b", 8)])
def test_mixed(name, tp, read):
    """As many chunks as the budget of tokens leaves beside the rows, so that no sum goes to NCCL."""
    llama = model(name, tp)
    config, size = llama.config, chunk_tokens(llama)
    chunks = (step_tokens(llama) - ROWS) // size
    tokens = ROWS + chunks * size
    report = audit(compile_prefill(llama, tokens=chunks * size, batch=ROWS, slots=SLOTS, read=read), mesh(tp))
    check_collectives(report, config, tp, tokens, ROWS + chunks, loops=0)
    assert report.aliased_bytes >= pool(config, tp, ROWS)
    # what chunks see is gathered, and what attention gives of rows and chunks joined; XLA copies the slice of the rows' values
    # where there are several KV heads; else nothing is moved, the pool least of all
    row = config.num_kv_heads * SLOTS * config.head_dim * 2 // tp
    joined = tokens * config.num_heads * config.head_dim * 4 * 5 // 4 // tp
    largest = joined if read == "cudnn" or tp == config.num_kv_heads else max(joined, ROWS * row)
    assert report.copies(max(MIB, largest + 1)) == []
    gathered, bias, mlp = 2 * chunks * row, chunks * size * SLOTS * 2, 3 * tokens * config.intermediate_size * 2 // tp
    sliced = ROWS * row if largest > joined else 0
    parts = 16 * MIB  # of sums of products with few rows, which XLA cuts
    assert report.temp_bytes <= gathered + bias + mlp + sliced + parts
    assert report.kernels[0] <= KERNELS_MIXED[read] * config.num_layers + OTHER_KERNELS
    assert report.calls["__cudnn$fmhaScaleBiasSoftmax"] == config.num_layers  # the chunks': their mask goes in as a bias


@pytest.mark.parametrize("tp", [1, 8])
def test_the_engine_keeps_to_tokens_that_xla_sums_itself(tp):
    """The budget is the most that stays one kernel: a chunk more goes to NCCL."""
    llama = model("llama-3.1-8b", tp, layers=1)
    assert step_tokens(llama) == (512 if tp > 1 else 2048)
    if tp > 1:
        for tokens, own in ((512, True), (640, False)):
            report = audit(compile_prefill(llama, tokens=tokens), mesh(tp))
            assert {bool(c.kernel) for c in report.collectives if c.kind == "all-reduce"} == {own}


@pytest.mark.slow
def test_prompts_under_sequence_parallelism():
    tokens = 512
    llama = model("llama-3.1-8b", 8, sequence_parallel=True)
    layers, residual = llama.config.num_layers, tokens * llama.config.hidden_size * 2
    report = audit(compile_prefill(llama, tokens=tokens, slots=SLOTS), mesh(8))
    found = sorted((c.kind, c.dtype, c.bytes) for c in report.collectives if c.bytes > 1000)
    gathers, scatters = [("all-gather", "bf16", residual)], [("reduce-scatter", "bf16", residual)]
    assert found == sorted(gathers * (2 * layers + 1) + scatters * (2 * layers + 1))
    assert report.copies(MIB) == []


@pytest.mark.skipif("WHOLE_MODELS" not in os.environ, reason="prints the table of BENCHMARKS.md: WHOLE_MODELS=1 pytest -s")
def test_the_table_of_the_benchmarks():
    eight, seventy = "llama-3.1-8b", "llama-3.1-70b"
    for name, tp, batch in [(eight, 1, 8), (eight, 8, 1), (eight, 8, 8), (eight, 8, 64), (seventy, 8, 8)]:
        llama = model(name, tp)
        tokens = (step_tokens(llama) - ROWS) // chunk_tokens(llama) * chunk_tokens(llama)
        for read in ("cudnn", "slab"):
            programs = {f"decode, {batch}": compile_decode(llama, batch=batch, slots=SLOTS, read=read)}
            if batch == 8:
                programs[f"mixed, {ROWS} + {tokens}"] = compile_prefill(
                    llama, tokens=tokens, batch=ROWS, slots=SLOTS, read=read
                )
            for what, compiled in programs.items():
                report = audit(compiled, mesh(tp))
                reduces = [c for c in report.collectives if c.kind == "all-reduce"]
                kernels = max(report.kernels.values()) / llama.config.num_layers
                sums = f"{len(reduces)}{f' ({reduces[0].kernel}, {reduces[0].bytes // 1024:,} KiB)' if reduces else ''}"
                print(
                    f"| {name} | {tp} | {what} | {read} | {sums} | {kernels:.1f} "
                    f"| {report.argument_bytes / 2**30:.2f} | {report.temp_bytes / MIB:.1f} |"
                )


def test_head_dims_that_cudnn_does_not_take_fall_back_to_xla():
    config = dataclasses.replace(preset("llama-3.2-1b"), head_dim=36, num_layers=1, windows=())
    llama = Llama(config, mesh=mesh(4), dtype="bfloat16")
    assert choose_read(llama) == "slab"
    report = audit(compile_prefill(llama, tokens=256), mesh(4))
    assert not any("fmha" in call for call in report.calls)


def test_a_soft_cap_of_scores_is_left_to_xla(caplog):
    caplog.set_level("INFO", logger="jaxtp")
    config = dataclasses.replace(preset("gemma-2-27b"), num_layers=1, windows=())  # of head_dim 128
    capped = Llama(config, mesh=mesh(4), dtype="bfloat16")
    assert (capped.layers[0].attention.kernel, choose_read(capped)) == ("xla", "slab")
    assert "attention scores have a soft cap, which cuDNN's kernels have not" in caplog.text
    caplog.clear()
    plain = dataclasses.replace(capped.config, attention_softcap=None)
    free = Llama(plain, mesh=mesh(4), dtype="bfloat16")
    assert (free.layers[0].attention.kernel, choose_read(free)) == ("cudnn", "cudnn")
    assert not caplog.text
    with pytest.raises(ValueError, match="kernel='cudnn' has no soft cap of attention scores, which this model has; use xla"):
        Llama(capped.config, mesh=mesh(4), dtype="bfloat16", kernel="cudnn")


def test_sampling_never_gathers_the_logits():
    from jaxtp.ops.sampling import Features

    llama = model("llama-3.1-8b", 8, layers=1)
    features = Features(random=True, min_p=True, truncate=True, penalties=True, logprobs=5)
    report = audit(compile_decode(llama, batch=4, slots=256, features=features), mesh(8))
    logits = 4 * llama.config.vocab_size * 4
    assert max(c.bytes for c in report.collectives if c.kind != "all-reduce") < logits / 1000
    assert max(c.bytes for c in report.collectives) < logits / 50
