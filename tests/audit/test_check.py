"""Predictions beside the compiler: plans of well-known models, compiled for the GPUs that they name."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from steps import shallow

from jaxtp import Plan, preset
from jaxtp.audit.check import check
from jaxtp.planner import Generation, Split, Training, cluster
from jaxtp.planner.programs import programs

GOLDEN = Path(__file__).parents[1] / "golden" / "collectives.json"  # how often, and MB in all
FEW, MANY, LONG = Generation(8, 1024, 256), Generation(64, 512, 512), Generation(2, 8192, 512)
WHOLE_CONTEXT = Generation(2, 130944, 128)
EIGHT_BITS = dataclasses.replace(FEW, quantization="int8")
SHARED = Split(dp=4, tp=2, sequence_parallel=True, zero=1, microbatches=2, remat="save-dots")
THREE_D = Split(dp=2, pp=4, tp=8, sequence_parallel=True, zero=1, microbatches=16, remat="save-dots")
PAIRS = [
    ("llama-3.1-8b", "H100", Split(), FEW),
    ("llama-3.1-8b", "A100-80", Split(tp=2), LONG),
    ("llama-3.1-8b", "L40S", Split(dp=2, tp=4), MANY),
    ("qwen3-8b", "H200", Split(tp=8), MANY),
    ("llama-3.2-1b", "H100", Split(dp=4), MANY),
    ("llama-3.1-70b", "H100", Split(tp=8), FEW),
    ("llama-3.1-70b", "H100", Split(pp=2, tp=4), FEW),
    ("llama-3.1-405b", "H100", Split(pp=4, tp=8), FEW),
    ("olmo-2-7b", "H100", Split(tp=4), FEW),
    ("llama-3.1-8b", "H100", Split(), EIGHT_BITS),
    ("llama-3.1-70b", "H100", Split(pp=2, tp=2), EIGHT_BITS),
    ("llama-3.1-8b", "H200", Split(cp=8, over_cp="slots"), WHOLE_CONTEXT),
    ("llama-3.1-8b", "H200", Split(cp=4, tp=2, over_cp="slots"), WHOLE_CONTEXT),
    ("llama-3.1-70b", "H200", Split(pp=2, cp=2, tp=2, over_cp="slots"), LONG),
    ("qwen3-30b-a3b", "H200", Split(cp=2, tp=4, over_cp="slots"), FEW),
    ("llama-3.1-8b", "H100", Split(dp=8, zero=3, remat="save-dots"), Training(16, 4096)),
    ("llama-3.1-8b", "H100", SHARED, Training(16, 4096)),
    ("llama-3.1-8b", "H200", Split(dp=4, tp=2, zero=2, remat="save-attention", microbatches=2), Training(16, 4096)),
    ("llama-3.2-1b", "A100-80", Split(tp=2, remat="full"), Training(8, 2048)),
    ("qwen3-8b", "H200", SHARED, Training(16, 4096)),
    ("llama-3.1-8b", "H100", dataclasses.replace(SHARED, dp=1, tp=8, zero=0), Training(8, 4096)),
    ("qwen2.5-7b", "H100", dataclasses.replace(SHARED, dp=2, tp=4, remat="full"), Training(16, 4096)),
    ("llama-3.1-8b", "H200", Split(cp=4, zero=1, remat="save-attention"), Training(1, 32768)),
    ("llama-3.1-8b", "H200", Split(cp=8, zero=1, remat="save-attention"), Training(1, 131072)),
    ("llama-3.1-8b", "H200", Split(cp=4, zero=1, remat="save-dots", context_strategy="ring"), Training(1, 32768)),
    ("llama-3.1-8b", "H200", dataclasses.replace(SHARED, dp=2, cp=2, tp=2), Training(4, 32768)),
    ("llama-3.1-70b", "H200", THREE_D, Training(32, 4096)),
    ("llama-3.1-405b", "B200", dataclasses.replace(THREE_D, dp=1, remat="full"), Training(16, 4096)),
]


WHOLE = 4  # of the plans of generation that one is compiled with all of its layers (of training all are: a loop's body)


def made(pair):
    """The model of a pair. Where stages are uneven they stay so."""
    name, _, split, task = pair
    config = preset(name)
    if isinstance(task, Training) or pair is PAIRS[WHOLE]:
        return config
    return shallow(config, max(4, 2 * split.pp) + config.num_layers % split.pp)


def name(pair) -> str:
    model, gpu, split, task = pair
    layers = made(pair).num_layers
    if layers != preset(model).num_layers:
        model = f"{model} of {layers} layers"
    if isinstance(task, Training):
        way = f" {split.context_strategy}" if split.context_strategy else ""
        return f"{model} {gpu} {split.told()} zero={split.zero} {split.remat}{way} train"
    bits = f" {task.quantization}" if task.quantization else ""
    return f"{model} {gpu} {split.told()} generate{bits} {task.batch}x{task.prompt_len}"


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=name)
def test_predictions(pair):
    """UPDATE_GOLDEN=1 writes the collectives that are found."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="the compiler's plugin is not installed: .[gpu-compiler]")
    model, gpu, split, task = pair
    found = check(Plan(model, made(pair), cluster(f"{split.size}x{gpu}"), split, task))
    print(f"\n{found}")
    sent = {f"{line.program}: {line.what}": [line.times[1], line.compiled] for line in found.lines if line.times}
    kept = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(kept | {name(pair): sent}, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    else:
        assert sent == kept[name(pair)]
    for line in found.lines:
        told = f"{line.program}, {line.what}: {line.predicted} {line.unit}, compiled {line.compiled}"
        if line.what == "arguments":
            assert abs(line.difference) < 0.05, told
        elif line.what == "temporary" and line.program == "decode":  # a few MiB, which XLA's ways to sum decide
            arguments = programs(preset(model), split, task)[1].arguments / 2**30  # of all layers
            assert abs(line.predicted - line.compiled) < 0.002 * arguments, told
        elif line.what == "temporary" and line.program == "prefill" and split.tp > 1:
            assert abs(line.predicted - line.compiled) < 20 / 2**10, told  # of few tokens, too: parts of sums are 16 MiB
        elif line.what == "temporary":
            assert abs(line.difference) < 0.15, told
        elif line.what == "products":
            assert abs(line.difference) < 0.02, told
        else:
            if line.compiled > 0.1 or line.program == "decode":  # MB
                assert line.predicted == pytest.approx(line.compiled, rel=1e-6), told
            if split.zero != 3 or "reduce-scatter" not in line.what:  # XLA joins a layer's gradients as their sizes allow
                assert line.times[0] == line.times[1], f"{told}, {line.times} times"


def test_a_plan_is_checked_on_virtual_cpus_too():
    config = dataclasses.replace(preset("llama-3.2-1b"), num_layers=2, windows=())
    plan = Plan("small", config, cluster("8xH100"), Split(dp=2, tp=4), Generation(8, 64, 32))
    found = check(plan, virtual=True)
    text = str(found)
    assert "compiled for 8 virtual CPU devices" in text
    assert found.line("decode", "arguments").compiled > 0
    assert sum(line.times[1] for line in found.lines if line.what.startswith("all-reduce over tp")) > 2 * config.num_layers
