"""What the pipelined training step does, read from the compiled program: on CPUs, and compiled for H200s."""

import dataclasses
import functools
import math

import pytest
import steps
import tiny

from jaxtp import Schedule, make_mesh, preset
from jaxtp.audit import audit, gpu_mesh, hlo

SHAPES = [("1f1b", 1), ("gpipe", 1), ("interleaved_1f1b", 2)]


@functools.cache
def on_cpus(schedule, chunks, micros, *, tp=1, remat="none"):
    config = tiny.config(num_layers=8)
    mesh = make_mesh(pp=4, tp=tp)
    trainer = steps.trainer(config, mesh, dtype="float32", schedule=schedule, chunks=chunks, zero=1, remat=remat)
    return steps.compiled(trainer, rows=3, tokens=64, accumulate=micros), mesh


@pytest.mark.parametrize(("schedule", "chunks"), SHAPES)
def test_a_step_takes_the_ticks_of_the_formula(schedule, chunks):
    work = {}
    for micros in (8, 24):
        found = hlo.computations(on_cpus(schedule, chunks, micros)[0].as_text())
        ticks = [hlo.trips(i) for i in found["ENTRY"] if i.opcode == "while"]
        assert ticks == [ticks for _, ticks in Schedule(schedule, 4, micros, chunks).phases]
        work[micros] = hlo.flops(found)
    # a device's share of the blocks' products of a microbatch, F's once more than without stages, and of the head's
    alone = [hlo.flops(hlo.computations(unpipelined(layers).as_text())) for layers in (8, 4)]
    blocks, head = 2 * (alone[0] - alone[1]), 2 * alone[1] - alone[0]
    each = (4 / 3 * blocks + head) / 4
    # (with chunks, the head's work is done at every tick)
    for micros, found in work.items():
        length = micros + 3 / chunks
        assert found == pytest.approx(length * (each + (chunks - 1) * head / 4), rel=0.02), micros


@functools.cache
def unpipelined(layers):
    trainer = steps.trainer(tiny.config(num_layers=layers), make_mesh(), dtype="float32")
    return steps.compiled(trainer, rows=3, tokens=64)


@pytest.mark.parametrize(("schedule", "chunks"), SHAPES)
def test_only_permutes_go_from_stage_to_stage(schedule, chunks):
    program, mesh = on_cpus(schedule, chunks, 8, tp=2, remat="full")
    report = audit(program, mesh)
    permutes = [c for c in report.collectives if c.kind == "collective-permute"]
    assert {c.axes for c in permutes} == {("pp",)}
    assert len(permutes) == {"gpipe": 2}.get(schedule, 4)  # F; F and B; B
    assert " conditional(" not in program.as_text()
    assert report.count("all-gather", axis="pp") == report.count("all-to-all") == 0


@pytest.mark.parametrize("micros", [4, 8, 24])
@pytest.mark.parametrize(("schedule", "chunks"), SHAPES)
def test_inputs_are_kept_for_as_many_microbatches_as_the_schedule_says(schedule, chunks, micros):
    program, _ = on_cpus(schedule, chunks, micros)
    loop = next(i for i in hlo.computations(program.as_text())["ENTRY"] if i.opcode == "while")
    # [d, P, S, b, T, D]
    kept = {shape[2] for _, shape in hlo.shapes(loop.shape) if len(shape) == 6 and shape[-3:] == (3, 64, 64)}
    assert kept == {Schedule(schedule, 4, micros, chunks).in_flight(0)}


# -- compiled for H200s --------------------------------------------------------------------------------------------------

GiB = 2**30
SMALL = 2**22  # the batch itself, its token ids; a microbatch of activations is 64 MiB


@functools.cache
def on_gpus(name="llama-3.1-8b", layers=8, micros=16, *, dp=2, tp=2, rows=4, **pipeline):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="the compiler's plugin is not installed: .[gpu-compiler]")
    mesh = gpu_mesh("H200", dp=dp, pp=4, tp=tp)
    config = preset(name)
    config = dataclasses.replace(config, num_layers=layers or config.num_layers, windows=())
    trainer = steps.trainer(config, mesh, sequence_parallel=True, zero=1, remat="save-dots", **pipeline)
    return audit(steps.compiled(trainer, rows=rows * dp, tokens=4096, accumulate=micros), mesh), trainer


@pytest.mark.slow
def test_dp_communicates_once_a_step_and_pp_only_activations():
    report, trainer = on_gpus(micros=16)
    held = sum(math.prod(s.shape) // math.prod(2 if a == "tp" else 4 for a in axes(s)) for s in trainer.specs.values())
    over_dp = [c for c in report.collectives if "dp" in c.axes and c.bytes > 64]
    assert not any(c.loops for c in over_dp)
    gathered = sum(c.bytes for c in over_dp if c.kind == "all-gather")
    scattered = sum(c.bytes for c in over_dp if c.kind == "reduce-scatter")
    assert (gathered, scattered) == (2 * held, 4 * held)  # weights in bfloat16, gradients in float32
    stream = 2 * 4 * 4096 * 4096  # a microbatch's activations
    over_pp = [c for c in report.collectives if "pp" in c.axes and c.bytes > 2**16]
    assert {c.bytes for c in over_pp} == {stream // 2}  # of which each device of tp has half
    assert {c.kind for c in over_pp} == {"collective-permute", "all-reduce"}
    assert report.count("collective-permute") == 4


def axes(spec):
    """Those over which a parameter is cut, one by one."""
    return [a for part in spec.spec.partitions for a in (part if isinstance(part, tuple) else (part,)) if a]


@pytest.mark.slow
def test_1f1b_takes_no_more_memory_with_more_microbatches():
    def temp(schedule, micros):
        return on_gpus(**({"schedule": schedule} if schedule != "1f1b" else {}), micros=micros)[0].temp_bytes

    flat = [temp("1f1b", micros) for micros in (8, 16)]
    assert max(flat) - min(flat) < SMALL
    grows = [temp("gpipe", micros) for micros in (8, 16)]
    one = 4 * 4096 * 4096 * 2 // 2  # an input that a rank keeps
    assert grows[1] - grows[0] == pytest.approx(8 * one, abs=SMALL)
    assert flat[1] < grows[1]


@pytest.mark.slow
def test_llama_70b_at_tp_8_and_pp_4_fits():
    report, trainer = on_gpus("llama-3.1-70b", None, dp=1, tp=8, rows=1)
    assert report.argument_bytes < 25 * GiB  # weights and two moments in float32, a thirty-second on each device
    assert report.argument_bytes + report.temp_bytes < 48 * GiB
    assert report.count("collective-permute") == 4
    whole_layers = 2 * sum(math.prod(s.shape[1:]) for s in trainer.specs.values() if s.dims[0] == "layers") // 8
    assert not [c for c in report.collectives if c.kind == "all-gather" and c.bytes >= whole_layers]
