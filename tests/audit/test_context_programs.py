"""Long rows over cp, compiled for H200s: memory as planned, no scores of whole rows, a ring's hops beside its products, and a
cache that lies on all devices and is copied on none. Llama-3.1-8B, whole in training, four layers in generation.
"""

import functools
import re

import pytest
from steps import shallow

from jaxtp import Plan, preset
from jaxtp.audit import audit, compile_decode, compile_step, gpu_mesh
from jaxtp.audit.check import check
from jaxtp.audit.targets import abstract_llama, abstract_trainer
from jaxtp.planner import Generation, Split, Training, cluster, memory
from jaxtp.planner.programs import programs

pytest.importorskip("jax_plugins.xla_cuda13", reason="the compiler's plugin is not installed: .[gpu-compiler]")

pytestmark = pytest.mark.slow
CONFIG = preset("llama-3.1-8b")
MIB, GIB = 2**20, 2**30


@functools.cache
def trained(tokens, split):
    """An update from one row on each group: the audit of its program, and the program's text."""
    mesh = gpu_mesh("H200", **split.axes)
    trainer = abstract_trainer(CONFIG, mesh, split, dtype="bfloat16")
    found = compile_step(trainer, rows=split.dp, tokens=tokens)
    return audit(found, mesh), found.as_text()


def update(**axes):
    return Split(**{"zero": 1, "remat": "save-attention", **axes})


UPDATES = [(tokens, update(cp=cp)) for tokens in (1 << 15, 1 << 17) for cp in (1, 2, 4, 8)]
# ZeRO's shares over two devices, whose gradients are the largest that are whole
UPDATES += [(8192, update(dp=2)), (1 << 15, update(cp=2, tp=2, sequence_parallel=True)), (1 << 15, update(cp=4, remat="full"))]


@pytest.mark.parametrize(("tokens", "split"), UPDATES, ids=lambda value: value.told() if isinstance(value, Split) else value)
def test_memory_is_as_planned(tokens, split):
    report, _ = trained(tokens, split)
    (planned,) = programs(CONFIG, split, Training(split.dp, tokens))
    print(f"temporary: {report.temp_bytes / GIB:.1f} GiB, planned {planned.temporary / GIB:.1f}")
    assert report.temp_bytes == pytest.approx(planned.temporary, rel=0.1)
    assert report.argument_bytes == pytest.approx(planned.arguments, rel=0.01)


@pytest.mark.parametrize("strategy", ["gathered", "ring", "heads"])
def test_no_scores_of_whole_rows(strategy):
    """No array of attention has two dims of a row's, a rank's or a chunk's tokens."""
    tokens, cp = 1 << 17, 8
    _, text = trained(tokens, update(cp=cp, context_strategy=strategy))
    of_tokens = {str(tokens), str(tokens // cp), str(tokens // cp // 2)}
    of_attention = "\n".join(line for line in text.splitlines() if "attention" in line)
    shapes = set(re.findall(r"\w+\[([\d,]+)\]", of_attention))
    assert any(of_tokens & {*shape.split(",")} for shape in shapes)
    assert [shape for shape in shapes if sum(dim in of_tokens for dim in shape.split(",")) > 1] == []


@pytest.mark.parametrize(("cp", "hops", "beside"), [(4, 10, 8), (8, 22, 16)])
def test_a_ring_sends_beside_its_products(cp, hops, beside):
    """Of a layer: c - 1 permutes forward, c - 1 and c backward; what goes alone are gradients, in float32."""
    report, _ = trained(1 << (15 if cp == 4 else 17), update(cp=cp, context_strategy="ring"))
    sent = [c for c in report.collectives if c.kind == "collective-permute"]
    assert sum(c.times for c in sent) == hops * CONFIG.num_layers
    assert sum(c.times for c in sent if c.overlapped) >= beside * CONFIG.num_layers


@pytest.mark.parametrize("axes", [{"cp": 8}, {"cp": 4, "tp": 2}, {"cp": 2, "tp": 4}], ids=str)
@pytest.mark.parametrize("read", ["cudnn", "slab"])
def test_a_step_of_decoding_with_128k_tokens_cached(axes, read):
    """One collective of a layer is over cp alone, its merging; those over all are the sums that tp has, too."""
    rows, slots = 4, CONFIG.context
    config, split = shallow(CONFIG, 4), Split(**axes, over_cp="slots")
    mesh = gpu_mesh("H200", **split.axes)
    model = abstract_llama(config, mesh, split, dtype="bfloat16")
    report = audit(compile_decode(model, batch=rows, slots=slots, read=read, cache_tokens=rows * slots, loop=False), mesh)
    merged = [c for c in report.collectives if c.axes == ("cp",) and c.kind == "all-to-all"]
    assert sum(c.times for c in merged) == config.num_layers
    summed = [c for c in report.collectives if c.kind == "all-reduce"]
    assert sum(c.times for c in summed) == 2 * config.num_layers + 1
    assert {c.axes for c in summed} == {tuple(axis for axis in ("cp", "tp") if axes.get(axis, 1) > 1)}
    task = Generation(rows, slots - 64, 64)
    whole = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2 * rows * slots
    assert memory.cache(config, split, task) == whole // 8
    weights = memory.weights(config, split, task)
    assert report.argument_bytes == pytest.approx(weights + whole // 8, rel=0.001)
    assert report.aliased_bytes >= whole // 8
    assert report.copies(MIB) == []
    # without cuDNN the scores of the slots that are here
    assert report.temp_bytes < 2 * MIB if read == "cudnn" else 0.02 * whole


def test_what_a_ring_sends_in_stages():
    """Keys and values go around in each tick's forward pass, and again in its backward pass, but for one hop."""
    split = Split(pp=2, cp=4, zero=1, microbatches=4, context_strategy="ring")
    lines = check(Plan("llama-3.1-8b", shallow(CONFIG, 4), cluster("8xH200"), split, Training(4, 8192))).lines
    hops = [line for line in lines if line.what.startswith("collective-permute over cp")]  # XLA may join those of two dtypes
    assert sum(line.compiled for line in hops) == pytest.approx(sum(line.predicted for line in hops), rel=1e-3)
