"""The training step compiled for H200s: what ZeRO holds and communicates, at the width of Llama-3.1-8B."""

import dataclasses
import functools
import math
from collections import Counter

import pytest
import steps

from jaxtp import preset
from jaxtp.audit import audit, gpu_mesh
from jaxtp.planner import Split, Training, memory
from jaxtp.train.lora import Lora

pytest.importorskip("jax_plugins.xla_cuda13", reason="the compiler's plugin is not installed: .[gpu-compiler]")

pytestmark = pytest.mark.slow
DP, TP, LAYERS, ROWS, TOKENS = 4, 2, 32, 8, 4096
LOOPED = "layers.*."


def compiled(
    zero: int,
    *,
    remat: str = "full",
    accumulate: int = 1,
    sequence_parallel: bool = False,
    lora: Lora | None = None,
    layers: int = LAYERS,
    tokens: int = TOKENS,
):
    """Each program is compiled once and read by several tests; nearly all of them are those of the table of peaks."""
    return _compiled(zero, remat, accumulate, sequence_parallel, lora, layers, tokens)


@functools.cache  # which tells f(x) from f(x=x)
def _compiled(zero, remat, accumulate, sequence_parallel, lora, layers, tokens):
    mesh = gpu_mesh("H200", dp=DP, tp=TP)
    config = dataclasses.replace(preset("llama-3.1-8b"), num_layers=layers, windows=())
    trainer = steps.trainer(config, mesh, sequence_parallel=sequence_parallel, lora=lora, zero=zero, remat=remat)
    return audit(steps.compiled(trainer, rows=ROWS, tokens=tokens, accumulate=accumulate), mesh), trainer


# few layers and tokens: XLA joins what it sends, and no stack of layers is as large as all logits
SMALL = {"lora": Lora(rank=16), "layers": 3, "tokens": 1024}
TWICE = {"remat": "save-dots", "sequence_parallel": True, "accumulate": 2}


def params(trainer, *, looped=None):
    """Parameters on each tp share (norms are whole on it), of the blocks, of the rest, or of both."""
    total = 0
    for path, spec in trainer.specs.items():
        if looped in (None, path.startswith(LOOPED)):
            total += math.prod(spec.shape) // (TP if "tp" in spec.spec else 1)
    return total


def moved(report, kind, axis, dtype, *, loops=None):
    """Bytes of all collectives of a kind over one axis."""
    return sum(
        c.bytes * (LAYERS if c.loops else 1)
        for c in report.collectives
        if (c.kind, c.axes, c.dtype) == (kind, (axis,), dtype) and loops in (None, c.loops) and c.bytes > 64
    )


@pytest.mark.parametrize(("zero", "options"), [(0, {}), (1, {"remat": "none"}), (2, TWICE), (3, {})])
def test_what_each_device_holds(zero, options):
    report, trainer = compiled(zero, **options)
    held = 3 * 4 * params(trainer) / (DP if zero else 1)  # parameters and two moments, in float32
    arrays = 4 * options.get("accumulate", 1)
    batch = arrays * ROWS // DP * TOKENS * 4
    assert report.argument_bytes == pytest.approx(held + batch, rel=1e-3)
    assert report.aliased_bytes == pytest.approx(held, rel=1e-3)


def test_zero_0_all_reduces_the_gradients():
    report, trainer = compiled(0)
    assert moved(report, "all-reduce", "dp", "f32") == pytest.approx(4 * params(trainer), rel=1e-6)
    assert report.count("reduce-scatter", axis="dp") == report.count("all-gather", axis="dp") == 0


def test_zero_1_scatters_gradients_and_gathers_weights_once():
    report, trainer = compiled(1, remat="none")
    assert moved(report, "reduce-scatter", "dp", "f32", loops=0) == pytest.approx(4 * params(trainer), rel=1e-6)
    assert moved(report, "all-gather", "dp", "bf16", loops=0) == pytest.approx(2 * params(trainer), rel=1e-6)
    assert report.count("reduce-scatter", axis="dp", loops=1) == report.count("all-gather", axis="dp", loops=1) == 0
    assert moved(report, "all-reduce", "dp", "f32") == 0


def test_zero_1_communicates_once_for_all_microbatches():
    report, trainer = compiled(1, **TWICE)
    assert moved(report, "reduce-scatter", "dp", "f32", loops=0) == pytest.approx(4 * params(trainer), rel=1e-6)
    assert not any("dp" in c.axes and c.loops and c.bytes > 64 for c in report.collectives)


def test_zero_2_scatters_the_gradients_of_each_microbatch():
    report, trainer = compiled(2, **TWICE)
    scattered = [c for c in report.collectives if c.kind == "reduce-scatter" and c.axes == ("dp",)]
    assert {c.loops for c in scattered} == {1}  # in the loop over microbatches
    assert sum(c.bytes for c in scattered) == pytest.approx(4 * params(trainer), rel=1e-6)
    assert moved(report, "all-gather", "dp", "bf16", loops=0) == pytest.approx(2 * params(trainer), rel=1e-6)


def test_zero_3_gathers_and_scatters_layer_by_layer():
    report, trainer = compiled(3)
    blocks, tables = params(trainer, looped=True), params(trainer, looped=False)
    # forward and again backward; the tables once
    assert moved(report, "all-gather", "dp", "bf16", loops=1) == pytest.approx(2 * 2 * blocks, rel=1e-3)
    assert moved(report, "reduce-scatter", "dp", "bf16", loops=1) == pytest.approx(2 * blocks, rel=1e-3)
    assert moved(report, "all-gather", "dp", "bf16", loops=0) == pytest.approx(2 * tables, rel=1e-3)
    assert moved(report, "all-reduce", "dp", "f32") == 0


def test_tensor_parallelism_all_reduces_twice_a_layer_each_way():
    report, _ = compiled(1, remat="none")
    stream = ROWS // DP * TOKENS * 4096 * 2
    inside = [c for c in report.collectives if c.axes == ("tp",) and c.loops == 1 and c.bytes >= stream]
    assert [(c.kind, c.dtype, c.bytes) for c in inside] == [("all-reduce", "bf16", stream)] * 4


def test_sequence_parallelism_scatters_and_gathers_instead():
    report, _ = compiled(3, sequence_parallel=True, remat="save-attention")
    stream = ROWS // DP * TOKENS * 4096 * 2
    assert not any(c.kind == "all-reduce" and c.axes == ("tp",) and c.bytes >= stream for c in report.collectives)
    assert report.count("reduce-scatter", axis="tp", loops=1) >= 4
    assert report.count("all-gather", axis="tp", loops=1) >= 4


@pytest.mark.parametrize(
    ("sequence_parallel", "kinds"), [(False, {"all-reduce": 4}), (True, {"all-gather": 4, "reduce-scatter": 4})]
)
def test_lora_adds_no_collective_of_the_stream(sequence_parallel, kinds):
    report, trainer = compiled(1, remat="none", sequence_parallel=sequence_parallel, **SMALL)
    inside = [c for c in report.collectives if c.loops and "dp" not in c.axes and c.dtype == "bf16"]
    stream, between = (ROWS // DP * SMALL["tokens"] * width * 2 for width in (4096, 16))
    assert Counter(c.kind for c in inside if c.bytes >= stream) == kinds
    # what is of rank r travels along: of o and down forward, of q, k, v, gate and up backward; scattered and gathered, both
    low = sum(c.bytes % stream for c in inside if c.bytes >= stream)
    assert low == (14 if sequence_parallel else 7) * between
    matrices = sum(math.prod(s.shape[1:]) for s in trainer.specs.values())
    assert sum(c.bytes for c in inside if c.bytes < stream) <= 2 * matrices
    # and over dp the adapters alone
    assert moved(report, "all-gather", "dp", "bf16") < 2 * params(trainer)
    assert moved(report, "reduce-scatter", "dp", "f32") + moved(report, "all-reduce", "dp", "f32") <= 4.1 * params(trainer)


def test_memory_falls_with_rematerialisation():
    temp = {remat: compiled(1, remat=remat)[0].temp_bytes for remat in ("none", "save-dots", "save-attention", "full")}
    assert temp["none"] > temp["save-dots"] > temp["save-attention"] > temp["full"] - 1
    # what is kept of a layer for each token: everything, against its input alone
    stream = ROWS // DP * TOKENS * 4096 * 2 * LAYERS
    assert temp["none"] - temp["full"] > 3 * stream


PEAKS = [(0, "full", False, 1), (1, "none", False, 1), (1, "save-dots", False, 1), (1, "save-dots", True, 2)]
PEAKS += [(2, "save-dots", True, 2), (3, "save-attention", True, 1), (3, "full", False, 1)]


@pytest.mark.parametrize(("zero", "remat", "sequence_parallel", "accumulate"), PEAKS)
def test_the_peak_is_that_of_the_formula(zero, remat, sequence_parallel, accumulate):
    """All of Llama-3.1-8B, 4096 tokens a row; with `pytest -s`, the table of BENCHMARKS.md."""
    settings = {"remat": remat, "sequence_parallel": sequence_parallel, "accumulate": accumulate}
    report, trainer = compiled(zero, **settings)
    peak = report.argument_bytes + report.temp_bytes + report.output_bytes - report.aliased_bytes
    split = Split(dp=DP, tp=TP, zero=zero, remat=remat, sequence_parallel=sequence_parallel, microbatches=accumulate)
    found = memory.training(trainer.stacked.config, split, Training(ROWS * accumulate, 4096))
    parts = [found.state, found.weights + found.gradients, found.activations, found.workspace, found.total, peak]
    cells = [zero, remat, "yes" if sequence_parallel else "no", accumulate, *(f"{part / 2**30:.1f}" for part in parts)]
    print(f"\n| {' | '.join(map(str, cells))} | {peak / found.total - 1:+.1%} |")
    assert peak == pytest.approx(found.total, rel=0.1)


def test_attention_goes_through_cudnn_both_ways():
    report, _ = compiled(1, remat="none")
    assert report.calls["__cudnn$fmhaSoftmax"] == 1
    assert report.calls["__cudnn$fmhaSoftmaxBackward"] == 1


def test_full_logits_never_exist():
    report, trainer = compiled(1, remat="none", **SMALL)
    logits = ROWS // DP * SMALL["tokens"] * trainer.stacked.config.vocab_size // TP * 4
    assert max(write.bytes for write in report.writes if write.opcode != "while") < max(
        logits, 4 * params(trainer, looped=False)
    )
    assert not any(c.bytes >= logits and c.axes == ("tp",) for c in report.collectives)
