"""Mixtures of experts compiled for H200s: what they hold, compute and send is the formula, and no expert is copied."""

import re

import pytest
from steps import shallow

from jaxtp import Plan, preset
from jaxtp.audit.check import check, compiled_programs, gpu_mesh
from jaxtp.planner import Generation, Split, Training, cluster
from jaxtp.planner.experts import travels

pytestmark = pytest.mark.slow
TASK = Generation(8, 2048, 64)
UPDATE = Training(16, 2048)
LAYOUTS = [Split(tp=8), Split(ep=8), Split(ep=4, tp=2)]
PAIRS = [(model, split, TASK) for model in ("mixtral-8x7b", "qwen3-30b-a3b") for split in LAYOUTS] + [
    ("qwen3-30b-a3b", Split(pp=2, ep=2, tp=2), TASK),
    ("mixtral-8x7b", Split(ep=4, tp=2, zero=1, remat="save-dots"), UPDATE),
    ("qwen3-30b-a3b", Split(dp=2, ep=2, tp=2, zero=3, remat="save-dots"), UPDATE),
    ("mixtral-8x7b", Split(pp=2, ep=2, tp=2, zero=1, microbatches=4, expert_dispatch="ragged"), UPDATE),
    ("mixtral-8x7b", Split(pp=2, cp=2, ep=2, zero=1, microbatches=4), UPDATE),
    ("qwen3-30b-a3b", Split(ep=8, zero=1), UPDATE),  # nothing is made again
]


def plan(model, split, task):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="the compiler for GPUs is not installed")
    layers = 2 if isinstance(task, Training) else 1
    return Plan(model, shallow(preset(model), layers * split.pp), cluster(f"{split.size}xH200"), split, task)


@pytest.mark.parametrize(("model", "split", "task"), PAIRS, ids=lambda value: value if isinstance(value, str) else None)
def test_programs_are_their_formulas(model, split, task):
    found = check(plan(model, split, task))
    kernels = max(preset(model).experts.width * preset(model).hidden_size * 2 * 2 / split.tp, 1)  # bytes of one expert's
    for line in found.lines:
        if line.what == "temporary":
            assert abs(line.compiled - line.predicted) < max(0.15 * line.predicted, 2**-8), (line.program, line)
            assert line.program != "decode" or line.compiled * 2**30 < kernels
        elif line.what in ("arguments", "products"):
            assert abs(line.difference) < 0.05, (line.program, line)
        elif line.what.startswith("ragged"):  # with room for all rows to go everywhere; planned are a fair router's
            assert line.times[0] == line.times[1]
            assert line.compiled * travels(preset(model), split.ep) == pytest.approx(line.predicted * (split.ep - 1), rel=0.001)
        elif isinstance(task, Generation) or line.predicted > 0.1:  # MB; smaller ones of an update XLA joins as it likes
            assert abs(line.difference) < 0.01, (line.program, line)


def test_a_token_alone_reads_the_experts_that_it_goes_to():
    """Whatever touches a kernel of experts is a fusion that gathers from it, and gives no more than a few numbers of each."""
    *_, decode = compiled_programs(plan("qwen3-30b-a3b", Split(), Generation(1, 256, 64)), gpu_mesh("H200"))
    kernels = r"bf16\[128,(?:768,2,2048|2048,768)\]"
    readers = [
        body
        for body in re.findall(r"^%?fused[^\n]*\{\n.*?^\}", decode.as_text(), re.MULTILINE | re.DOTALL)
        if re.search(rf"= {kernels}\S* parameter", body)
    ]
    assert len(readers) == 2  # a layer's products
    for body in readers:
        (name,) = re.findall(rf"(%\S+) = {kernels}\S* parameter", body)
        uses = [line for line in body.splitlines() if f"{name}," in line or f"{name})" in line]
        assert uses
        assert all(" gather(" in line for line in uses[0:]), uses
        root = next(line for line in body.splitlines() if line.strip().startswith("ROOT"))
        assert not re.search(r"\[(?:\d+,)*2048,(?:\d+,)*768|\[(?:\d+,)*768,2,2048", root), root
