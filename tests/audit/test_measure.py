"""doctor, bench and profile on virtual CPU devices: what they find, write, draw and refuse."""

import dataclasses
import itertools
import json

import jax
import pytest
import tiny

from jaxtp import LLM, make_mesh, plan
from jaxtp.audit import audit, bench, rates, topology
from jaxtp.audit.doctor import examine, odd, odd_versions
from jaxtp.audit.profile import PARTS, Event, Profile, _busy, _union, parts_of, profile, profile_training, read
from jaxtp.audit.rates import KINDS, Timed, collective_rates
from jaxtp.audit.topology import joined, odd_links
from jaxtp.planner import Generation, Machine, Split, Training, cluster, cost
from jaxtp.planner.cluster import measured
from jaxtp.train import Run
from jaxtp.train.config import parse

KIB = 1024


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tiny.checkpoint(tmp_path_factory.mktemp("model"), num_layers=3)
    return LLM(folder, tensor_parallel_size=2, data_parallel_size=2, progress=False)


# -- doctor --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diagnosis():
    """With the best of two calls; ten are for those who want the figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "REPEATS", 2)
        return examine(make_mesh(dp=2, tp=4), largest=64 * KIB)


def test_every_collective_is_timed_over_every_axis(diagnosis):
    found = {(t.kind, t.axis, t.devices, t.bytes) for t in diagnosis.collectives}
    assert found == {(k, a, n, s) for k in KINDS for a, n in (("dp", 2), ("tp", 4)) for s in (16 * KIB, 64 * KIB)}
    assert all(t.seconds > 0 for t in diagnosis.collectives)
    assert set(diagnosis.copies) == set(diagnosis.products) == set(range(8))
    assert set(diagnosis.hops) == {(i, (i + 1) % 8) for i in range(8)}


def test_bus_bandwidth_is_that_of_nccl_tests():
    assert Timed("all-reduce", "tp", 8, 10**9, 0.01).bus == pytest.approx(2 * 7 / 8 * 1e11)
    assert Timed("all-gather", "tp", 8, 10**9, 0.01).bus == pytest.approx(7 / 8 * 1e11)
    assert Timed("collective-permute", "tp", 8, 10**9, 0.01).bus == pytest.approx(1e11)


def test_what_is_timed_is_that_collective():
    """The programs hold one collective each, of the bytes that are said."""
    seen = []

    def compiled(function, x):
        seen.append(audit(function.lower(x).compile(), mesh))
        return 1.0

    mesh = make_mesh(tp=4)
    before, rates.fastest = rates.fastest, compiled
    try:
        timed = list(collective_rates(mesh, (64 * KIB,)))
    finally:
        rates.fastest = before
    assert jax.device_count() == 8
    for t, report in zip(timed, seen[::2], strict=True):  # of each a call with one, and one with many
        (found,) = report.collectives
        assert found.kind in (t.kind, "all-reduce" if t.kind == "reduce-scatter" else t.kind)  # as XLA:CPU may print it
        assert found.axes == ("tp",)
        assert found.bytes in (t.bytes, t.bytes // 4 if found.kind != t.kind else t.bytes)


def test_what_is_odd_is_named():
    assert odd("device", "copies at", "GB/s", {0: 4e12, 1: 4.1e12, 2: 1e12}) == [
        "device 2 copies at 1000.00 GB/s, 25% of what is usual here"
    ]
    assert odd("device", "copies at", "GB/s", {0: 4e12}) == []
    assert odd_versions({"jaxlib": "0.10.2", "jax-cuda13-plugin": "0.10.1"}) == [
        "jax-cuda13-plugin 0.10.1 goes with jaxlib 0.10.1, not 0.10.2: install the same"
    ]
    found = odd_versions({"jaxlib": "1", "jax-cuda13-plugin": "1", "jax-cuda12-plugin": "1", "driver": "550.54"})
    assert len(found) == 2
    assert "uninstall one" in found[0]
    assert "driver 550.54 is too old for CUDA 13" in found[1]
    assert odd_versions({"jaxlib": "0.10.2"}) == []
    assert "JAX has no plugin" in odd_versions({"jaxlib": "1", "driver": "580.65"})[0]
    found = {"jaxlib": "1", "jax-cuda12-plugin": "1", "driver": "515.1", "nvidia-nccl-cu12": "2"}
    paths = "/opt/lib:/usr/local/cuda/lib64"
    driver, path = odd_versions(found | {"LD_LIBRARY_PATH": paths})
    assert "too old for CUDA 12" in driver
    assert "names /usr/local/cuda/lib64:" in path


def matrix(links, nodes):
    """As `nvidia-smi topo -m` prints it; links: of each pair."""
    head = ["", *(f"GPU{i}" for i in range(len(nodes))), "NIC0", "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"]
    rows = [
        [f"GPU{i}", *(" X " if i == j else links[min(i, j), max(i, j)] for j in range(len(nodes))), "PIX", "0-31", node, "N/A"]
        for i, node in enumerate(nodes)
    ]
    nic = ["NIC0", *("PIX" for _ in nodes), " X ", "", "", ""]
    return "\n".join("\t".join(row) for row in [head, *rows, nic]) + "\n\nLegend:\n\n  X    = Self\n  SYS  = ..."


def test_topologies_are_read():
    pairs = list(itertools.combinations(range(4), 2))
    whole = matrix(dict.fromkeys(pairs, "NV18"), ["0", "0", "1", "1"])
    assert joined(whole) == (dict.fromkeys(pairs, "NV"), {0: "0", 1: "0", 2: "1", 3: "1"})
    assert odd_links(whole) == []
    broken = matrix(dict.fromkeys(pairs, "NV18") | {(1, 3): "SYS"}, ["0", "0", "1", "1"])
    assert odd_links(broken) == [
        "GPUs 1 and 3 are joined by the processors' own link, between NUMA nodes, most pairs by NVLink"
    ]
    pcie = {pair: "PIX" if pair in ((0, 1), (2, 3)) else "SYS" for pair in pairs}
    assert odd_links(matrix(pcie, ["0", "0", "1", "1"])) == [
        "no NVLink joins the GPUs of NUMA nodes 0 and 1: tp is best kept within the GPUs of one of them"
    ]
    assert odd_links("unknown: there is no nvidia-smi here") == []


def test_the_header_is_underlined(monkeypatch, tmp_path):
    """nvidia-smi sends codes of the terminal with it."""
    text = matrix({(0, 1): "NV4"}, ["0", "1"]).replace("\tGPU0", "\t\x1b[4mGPU0", 1).replace("NUMA ID", "NUMA ID\x1b[0m", 1)
    (tmp_path / "printed").write_text(text)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat {tmp_path}/printed\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert joined(topology.topology()) == ({(0, 1): "NV"}, {0: "0", 1: "1"})


def test_what_is_missing_is_said(diagnosis, monkeypatch):
    monkeypatch.setattr(topology.shutil, "which", lambda name: None)
    assert topology.topology() == "unknown: there is no nvidia-smi here, or it shows no GPUs"
    assert diagnosis.versions["jax"]
    assert "all-to-all" in str(diagnosis)
    assert "copy" in str(diagnosis)


def test_the_planner_reads_its_profile(diagnosis, tmp_path):
    diagnosis.save(tmp_path / "machine.json")
    found = measured(tmp_path / "machine.json")
    assert found.size == 8
    alone = sorted(diagnosis.copies.values())[4]  # each was measured with the host to itself, which eight share
    assert found.gpu.bandwidth * 0.9e9 == pytest.approx(alone / 8, rel=0.5)
    reduce = next(t for t in diagnosis.collectives if (t.kind, t.axis, t.bytes) == ("all-reduce", "tp", 64 * KIB))
    link = found.levels[0][1]
    assert link.seconds("all-reduce", reduce.bytes, 1.5 * reduce.bytes, 4) == pytest.approx(reduce.seconds, rel=0.01)
    assert plan("llama-3.2-1b", found).best.fits
    kept = json.loads((tmp_path / "machine.json").read_text())
    for wrong in ({}, {**kept, "copies": {}}, {**kept, "devices": 0}, {k: kept[k] for k in kept if k != "memory_bytes"}):
        (tmp_path / "other.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="is no profile of `jaxtp doctor`"):
            measured(tmp_path / "other.json")


def test_its_picture(diagnosis):
    pytest.importorskip("matplotlib")
    axes = diagnosis.draw().axes[0]
    assert len(axes.lines) == 2 * len(KINDS)


# -- bench ---------------------------------------------------------------------------------------------------------------


def test_latency_and_throughput(llm, tmp_path):
    found = bench.measure(llm, kind="latency", prompts=4, input_len=16, output_len=8, iterations=2)
    figures = found.metrics
    assert 0 < figures["communication"] < 1
    assert 0 < figures["communication_prefill"] < 1
    assert figures["tokens_per_second"] == pytest.approx(4 * 8 / figures["seconds"])
    assert figures["ttft"] + 7 * figures["step"] == pytest.approx(figures["seconds"], rel=0.5)
    assert figures["mbu"] > 0
    assert figures["mfu"] > 0
    assert "planned_step" not in figures  # these are no GPUs
    found.save(tmp_path / "a.json")
    many = bench.measure(llm, kind="throughput", prompts=8, input_len=16, output_len=8, iterations=1)
    assert "ttft" not in many.metrics
    text = " ".join(str(dataclasses.replace(many, before=bench.read(tmp_path / "a.json"))).split())
    assert "better by" in text
    assert "before: kind latency, prompts 4" in text
    assert f"model {found.settings['model']}, prompts 8" in text
    assert "(MBU), % " in text


def test_better_is_above_one_whichever_way_a_figure_goes():
    new, old = bench.Bench({"kind": "latency"}, {"step": 1.0, "mbu": 0.5}), bench.Bench({}, {"step": 2.0, "mbu": 0.25})
    text = str(dataclasses.replace(new, before=old))
    assert text.count("2.00x") == 2


def test_bench_refuses(llm, tmp_path):
    with pytest.raises(ValueError, match="at most max_model_len=512"):
        bench.measure(llm, kind="latency", prompts=1, input_len=512, output_len=8)
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no figures of jaxtp bench"):
        bench.read(tmp_path / "x.json")


# -- profile -------------------------------------------------------------------------------------------------------------


def test_where_the_time_goes(llm, tmp_path):
    found = profile(llm, batch=4, input_len=16, steps=4, trace=tmp_path / "trace.json.gz")
    for phase in ("prefill", "decode"):
        assert set(found.seconds[phase]) <= set(PARTS)
        assert {"attention", "mlp", "collectives", "head", "host"} <= set(found.seconds[phase])
    assert len({event.device for event in found.events}) == 4
    assert (tmp_path / "trace.json.gz").stat().st_size > 1000
    assert "collectives" in str(found)
    with pytest.raises(ValueError, match="at most max_model_len=512"):
        profile(llm, batch=1, input_len=512, steps=8)


@pytest.mark.parametrize("parallel", [{"dp": 2, "tp": 2, "zero": 3}, {"dp": 2, "pp": 2, "accumulate": 2}], ids=str)
def test_where_the_time_of_training_goes(parallel, tmp_path, monkeypatch):
    """An update by its parts, backward ones among them, and beside it the plan, were these GPUs."""
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 200)
    tiny.byte_tokenizer(tmp_path, 128)
    data = {"train": [str(tmp_path / "text.txt")], "tokenizer": str(tmp_path), "sequence_length": 64, "batch_size": 8}
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 4}
    settings = {"folder": str(tmp_path / "run"), "model": {"dtype": "float32", "shape": shape}, "data": data}
    run = Run(parse({**settings, "parallel": {"tp": 1, **parallel}}))
    machine = Machine(run.model_config, run.split, cluster("4xH100"), "float32")
    monkeypatch.setattr("jaxtp.audit.profile.machine_of", lambda model, split: machine)
    found = profile_training(run, steps=2, trace=tmp_path / "trace.json.gz")
    assert {"attention", "mlp", "collectives", "head", "optimizer"} <= set(found.seconds["step"]) <= set(PARTS)
    assert len({event.device for event in found.events}) == 4
    assert {event.phase for event in found.events} == {"step"}
    assert 0 < found.communication["step"] < 1
    assert sum(found.planned["step"].values()) == pytest.approx(cost.train(machine, Training(8, 64, dtype="float32")).total)
    assert "one of 2 training steps" in str(found)
    assert (tmp_path / "trace.json.gz").stat().st_size > 1000
    with pytest.raises(ValueError, match="steps=0"):
        profile_training(run, steps=0)


def test_a_picture_of_the_time():
    pytest.importorskip("matplotlib")
    events = tuple(Event(f"CPU {i}", "decode", "mlp", 0.1 * j, 0.05) for i in range(2) for j in range(9))
    found = Profile({"prefill": {"mlp": 0.1}, "decode": {"mlp": 0.1, "host": 0.1}}, {}, events, 3, None)
    assert len(found.draw().axes) == 3


def test_instructions_belong_to_the_innermost_scope():
    text = """HloModule jit_decode
%sum (x: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0)
  ROOT %y = f32[4] all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4] parameter(0)
  %a = f32[4] fusion(%p), kind=kLoop, calls=%f, metadata={op_name="jit(decode)/while/body/attention/mul"}
  %r = f32[4] all-reduce(%a), replica_groups={}, metadata={op_name="jit(decode)/while/body/mlp/dot"}
  %s = f32[4] fusion(%r), kind=kLoop, calls=%g, metadata={op_name="jit(decode)/head/sampling/max"}
  %b = f32[4] fusion(%s), kind=kLoop, calls=%g, metadata={op_name="jit(step)/while/body/transpose(jvp(mlp))/dot"}
  %k = (f32[4], f32[4]) fusion-start(%b), kind=kCustom, calls=%sum, metadata={op_name="jit(decode)/while/body/mlp/dot"}
  %c = f32[4] all-to-all(%a), metadata={op_name="jit(decode)/while/body/attention/context/all_to_all"}
  %w = f32[4] while(%s), condition=%c, body=%b
  ROOT %o = f32[4] copy(%w)
}
"""
    found = parts_of(text)
    assert {k: found[k] for k in "arsobkc"} == {
        "a": "attention", "r": "collectives", "s": "sampling", "o": "other", "b": "mlp", "k": "collectives",
        "c": "context",
    }  # fmt: skip
    assert "w" not in found


def test_a_trace_of_gpus_is_read():
    records = [
        {"name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
        {"ph": "X", "pid": 1, "ts": 100.0, "dur": 5.0, "name": "k", "args": {"hlo_op": "a", "hlo_module": "jit_decode"}},
        {"ph": "X", "pid": 1, "ts": 110.0, "dur": 5.0, "name": "k", "args": {"hlo_op": "b", "hlo_module": "jit_prefill(123)"}},
        {"ph": "X", "pid": 1, "ts": 120.0, "dur": 5.0, "name": "k", "args": {"hlo_op": "z", "hlo_module": "jit_other"}},
        {"ph": "X", "pid": 2, "ts": 130.0, "dur": 5.0, "name": "python"},
    ]
    found = read(records, {"decode": {"a": "mlp"}, "prefill": {"b": "attention"}, "prefill.1": {"c": "head"}})
    assert [(e.device, e.phase, e.part) for e in found] == [("GPU:0", "decode", "mlp"), ("GPU:0", "prefill", "attention")]
    assert found[1].start == pytest.approx(10e-6)


def test_time_that_overlaps_counts_once():
    events = [Event("d", "decode", "mlp", start, 2.0) for start in (0.0, 1.0, 6.0)]
    assert _union(events) == 5.0
    assert _busy(events, 10.0).mean() == pytest.approx(0.5)


@pytest.mark.parametrize("split", [Split(tp=2), Split(cp=2, tp=2, over_cp="slots")], ids=Split.told)
def test_the_planners_parts_add_up(split):
    machine = Machine(tiny.config(), split, cluster("4xH100"), "bfloat16")
    task = Generation(4, 64, 16)
    found = cost.by_part(machine, task)
    assert ("context" in found["decode"]) == (split.cp > 1)
    assert sum(found["decode"].values()) == pytest.approx(cost.decode(machine, task).total)
    assert sum(found["prefill"].values()) == pytest.approx(cost.prefill(machine, task).total)
    assert all(value >= 0 for parts in found.values() for value in parts.values())


def test_the_planners_parts_of_training_over_cp_add_up():
    machine = Machine(tiny.config(), Split(cp=4, zero=1), cluster("4xH100"), "bfloat16")
    task = Training(4, 256)
    found = cost.by_part(machine, task)["step"]
    assert sum(found.values()) == pytest.approx(cost.train(machine, task).total)
    assert min(found.values()) >= 0
    assert found["context"] > 0


# -- the command ---------------------------------------------------------------------------------------------------------


def test_the_plan_verb(capsys, monkeypatch):
    from jaxtp.cli import main

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["jaxtp", *arguments])
        main()
        return capsys.readouterr().out

    assert "tp=8" in run("plan", "llama-3.1-70b", "--gpus", "8xH100")
    assert json.loads(run("plan", "llama-3.1-70b", "--gpus", "8xH100", "--json"))[0]["split"]["tp"] == 8
    everything = run("plan", "llama-3.1-8b", "--gpus", "2xH100", "--task", "train", "--batch", "4", "--all")
    assert "SP" in everything
    assert "pp=2" in everything
    for arguments, said in (
        (("plan", "llama-3.1-8b"), "give either --gpus, such as 8xH100, or --measured FILE"),
        (("plan", "llama-3.1-8b", "--gpus", "8xH100", "--virtual"), "--virtual says what to --compile for"),
        (("plan", "llama-3.1-8b", "--gpus", "8xH100", "--task", "train", "--prompt-len", "9"), "--task train has --seq-len"),
        (("plan", "llama-3.1-8b", "--gpus", "8xH100", "--seq-len", "9"), "generation has --prompt-len"),
        (("plan", "llama-3.1-8b", "--measured", "x.json", "--network", "infiniband"), "--measured has its own links"),
        (("profile", "run.yaml", "--batch-size", "4"), "only its own settings"),
        (("profile", "demo", "--parallel.tp", "2"), "--parallel.tp is a setting of a training run; demo is no YAML file"),
        (("plan", "llama-3.1-8b", "--gpus", "8xH100", "--json", "--compile"), "--json and --compile exclude one another"),
        (("plan", "llama-9", "--gpus", "8xH100"), "no model is named 'llama-9'"),
        (("doctor", "--largest", "0"), "--largest 0 must be at least 1 MiB"),
    ):
        monkeypatch.setattr("sys.argv", ["jaxtp", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


def test_the_plan_verb_draws(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from jaxtp.cli import main

    monkeypatch.setattr("sys.argv", ["jaxtp", "plan", "llama-3.1-8b", "--gpus", "2xH100", "--plot", str(tmp_path / "p.png")])
    main()
    assert (tmp_path / "p.png").stat().st_size > 10_000
