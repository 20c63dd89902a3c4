"""A server on two processes: the first one speaks, both work, and they end together."""

import json
import signal
import time
import urllib.request

import pytest
import tiny
from nodes import ended, free_port, start

from jaxtp import LLM, SamplingParams
from jaxtp.distributed import LOST


def ask(port, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read() or b"null")


@pytest.fixture
def server(tmp_path):
    """(port, processes, folder), once requests are taken."""
    folder, port = tiny.checkpoint(tmp_path / "model"), free_port()
    command = ["-m", "jaxtp", "serve", str(folder), "-dp", "2", "--virtual-devices", "1", "--port", str(port)]
    processes = start([command, command], silence=5)
    deadline = time.monotonic() + 120
    while True:
        try:
            ask(port, "/ready")
            break
        except OSError:
            alive = all(process.poll() is None for process in processes)
            assert alive, ended(processes)
            assert time.monotonic() < deadline
            time.sleep(0.2)
    yield port, processes, folder
    ended(processes, within=5)


@pytest.mark.slow
def test_answers_are_those_of_one_process_and_both_end(server):
    port, processes, folder = server
    llm, prompts = LLM(folder, progress=False), tiny.prompts(5, longest=40)
    body = {"prompt": prompts, "max_tokens": 8, "temperature": 0.9, "seed": 3, "ignore_eos": True, "return_token_ids": True}
    answer = ask(port, "/v1/completions", body)
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=8, ignore_eos=True)
    assert [choice["token_ids"] for choice in answer["choices"]] == [
        request.outputs[0].token_ids for request in llm.generate(prompts, params)
    ]
    for process in processes:  # as Kubernetes does
        process.send_signal(signal.SIGTERM)
    assert [code for code, _, _ in ended(processes, within=60)] == [0, 0]


@pytest.mark.slow
def test_one_that_is_killed_ends_the_other(server):
    _, (first, second), _ = server
    second.kill()
    ((code, _, said),) = ended([first], within=60)
    assert code == LOST
    assert "process 1" in said
