"""The steps that H200s would run with kernels in few bits, compiled here and read: nothing of a kernel is written in 16 bits.

Needs XLA's plugin for GPUs (`pip install -e ".[gpu-compiler]"` and cuDNN).
"""

import dataclasses
import functools

import jax
import pytest
from flax import nnx
from steps import shallow

from jaxtp import preset
from jaxtp.audit import audit, compile_decode, compile_prefill, gpu_mesh
from jaxtp.audit.targets import abstract_llama
from jaxtp.config.quantization import read
from jaxtp.planner import Generation, Split, memory

pytest.importorskip("jax_plugins.xla_cuda13", reason="the compiler's plugin is not installed: .[gpu-compiler]")

LAYERS, SLOTS, MIB = 3, 2048, 2**20
CONFIGS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "fp8 in blocks": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "fp8 of channels": {"quant_method": "fbgemm_fp8"},
    "nf4": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
    },
}
KERNELS, OTHER_KERNELS = {1: 23, 8: 14, 64: 14}, 22  # of a layer in 16 bits at most, and beside the layers
MORE = 6  # of a layer in few bits
# kernels of an MLP in 16 bits that prompts have written out at a time: for zero points, gate and up; for levels, down as well
AT_ONCE = {"awq": 2, "nf4": 3}


@functools.cache
def steps(name, tp, kind):
    """(model, {step: report}) of a few layers."""
    config = shallow(preset(name), LAYERS)
    if kind in CONFIGS:
        config = dataclasses.replace(config, schemes=read(CONFIGS[kind]))
    mesh = gpu_mesh("H200", tp=tp)
    model = abstract_llama(config, mesh, Split(tp=tp), dtype="bfloat16", quantization="int4" if kind == "int4" else None)
    programs = {rows: compile_decode(model, batch=rows, slots=SLOTS, loop=False) for rows in (1, 8, 64)}
    programs["prompts"] = compile_prefill(model, tokens=SLOTS)
    return model, {step: audit(program, mesh) for step, program in programs.items()}


CASES = [
    *(("llama-3.1-8b", 8, kind) for kind in (*CONFIGS, "int4")),
    *(("llama-3.1-70b", 8, kind) for kind in (*CONFIGS, "int4")),
    ("llama-3.1-8b", 1, "awq"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tp", "kind"), CASES)
def test_steps(name, tp, kind):
    (model, reports), (_, plain) = steps(name, tp, kind), steps(name, tp, "16 bits")
    config = model.config
    task = Generation(dtype="bfloat16")
    held = memory.weights(config, Split(tp=tp), task)
    saved = memory.weights(dataclasses.replace(config, schemes=None), Split(tp=tp), task) - held
    table, arrays = memory.params(config, Split(tp=tp)).embed, len(jax.tree.leaves(nnx.split(model)[1]))
    for step, report in reports.items():
        # arguments by formula; what a step reads of weights is each of them once, of the embedding a row for each token
        assert report.argument_bytes == pytest.approx(plain[step].argument_bytes - saved, rel=0.01)
        if step != "prompts":
            read = sum(report.reads.get(i, 0) for i in range(arrays))  # weights are a program's first arguments
            assert read == pytest.approx(held - 2 * table, rel=0.001)
        mlp = 2 * config.intermediate_size // tp * config.hidden_size  # bytes of one of its three kernels in 16 bits
        if step == "prompts" and kind in AT_ONCE:
            assert report.temp_bytes <= plain[step].temp_bytes + AT_ONCE[kind] * mlp
            continue
        mine, alike = ([c.bytes for c in told.copies(MIB)] for told in (report, plain[step]))
        if kind == "nf4" and step != "prompts":  # what the kernel sums in one part is rounded by itself: rows, no weights
            mine = [size for size in mine if size != 2 * step * config.hidden_size]
        assert sorted(mine) == sorted(alike)
        # sums of products come in parts, in float32, as dense ones of few rows do; those of fp8 in prompts are in float32, too
        result = 4 * SLOTS * max(2 * config.intermediate_size // tp, config.hidden_size) + MIB
        assert report.temp_bytes <= plain[step].temp_bytes + (result if step == "prompts" else step * MIB // 8)
        sums = [(c.kind, c.axes, c.dtype, c.bytes) for c in report.collectives]
        assert sums == [(c.kind, c.axes, c.dtype, c.bytes) for c in plain[step].collectives]
        if step != "prompts":
            assert sum(report.kernels.values()) <= (KERNELS[step] + MORE) * LAYERS + OTHER_KERNELS


@pytest.mark.parametrize(("tp", "bits"), [(1, "int8"), (8, "int8"), (8, "fp8")])
def test_a_cache_of_8_bits(tp, bits):
    """Half the pool, updated in place; nothing of it is written in 16 bits, and nothing is communicated for it."""
    config = shallow(preset("llama-3.1-8b"), 2)
    mesh, split, rows, slots = gpu_mesh("H200", tp=tp), Split(tp=tp), 8, 4096
    reports = []
    for kind in ("auto", bits):
        model = abstract_llama(config, mesh, split, dtype="bfloat16", bits=kind)
        reports.append(audit(compile_decode(model, batch=rows, slots=slots, loop=False, read="slab"), mesh))
    plain, coded = reports
    pools = [
        rows * slots * memory.slot(config, split, Generation(dtype="bfloat16", kv_cache_dtype=kind)) for kind in ("auto", bits)
    ]
    assert pools[0] / pools[1] == pytest.approx(2 * 128 / (128 + 2))
    assert plain.argument_bytes - coded.argument_bytes == pytest.approx(pools[0] - pools[1], rel=1e-3)
    assert coded.aliased_bytes >= pools[1]
    assert coded.copies(MIB) == []
    assert coded.temp_bytes <= plain.temp_bytes + MIB
    assert [(c.kind, c.bytes) for c in coded.collectives] == [(c.kind, c.bytes) for c in plain.collectives]
    assert sum(coded.kernels.values()) <= sum(plain.kernels.values()) + 5 * config.num_layers
