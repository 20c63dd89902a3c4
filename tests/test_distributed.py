"""Several processes, as on several nodes: they find one another, compute the same, read their own parts, and end together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import yaml
from nodes import ended, free_port, kill, start

from jaxtp import LLM, SamplingParams
from jaxtp import train as in_one
from jaxtp.distributed import LOST, Nodes, nodes, processes

SLURM = {
    "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "gpu[003-005,9],login1",
}  # fmt: skip
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "10.9.0.1"}
KUBERNETES = {"NNODES": "2", "JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "train-node-0-0.train", "MASTER_PORT": "29600"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (SLURM, Nodes(4, 3, "gpu003", 20000 + 2 * 3456)),
        ({**SLURM, "MASTER_ADDR": "a", "MASTER_PORT": "7"}, Nodes(4, 3, "a", 7)),
        ({**SLURM, "SLURM_STEP_NODELIST": "login1"}, Nodes(4, 3, "login1", 20000 + 2 * 3456)),
        (MPI, Nodes(2, 1, "10.9.0.1", 29500)),
        (KUBERNETES, Nodes(2, 1, "train-node-0-0.train", 29600)),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "b"}, Nodes(2, 0, "b", 29500)),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({}, None),
    ],
)
def test_launchers_are_understood(env, expected):
    assert nodes(env=env) == expected


def test_flags_come_before_the_environment():
    assert nodes(nnodes=2, node_rank=1, master_addr="c", master_port=5, env=SLURM) == Nodes(2, 1, "c", 5)


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        ({"nnodes": 2, "node_rank": 2, "master_addr": "c"}, {}, "2 processes, of which this is number 2; it must be 0 to 1"),
        ({"nnodes": 2, "master_addr": "c"}, {}, "number None; it must be 0 to 1"),
        ({"node_rank": 1}, {}, "--node-rank and --master-addr need --nnodes"),
        ({"nnodes": 2, "node_rank": 0, "master_addr": "c", "master_port": 65535}, {}, "port 65535 .* must be 1 to 65534"),
        ({"nnodes": 2, "node_rank": 0}, {}, "nothing tells where the first is: --master-addr or MASTER_ADDR"),
        ({}, {k: v for k, v in MPI.items() if "ADDR" not in k}, "by Open MPI .* MASTER_ADDR"),
    ],
)
def test_what_does_not_fit_is_said(arguments, env, message):
    with pytest.raises(ValueError, match=message):
        nodes(**arguments, env=env)


@pytest.mark.parametrize("which", [0, 1])
def test_a_port_that_somebody_has_is_said(which):
    port = free_port()
    node = {"nnodes": 2, "node_rank": 0, "master_addr": "127.0.0.1", "master_port": port}
    said = pytest.raises(OSError, match=f"ports {port} and {port + 1}.*--master-port")
    with socket.create_server(("", port + which)), said, processes(**node, timeout=5.0):
        pass


# -- processes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


PROMPTS = ["one", "and then two", "x"]


@pytest.fixture(scope="module")
def expected(checkpoint):
    """What one process gives."""
    requests = LLM(checkpoint, progress=False).generate(PROMPTS, SamplingParams(temperature=0.8, max_tokens=12))
    return [request.outputs[0].token_ids for request in requests]


# the command, which also tells what it read of the weights
GENERATES = """
from jaxtp.checkpoint import hf
from jaxtp.cli import main

read = 0

def counted(self, name, index, plain=hf.Tensors.read):
    global read
    array = plain(self, name, index)
    read += array.nbytes
    return array

hf.Tensors.read = counted
try:
    main()
finally:
    print(f"\\nread {read}\\n")
"""
LAYOUTS = {2: ["-tp 4 --tp-across-nodes", "-tp 2 -pp 2", "-tp 2 -cp 2 --tp-across-nodes"], 4: ["-pp 2 -dp 2"]}


@pytest.mark.slow
@pytest.mark.parametrize(("count", "layout"), [(count, layout) for count in LAYOUTS for layout in LAYOUTS[count]])
def test_each_process_reads_its_own_parts_and_the_tokens_are_those_of_one(checkpoint, expected, tmp_path, count, layout):
    """dp, pp, cp and tp across processes."""
    out, reads = tmp_path / "out.jsonl", []
    command = ["-c", GENERATES, "generate", str(checkpoint), "--prompt", *PROMPTS, "--max-tokens", "12", "--temperature", "0.8"]
    command += ["--output", str(out), *layout.split(), "--virtual-devices", str(4 // count)]
    for code, said, err in ended(start([command] * count)):
        assert code == 0, err
        reads.append(int(re.search(r"^read (\d+)$", said, re.M)[1]))  # gloo speaks as well
    assert [json.loads(line)["outputs"][0]["token_ids"] for line in out.read_text().splitlines()] == expected
    total = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    most = 0.75 if "-cp" in layout else 0.53  # half, and the norms; over cp also the kernels of queries, keys and values
    assert all(read < most * total for read in reads), (reads, total)
    assert sum(reads) > 0.98 * total * (count // 2)  # dp groups read the same


def run_config(folder, text, **parallel):
    made = {
        "folder": str(folder), "steps": 8,
        "model": {
            "dtype": "float32",
            "shape": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2},
        },
        "data": {"train": [str(text)], "tokenizer": str(text.parent), "sequence_length": 32, "batch_size": 8},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "checkpoints": {"every": 4, "keep": 4}, "log": {"every": 1, "tensorboard": False}, "parallel": parallel,
    }  # fmt: skip
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def losses(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["nats"] for row in rows}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog and runs away from the bear. " * 60)
    tiny.byte_tokenizer(folder, 128)
    return folder / "text.txt"


@pytest.mark.slow
def test_a_run_goes_on_over_another_number_of_processes(text, tmp_path):
    def train(name, count, **parallel):
        config = run_config(tmp_path / name, text, **parallel)
        for code, _, err in ended(start([["-m", "jaxtp", "train", str(config)]] * count)):
            assert code == 0, err
        return losses(tmp_path / name)

    def here(name, **parallel):
        in_one.train(in_one.load(run_config(tmp_path / name, text, **parallel)))
        return losses(tmp_path / name)

    pipelined = {"pp": 2, "tp": 2, "dp": 1, "accumulate": 4, "virtual_devices": 2}
    whole = here("whole", dp=2)
    assert sorted(whole) == list(range(1, 9))
    shared = {"dp": 4, "zero": 3, "virtual_devices": 1}
    first = train("two", 2, **pipelined)  # the stages in processes of their own
    np.testing.assert_allclose([*first.values()], [*whole.values()], atol=1e-5, rtol=0)
    for name, go_on in (("one", lambda: here("one", dp=1)), ("four", lambda: train("four", 4, **shared))):
        subprocess.run(["cp", "-r", tmp_path / "two", tmp_path / name], check=True)
        subprocess.run(["rm", "-r", tmp_path / name / "checkpoints" / "8", tmp_path / name / "log.jsonl"], check=True)
        rest = go_on()
        assert sorted(rest) == [5, 6, 7, 8]
        np.testing.assert_allclose([*rest.values()], [whole[step] for step in rest], atol=1e-5, rtol=0)


def after_first_step(processes, folder):
    """Returns when a run has made a step."""
    for _ in range(600):
        if (folder / "log.jsonl").exists() and (folder / "log.jsonl").read_text().count("\n") > 1:
            return
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.2)
    raise AssertionError("no step was made")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blow", "count", "told"),
    [(signal.SIGKILL, 3, "process 1 (.*) ended"), (signal.SIGSTOP, 2, "process 1 (.*) gave no sign of life for 12 s")],
)
def test_when_one_is_lost_the_others_say_which_and_end(text, tmp_path, blow, count, told):
    config = run_config(tmp_path / "run", text, dp=-1, zero=0, virtual_devices=1)
    config.write_text(
        config.read_text().replace("steps: 8", "steps: 100000").replace("batch_size: 8", f"batch_size: {3 * count}")
    )
    processes = start([["-m", "jaxtp", "train", str(config)]] * count, silence=12)
    after_first_step(processes, tmp_path / "run")
    struck = time.monotonic()
    os.kill(processes[1].pid, blow)
    try:
        for process in (processes[0], *processes[2:]):
            _, err = process.communicate(timeout=60)
            assert process.returncode == LOST, err
            assert re.search(told, err), err
    finally:
        for process in processes:
            kill(process)
    assert time.monotonic() - struck < 40  # with 12 s of patience


@pytest.mark.slow
def test_sigterm_to_one_is_saved_by_all_at_the_same_step(text, tmp_path):
    config = run_config(tmp_path / "run", text, dp=-1, virtual_devices=1)
    config.write_text(config.read_text().replace("steps: 8", "steps: 100000").replace("every: 4", "every: 0"))
    processes = start([["-m", "jaxtp", "train", str(config)]] * 2)
    after_first_step(processes, tmp_path / "run")
    processes[1].send_signal(signal.SIGTERM)
    for code, _, err in ended(processes):
        assert code == 75, err
    (step,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert max(losses(tmp_path / "run")) == step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([0], "of 2 processes, number 1 did not answer within 5 s"),
        ([1], "process 1: process 0 did not answer at 127.0.0.1:.* within 5 s"),
        ([0, 1, 1], "two processes say that they are number 1"),
        ([0, 2], "there are 2 processes, of which this is number 2; it must be 0 to 1|number 1 did not answer"),
    ],
)
def test_a_missing_or_a_wrong_peer_is_said_in_time(checkpoint, ranks, message):
    count = 3 if len(ranks) == 3 else 2
    command = ["-m", "jaxtp", "generate", str(checkpoint), "--prompt", "x", "--virtual-devices", "1"]
    began = time.monotonic()
    for code, _, err in ended(start([command] * len(ranks), ranks=ranks, count=count, join=5)):
        assert code == 2, err
        assert re.search(message, err), err
        assert "Traceback" not in err
    assert time.monotonic() - began < 40


def test_tp_stays_within_a_node(checkpoint):
    command = ["-m", "jaxtp", "generate", str(checkpoint), "--prompt", "x", "--virtual-devices", "2", "-tp", "4"]
    for code, _, err in ended(start([command] * 2)):
        assert code == 2, err
        assert (
            "tp=4 would join devices of several nodes, each of which has 2, over the network; legal tp within a node: 1, 2"
            in err
        )


def test_alone_nothing_is_started():
    code = "from jaxtp.distributed import processes\nwith processes() as nodes: assert nodes is None"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_"))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
