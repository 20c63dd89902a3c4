"""Clients that go away or do not read, an engine that fails, a server that is told to stop: nothing is lost, nothing stuck."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import fake_engine
import openai
import pytest
import serving
from test_refusals import TEXT, ask, refused
from test_watch import values

engine, server = serving.engine, serving.server
LONG = {**TEXT, "max_tokens": 500, "ignore_eos": True}
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
HEAD += b"content-length: %d\r\n\r\n"
ABORTS = ("vllm:request_success_total", (("engine", "0"), ("finished_reason", "abort"), ("model_name", "tiny")))


class Connection(http.client.HTTPConnection):
    response = None

    def getresponse(self):
        self.response = super().getresponse()
        return self.response

    def hang_up(self):
        self.close()
        if self.response:
            self.response.close()


@pytest.fixture
def begin():
    """Sends a request: the connection, closed at the end."""
    with contextlib.ExitStack() as opened:

        def sent(url, body):
            connection = Connection(urlsplit(url).netloc, timeout=20)
            opened.callback(connection.hang_up)
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            return connection

        yield sent


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_rows_and_is_counted(begin, server, engine, stream):
    engine.seconds = 0.005
    connection = begin(server.url, {**LONG, "n": 3, "stream": stream})
    serving.wait_for(lambda: len(engine.running) == 3)
    assert ask(server, "GET", "/load")[2] == {"server_load": 1}
    if stream:
        assert connection.getresponse().read1().startswith(b"data: ")
    connection.hang_up()
    serving.wait_for(lambda: engine.aborted)
    assert engine.running == []
    serving.wait_for(lambda: values(server)[ABORTS] == 3)
    assert ask(server, "GET", "/load")[2] == {"server_load": 0}
    assert engine.steps < 400


def test_a_client_that_goes_away_while_it_waits(begin, server, engine):
    engine.hold()
    connection = begin(server.url, LONG)
    serving.wait_for(lambda: engine.stats().waiting == 1)
    connection.hang_up()
    serving.wait_for(lambda: engine.stats().waiting == 0)


def test_each_step_is_told_as_it_is_made(server, engine):
    engine.seconds = 0.02
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        stream = client.completions.create(model="tiny", prompt="x", max_tokens=6, stream=True, extra_body={"ignore_eos": True})
        with stream:
            assert [len(chunk.choices[0].text) for chunk in stream] == [1] * 6


@pytest.fixture
def reluctant():
    """Sends a request on a connection that takes little before it is read: what reads from it."""
    with contextlib.ExitStack() as opened:

        def sent(url, body):
            connection = opened.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(20)
            connection.connect((urlsplit(url).hostname, urlsplit(url).port))
            data = json.dumps(body).encode()
            connection.sendall(HEAD % len(data) + data)
            return opened.enter_context(connection.makefile("rb"))

        yield sent


def test_a_slow_client_does_not_slow_the_others_and_misses_nothing(reluctant, engine):
    engine.max_model_len, many = 20_000, 10_000
    with serving.serving(serving.served(engine)) as server:
        slow = reluctant(server.url, {**LONG, "max_tokens": many, "stream": True, "return_token_ids": True})
        serving.wait_for(lambda: engine.running)
        for _ in range(3):
            assert ask(server, "POST", "/v1/completions", {**TEXT, "max_tokens": 5})[0] == 200
        serving.wait_for(lambda: not engine.running, 30)
        events = [line[6:] for line in slow if line.startswith(b"data: ")]
        assert events[-1] == b"[DONE]\n"
        chunks = [json.loads(event)["choices"][0] for event in events[:-1]]
        tokens = [token for chunk in chunks for token in chunk["token_ids"]]
        assert len(tokens) == many
        assert "".join(chunk["text"] for chunk in chunks) == serving.tokenizer().decode(tokens)


def test_a_client_that_never_reads_is_let_go(reluctant, engine, monkeypatch):
    monkeypatch.setattr("jaxtp.serve.service.GRACE", 0.2)
    engine.max_model_len = 200_000
    with serving.serving(serving.served(engine), request_seconds=0.5) as server:
        reluctant(server.url, {**LONG, "max_tokens": 100_000, "n": 8, "stream": True, "return_token_ids": True})
        serving.wait_for(lambda: server.service.loop.open)
        serving.wait_for(lambda: not server.service.loop.open)
        assert engine.running == []


def test_an_engine_that_fails_ends_everything_and_says_so(begin, caplog):
    engine = fake_engine.FakeEngine(serving.tokenizer(), fails_at=20, seconds=0.01)
    with serving.serving(serving.served(engine)) as server:
        streaming, whole = begin(server.url, {**LONG, "stream": True}), begin(server.url, LONG)
        events = streaming.getresponse().read().split(b"\n\n")
        error = json.loads(events[-3].removeprefix(b"data: "))
        assert error["error"]["code"] == "engine_failed"
        assert events[-2:] == [b"data: [DONE]", b""]
        answer = whole.getresponse()
        assert answer.status == 500
        assert json.loads(answer.read())["error"]["message"] == "the engine failed; its log says why"
        serving.wait_for(lambda: server.raised)
        assert str(server.raised[0]) == "the engine failed: RuntimeError: the device is gone"
    assert "the device is gone" in caplog.text  # with its traceback


def test_what_a_failed_engine_answers_until_the_end(engine):
    with serving.serving(serving.served(engine)) as server:
        server.service.loop.error = RuntimeError("gone")
        for method, path, body in (("GET", "/health", None), ("GET", "/ready", None), ("POST", "/v1/completions", TEXT)):
            assert refused(ask(server, method, path, body), 503)["code"] == "engine_failed"
        server.service.loop.error = None


# -- as a process of its own -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(engine=None, **settings):
    """(the process, its url)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [str(serving.folder()), json.dumps(engine or {}), json.dumps({"port": port, **settings})]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = subprocess.Popen(
        [sys.executable, str(Path(serving.__file__)), *arguments], stderr=subprocess.PIPE, text=True, env=environment
    )

    def up():
        assert started.poll() is None, started.stderr.read()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return True

    try:
        serving.wait_for(up, 30)
        yield started, f"http://127.0.0.1:{port}"
    finally:
        started.kill()
        started.communicate()


class Url:
    def __init__(self, url):
        self.url = url


def ended(started):
    """(exit code, what it said)."""
    said = started.communicate(timeout=20)[1]
    return started.returncode, said


def test_sigterm_lets_requests_end_and_takes_no_new_ones(begin):
    with process({"seconds": 0.01}) as (started, url):
        running = begin(url, {**LONG, "max_tokens": 100})
        streaming = begin(url, {**LONG, "max_tokens": 100, "stream": True})
        first = streaming.getresponse()
        assert first.read1().startswith(b"data: ")
        started.send_signal(signal.SIGTERM)
        serving.wait_for(lambda: ask(Url(url), "GET", "/ready")[0] == 503)
        answer = ask(Url(url), "POST", "/v1/completions", TEXT)
        assert refused(answer, 503)["code"] == "draining"
        assert answer[1]["retry-after"] == "10"
        assert ask(Url(url), "GET", "/health")[0] == 200
        choice = json.loads(running.getresponse().read())["choices"][0]
        assert (choice["finish_reason"], len(choice["text"])) == ("length", 100)
        assert first.read().endswith(b"data: [DONE]\n\n")
        code, said = ended(started)
        assert code == 0, said
        assert "Traceback" not in said


@pytest.mark.parametrize("how", ["limit", "second signal"])
def test_what_has_not_ended_by_the_limit_or_the_second_signal_is_aborted(begin, how):
    with process({"seconds": 0.01}, drain_seconds=0.3 if how == "limit" else 60) as (started, url):
        running = begin(url, LONG)
        serving.wait_for(lambda: ask(Url(url), "GET", "/load")[2]["server_load"] == 1)
        start = time.monotonic()
        started.send_signal(signal.SIGTERM)
        if how != "limit":
            serving.wait_for(lambda: ask(Url(url), "GET", "/ready")[0] == 503)
            started.send_signal(signal.SIGTERM)
        choice = json.loads(running.getresponse().read())["choices"][0]
        assert choice["finish_reason"] == "abort"
        code, said = ended(started)
        assert code == 0, said
        assert time.monotonic() - start < 4


def test_a_process_whose_engine_fails_says_so_and_exits_with_1(begin):
    with process({"fails_at": 5}) as (started, url):
        assert begin(url, LONG).getresponse().status == 500
        code, said = ended(started)
        assert code == 1
        assert said.splitlines()[-1] == "jaxtp: the engine failed: RuntimeError: the device is gone"


def test_a_signal_without_work_ends_it_at_once():
    with process() as (started, _):
        started.send_signal(signal.SIGINT)
        assert ended(started)[0] == 0


def test_bursts_beyond_the_queue():
    engine = fake_engine.FakeEngine(serving.tokenizer(), rows=4, queued=8, seconds=0.001)
    with serving.serving(serving.served(engine)) as server:
        found = []
        asking = [
            threading.Thread(target=lambda: found.append(ask(server, "POST", "/v1/completions", {**TEXT, "max_tokens": 20})[0]))
            for _ in range(60)
        ]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        assert set(found) == {200, 429}
        assert len(found) == 60
        assert not engine.running
        assert not engine.waiting
