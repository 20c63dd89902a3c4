"""`plan`: the best first, the reasons behind it, and nothing that the library would do otherwise."""

import dataclasses
import itertools
import json
import random

import jax
import numpy as np
import pytest
import tiny

import jaxtp
from jaxtp import LLM, Llama, SamplingParams, make_mesh
from jaxtp.generate.auto import machine_of
from jaxtp.planner import Generation, Plan, Split, Training, cluster, cost, hardware, plan
from jaxtp.planner.picture import frontier, points
from jaxtp.planner.report import why
from jaxtp.planner.search import splits
from jaxtp.planner.work import problem
from jaxtp.train import Run, train
from jaxtp.train.config import parse

CONFIG = tiny.config(num_layers=6, num_kv_heads=2)


# -- the choice ----------------------------------------------------------------------------------------------------------


def test_the_best_comes_first():
    for objective, key in (
        ("latency", lambda p: p.seconds),
        ("throughput", lambda p: -p.tokens_per_second),
        ("memory", lambda p: p.memory.total),
    ):
        plans = plan("llama-3.1-70b", "8xH100", objective=objective)
        values = [float(f"{key(p):.4g}") for p in plans.legal]
        assert values == sorted(values)
        assert plans.best is plans[0]
        assert [p.fits for p in plans] == sorted((p.fits for p in plans), reverse=True)


def test_one_request_wants_tensor_parallelism_and_many_want_less_of_it():
    assert plan("llama-3.1-70b", "8xH100").best.split == Split(tp=8)
    many = plan("llama-3.1-8b", "8xH100", objective="throughput").best
    assert many.split.tp < 8
    assert many.task.batch > 64
    # no tp over the network: stages cross it
    nodes = plan("llama-3.1-405b", "2x8xH100")
    assert nodes.best.split == Split(pp=2, tp=8)
    assert "stages, not tp, cross nodes" in why(nodes.best, nodes.best)


def test_pcie_makes_communication_the_reason():
    fast, slow = (plan("llama-3-70b", "8xH100", batch=32, interconnect=link) for link in ("nvlink", "pcie"))
    mine = {str(p.split): p for p in slow.legal}
    assert mine[str(Split(tp=8))].communication > 2 * fast.best.communication
    assert "tp goes over PCIe" in why(mine[str(Split(tp=8))], slow.best)


def test_copies_of_kv_heads_are_told():
    plans = plan(dataclasses.replace(jaxtp.preset("qwen2.5-7b")), "8xH100", batch=4)
    notes = {p.split.tp: why(p, plans.best) for p in plans.legal}
    assert "each KV head stands" not in notes.get(4, "")
    eight = next(p for p in plan("tinyllama-1.1b", "8xH100").legal if p.split.tp == 8)
    assert "each KV head stands 2 times" in why(eight, eight)


def test_slots_over_cp_stand_where_tp_would_copy_kv_heads():
    """Of four KV heads on eight GPUs: twice the tokens in the same memory, and so the most of long requests at once."""
    by_layout = {p.split.told(): p for p in plan("qwen3-235b-a22b", "8xH200", prompt_len=30000, output_len=1000).legal}
    copied, shared = by_layout["tp=8"], by_layout["cp=2 × tp=4"]
    assert shared.kv_tokens > 1.97 * copied.kv_tokens
    assert shared.most_rows > 1.9 * copied.most_rows
    assert "each KV head stands" not in why(shared, shared)
    many = plan("qwen3-235b-a22b", "8xH200", prompt_len=30000, output_len=1000, objective="throughput")
    order = [p.split.told() for p in many.legal]
    assert order.index("cp=2 × tp=4") < order.index("tp=8")


def test_slots_over_cp_stay_within_a_node():
    """With ep between cp and tp in the order of devices, the three of them."""
    found = plan("qwen3-30b-a3b", "2x8xH200")
    legal = [p.split for p in found.legal if p.split.cp > 1]
    assert legal
    assert all(8 % (split.cp * split.ep * split.tp) == 0 for split in legal)
    refused = next(p for p in found.refused if p.split.told() == "cp=2 × ep=2 × tp=4")
    assert "cp=2 × tp=4 would join devices of several nodes" in refused.refused


def test_long_rows_are_trained_over_cp():
    found = plan("llama-3.1-8b", "8xH200", task="train", seq_len=131072, batch=8)
    assert found.best.split.cp > 1
    assert {p.split.cp for p in found} == {1, 2, 4, 8}
    assert {p.split.cp for p in plan("llama-3.1-8b", "8xH200", task="train", seq_len=4096, batch=8)} == {1}


def test_training_fits_or_says_by_how_much_it_does_not():
    plans = plan("llama-3.1-8b", "8xH100", task="train", batch=32)
    assert plans.best.split.dp * plans.best.split.tp * plans.best.split.pp == 8
    assert 0.3 < plans.best.mfu < 0.8
    assert all(p.memory.total <= p.limit for p in plans.legal)
    over = [p for p in plans.refused if p.refused.startswith("needs")]
    assert over
    assert all(p.memory.total > p.limit for p in over)


def test_times_are_sums_of_their_parts():
    for p in (plan("llama-3.1-8b", "4xH200", batch=8).best, plan("llama-3.1-8b", "4xH200", task="train", batch=16).best):
        assert p.step.total == pytest.approx(sum(dataclasses.astuple(p.step)))
        assert all(part >= 0 for part in dataclasses.astuple(p.step))


def test_decode_is_no_faster_than_reading_the_weights():
    for model, gpu, tp in itertools.product(("llama-3.1-8b", "llama-3.1-70b"), ("H100", "H200", "B200"), (4, 8)):
        p = Plan(model, jaxtp.preset(model), cluster(f"{tp}x{gpu}"), Split(tp=tp), Generation())
        floor = (p.config.num_params - p.config.vocab_size * p.config.hidden_size) * 2 / tp / (p.cluster.gpu.bandwidth * 1e9)
        assert p.step.total > floor


def test_an_even_pipeline_wastes_only_its_bubble():
    p = plan("llama-3.1-70b", "4x8xH100", task="train", batch=64, seq_len=4096)
    for found in (f for f in p.legal if f.split.pp > 1):
        rest = found.step.total - found.step.bubble - found.step.optimizer
        assert found.step.bubble <= found.split.pipeline().bubble * rest


# -- what is printed as legal builds and runs, what is refused the library refuses for the same reason --------------------


ALL = [*splits(8, CONFIG, task=Generation()), *splits(6, CONFIG, task=Generation())]
# these also generate: each axis, each pair and all three; the tokens of any mesh are compared in tests/generate
GENERATES = ("tp=8", "pp=6", "dp=8", "dp=2 × tp=4", "pp=4 × tp=2", "dp=2 × pp=3", "dp=2 × pp=2 × tp=2", "cp=2 × tp=4")


@pytest.mark.parametrize("split", ALL, ids=Split.told)
def test_generation_agrees_with_llm(split, tmp_path_factory):
    task = Generation(batch=3, prompt_len=8, output_len=4, dtype="float32")
    sizes = {"tensor_parallel_size": split.tp, "pipeline_parallel_size": split.pp, "data_parallel_size": split.dp}
    sizes |= {"context_parallel_size": split.cp}
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf()))

    def run():
        return LLM(folder, load_format="dummy", dtype="float32", progress=False, **sizes)

    refused = problem(CONFIG, split, task)
    if refused is None:
        llm = run()
        out = llm.generate([[5, 6, 7]] * 3, SamplingParams(max_tokens=3, temperature=0)) if split.told() in GENERATES else []
        assert all(len(o.outputs[0].token_ids) == 3 for o in out)
    else:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            run()
        assert str(error.value) == refused


def test_experts_go_through_stages_over_ep_and_cp():
    mixtral, task = jaxtp.preset("mixtral-8x7b"), Training(batch=16, seq_len=8192)
    assert problem(mixtral, Split(pp=2, ep=2, tp=2, zero=1, microbatches=4), task) is None
    assert problem(mixtral, Split(pp=2, cp=2, ep=2, zero=1, microbatches=4), task) is None


TASK = Training(batch=8, seq_len=16, dtype="float32")
SAMPLE = random.Random(0).sample([s for n in (8, 6) for s in splits(n, CONFIG, task=TASK)], 80)
REFUSED = [s for s in SAMPLE if problem(CONFIG, s, TASK)]
LEGAL = [s for s in SAMPLE if not problem(CONFIG, s, TASK)]


def a_run(split, folder):
    """What a YAML file with this split would say."""
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(3, 98, 4000).astype(np.int32))
    sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "vocab_size")
    names = ("dp", "pp", "tp", "zero", "sequence_parallel", "remat", "schedule", "chunks")
    return parse(
        {
            "folder": str(folder / "run"),
            "steps": 2,
            "model": {"dtype": "float32", "shape": {name: getattr(CONFIG, name) for name in sizes}},
            "data": {"train": [str(folder / "ids.npy")], "sequence_length": TASK.seq_len, "batch_size": TASK.batch},
            "parallel": {name: getattr(split, name) for name in names} | {"accumulate": split.microbatches},
            "log": {"every": 1, "tensorboard": False},
        }
    )


def test_what_is_refused_of_training_the_run_refuses_too(tmp_path):
    assert len(REFUSED) > 20
    for split in REFUSED:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            Run(a_run(split, tmp_path))
        assert problem(CONFIG, split, TASK) in str(error.value)


@pytest.mark.parametrize("split", LEGAL[:2] + [pytest.param(s, marks=pytest.mark.slow) for s in LEGAL[2:4]], ids=str)
def test_training_as_planned_runs(split, tmp_path):
    result = train(a_run(split, tmp_path))
    assert result.losses[0][1] == pytest.approx(np.log(CONFIG.vocab_size), rel=0.1)


# -- LLM(plan=...) ---------------------------------------------------------------------------------------------------------


def test_llm_takes_the_best_plan_for_the_devices_at_hand(tmp_path):
    folder = tiny.checkpoint(tmp_path / "model")
    mesh = LLM(folder, plan="auto", progress=False).model.layout.mesh
    assert mesh.size == len(jax.devices())
    alone = LLM(folder, progress=False).generate("ab", SamplingParams(max_tokens=4, temperature=0))
    chosen = plan(folder, "4xH100", prompt_len=8, output_len=4)[1]
    found = LLM(folder, plan=chosen, progress=False)
    assert {a: n for a, n in found.model.layout.mesh.shape.items() if n > 1} == {
        a: n for a, n in chosen.split.axes.items() if n > 1
    }
    same = found.generate("ab", SamplingParams(max_tokens=4, temperature=0))
    assert same[0].outputs[0].token_ids == alone[0].outputs[0].token_ids


def test_a_model_is_seen_on_a_gpu_that_has_no_row_of_its_own(monkeypatch):
    bridged = hardware.of_device("NVIDIA A100 80GB PCIe")
    monkeypatch.setattr(hardware, "of_device", lambda kind: bridged)
    found = machine_of(Llama(tiny.config(), mesh=make_mesh(tp=2)))
    assert (found.cluster.gpu, found.cluster.size, found.split.tp) == (bridged, 2, 2)


def test_a_plan_and_sizes_contradict_each_other(tmp_path):
    folder = tiny.checkpoint(tmp_path / "model")
    with pytest.raises(ValueError, match="plan says how the model is split; it goes with no parallel sizes"):
        LLM(folder, plan="auto", tensor_parallel_size=2, progress=False)
    with pytest.raises(ValueError, match="plan='best' must be \"auto\" or a Plan"):
        LLM(folder, plan="best", progress=False)
    trained = plan(folder, "4xH100", task="train", batch=8, seq_len=64).best
    with pytest.raises(ValueError, match="this plan is of training"):
        LLM(folder, plan=trained, progress=False)
    with pytest.raises(ValueError, match=r"this plan is of llama-3.1-8b, which has another shape"):
        LLM(folder, plan=plan("llama-3.1-8b", "2xH100").best, progress=False)
    refused = plan("llama-3.1-70b", "8xH100").refused[0]
    with pytest.raises(ValueError, match="this plan cannot be: needs"):
        LLM(folder, plan=refused, progress=False)


def test_weights_of_8_bits_need_fewer_gpus_and_less_time(tmp_path):
    with pytest.raises(ValueError, match="2 of them would do"):
        plan("llama-3.1-70b", "1xH200")
    alone = plan("llama-3.1-70b", "1xH200", quantization="int8").best
    kernels = 80 * (8192 * (8192 + 2 * 1024) + 8192 * 8192 + 3 * 8192 * 28672)
    channels, others = 80 * (8192 + 2 * 1024 + 8192 + 2 * 28672 + 8192), 2 * 128256 * 8192 + 161 * 8192
    assert alone.memory.weights == kernels + 4 * channels + 2 * others
    whole, rounded = (plan("llama-3.1-70b", "8xH200", quantization=q).best for q in (None, "int8"))
    assert rounded.step.weights == pytest.approx(whole.step.weights / 2, rel=0.05)
    folder = tiny.checkpoint(tmp_path / "model")
    chosen = plan(folder, "4xH100", prompt_len=8, output_len=4, quantization="int8").best
    llm = LLM(folder, plan=chosen, quantization="int8", dtype="bfloat16", progress=False)
    assert llm.budget.weight_bytes == chosen.memory.weights
    with pytest.raises(ValueError, match="this plan is with quantization='int8'; asked for: None"):
        LLM(folder, plan=chosen, progress=False)


# -- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "gpus", "options", "said"),
    [
        (
            "llama-3.1-7b",
            "8xH100",
            {},
            "no model is named 'llama-3.1-7b', and no folder is there; near: llama-3.1-70b, llama-3.1-8b",
        ),
        ("llama-3.1-8b", "8xH10", {}, "no GPU is named 'H10'; near: .*H100"),
        ("llama-3.1-405b", "8xH100", {}, "cannot be run so on 8xH100: .* needs .* GiB .*; 16 of them would do"),
        ("llama-3.1-70b", "8xH100", {"task": "train"}, "cannot be run so on 8xH100: .*; 24 of them would do"),
        ("llama-3.1-8b", "8xH100", {"objective": "speed"}, "objective='speed' must be one of latency, throughput, memory"),
        ("llama-3.1-8b", "8xH100", {"task": "tune"}, 'task=\'tune\' must be "generate" or "train"'),
        ("llama-3.1-8b", "8xH100", {"task": "train", "dtype": "float16"}, "dtype='float16' must be one of float32, bfloat16$"),
        ("llama-3.1-8b", "8xH100", {"batch": 2.5}, "batch=2.5 must be an integer"),
        ("llama-3.1-8b", 8, {}, "'?8'? names no GPUs"),
        ("", "8xH100", {}, "no model is named ''"),
        ("llama-3.1-8b", "8xH100", {"prompt_len": 0}, "prompt_len=0 must be an integer of at least 1"),
        ("llama-2-7b", "8xH100", {"prompt_len": 9000}, "exceeds the model's max_position_embeddings=4096"),
        ("llama-3.1-8b", "8xH100", {"max_model_len": 100, "prompt_len": 90}, "max_model_len=100 is less than prompt_len"),
        ("llama-3.1-8b", "8xH100", {"utilization": 1.5}, r"utilization=1.5 must be in \(0, 1\]"),
        ("llama-3.1-8b", "8xH100", {"dtype": "int4"}, "dtype='int4' must be one of float32"),
        ("llama-3.1-8b", "8xH100", {"quantization": "awq"}, "quantization='awq': config.json has no quantization_config"),
        (
            "llama-3.1-8b",
            "8xH100",
            {"quantization": "int3"},
            "quantization='int3' is not supported; supported: int8, fp8, int4",
        ),
        ("llama-3.1-8b", "8xH100", {"quantization": "int8", "task": "train"}, "training keeps its dtype"),
    ],
)
def test_bad_input(model, gpus, options, said):
    with pytest.raises(ValueError, match=said):
        plan(model, gpus, **options)


def test_tp_that_nodes_would_cut_is_refused():
    plans = plan("llama-3.1-8b", "2x6xH100")
    (refused,) = [p.refused for p in plans.refused if p.split.told() == "dp=3 × tp=4"]
    assert refused.startswith("tp=4 would join devices of several nodes, each of which has 6")
    assert "legal tp within a node: 1, 2, 3, 6" in refused


def test_rows_longer_than_the_models_positions_are_refused():
    with pytest.raises(ValueError, match="seq_len=8192 exceeds the model's max_position_embeddings=4096"):
        plan("llama-2-7b", "8xH100", task="train", seq_len=8192)
    with pytest.raises(ValueError, match="batch=0 must be an integer of at least 1"):
        plan("llama-2-7b", "8xH100", batch=0)


def test_a_short_last_chunk_of_a_prompt_costs_little():
    times = [plan("llama-3.1-8b", "8xH100", batch=8, prompt_len=n).best.prefill.total for n in (1024, 1025)]
    assert 1.0 < times[1] / times[0] < 1.15


def test_throughput_takes_the_most_rows_that_fit():
    tight = plan("llama-3.1-8b", "1xH100", objective="throughput", prompt_len=8192, output_len=8192, utilization=0.215)
    assert tight.best.task.batch == 1
    assert plan("llama-3.1-8b", "8xH100", objective="throughput").best.task.batch == 256


@pytest.mark.parametrize("gpus", ["1xH100", "8xH100", "6xL40S"])
def test_the_rows_that_are_said_to_fit_do_and_no_more(gpus):
    for found in plan("llama-3.1-8b", gpus).legal:
        rows = [dataclasses.replace(found, task=Generation(batch=n)) for n in (found.most_rows, found.most_rows + 1)]
        assert [r.holds for r in rows] == [True, False]
    with pytest.raises(ValueError, match=r"for all rows at once; \d+ fit, and LLM takes the others after them; \d+ of them"):
        plan("llama-3.1-8b", gpus, batch=10000)


def test_lengths_follow_the_model_unless_they_are_said():
    assert plan("demo", "2xL40S").best.task == Generation(prompt_len=768, output_len=256)
    asked = plan("demo", "2xL40S", max_model_len=100, output_len=20).best.task
    assert (asked.prompt_len, asked.output_len) == (80, 20)
    assert plan("demo", "2xL40S", max_model_len=100).best.task.total == 100
    with pytest.raises(ValueError, match=r"prompt_len \+ output_len=1280 exceeds"):
        plan("demo", "2xL40S", prompt_len=1024)


def test_what_needs_more_memory_loses_by_it():
    plans = plan("llama-3.1-8b", "2x8xA100-80", task="train", batch=64, objective="memory")
    others = [p for p in plans.legal[1:200] if p.memory.total > 1.01 * plans.best.memory.total]
    assert others
    assert all(" GiB more, " in why(p, plans.best, "memory").split(";")[0] for p in others)


def test_tp_that_crosses_nodes_is_not_said_to_stay_within_them():
    plans = plan("llama-3.1-405b", "4x8xH100", tp_across_nodes=True, batch=8)
    (wide,) = [why(p, plans.best) for p in plans.legal if p.split.told() == "pp=2 × tp=16"]
    assert "tp goes over InfiniBand" in wide
    assert "stages, not tp" not in wide


def test_the_fastest_is_told_where_memory_is_the_objective():
    plans = plan("llama-3.1-8b", "8xH100", objective="memory", batch=64)
    told = [why(p, plans.best, "memory") for p in plans.legal]
    assert any(" GiB more, 0." in line for line in told)


def test_the_number_of_gpus_that_would_do_does():
    with pytest.raises(ValueError, match="16 of them would do"):
        plan("llama-3.1-405b", "8xH100")
    assert plan("llama-3.1-405b", "2x8xH100").best.fits
    with pytest.raises(ValueError, match=r"3 of them would do \(3xH100\)"):  # 3 are enough: the layers in three stages
        plan("llama-3.1-70b", "2xH100", prompt_len=4096, batch=16)
    assert plan("llama-3.1-70b", "3xH100", prompt_len=4096, batch=16).best.fits


# -- what is shown -----------------------------------------------------------------------------------------------------------


def test_the_table_names_the_best_the_others_and_why_they_lose():
    text = str(plan("llama-3.1-70b", "8xH100", batch=8))
    for said in ("tp=8", "the best", "reading and", "layouts can be"):
        assert said in text
    assert "x the time" in " ".join(text.split())


def test_json_holds_everything():
    records = json.loads(json.dumps(plan("llama-3.1-70b", "8xH100", batch=8).records()))
    best = records[0]
    assert best["split"]["tp"] == 8
    assert best["refused"] is None
    assert {"weights", "kv", "total"} <= set(best["memory"])
    assert best["step"]["total"] == pytest.approx(plan("llama-3.1-70b", "8xH100", batch=8).best.step.total)
    assert any(record["refused"] for record in records)


def test_the_frontier_is_of_those_that_no_other_beats():
    found = points(plan("llama-3.1-8b", "8xH100").distinct())
    edge = frontier(found)
    assert 3 < len(edge) < len(found)
    for point in edge:
        assert not any(p.latency < point.latency and p.throughput > point.throughput for p in found)


def test_pictures():
    pytest.importorskip("matplotlib")
    for task in ("generate", "train"):
        figure = plan("llama-3.1-8b", "8xH100", task=task, **({"batch": 32} if task == "train" else {})).draw()
        assert figure.axes[0].get_title().startswith("llama-3.1-8b on 8xH100")


def test_operations_of_training_are_those_of_the_products():
    weights, _ = cost.train_flops(jaxtp.preset("llama-3.1-8b"), 0)
    assert weights == 6 * (8030261248 - 128256 * 4096)
