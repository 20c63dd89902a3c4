"""Who may ask, how much, and what those see who watch over the server."""

import http.client
import logging
import socket
import threading
import time
from urllib.parse import urlsplit

import fake_engine
import openai
import pytest
import serving
from prometheus_client.parser import text_string_to_metric_families
from test_refusals import CHAT, TEXT, ask, refused

from jaxtp.serve.run import line
from jaxtp.serve.settings import Settings, bound

engine, server = serving.engine, serving.server


def test_keys(engine):
    with serving.serving(serving.served(engine), api_key=("first", "sécond")) as server:
        for path in ("/health", "/ready", "/ping", "/metrics", "/"):
            connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
            connection.request("GET", path)
            assert connection.getresponse().status == 200, path
            connection.close()
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic first"}, {"authorization": "first"}):
            for method, path, body in (
                ("GET", "/v1/models", None),
                ("POST", "/v1/completions", TEXT),
                ("POST", "/tokenize", TEXT),
                ("GET", "/version", None),
                ("GET", "/openapi.json", None),
                ("GET", "/docs", None),
                ("GET", "/nothing", None),
            ):
                answer = ask(server, method, path, body, headers=given)
                error = refused(answer, 401)
                assert "Authorization: Bearer KEY" in error["message"]
                assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
                assert answer[1]["www-authenticate"] == "Bearer"
        for key in ("first", "sécond".encode().decode("latin-1")):
            assert ask(server, "GET", "/v1/models", headers={"authorization": f"bearer {key}"})[0] == 200
        assert ask(server, "GET", "/openapi.json", headers={"authorization": "Bearer first"})[2]["components"][
            "securitySchemes"
        ]
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_the_key_of_the_environment(monkeypatch):
    monkeypatch.setenv("JAXTP_API_KEY", "secret")
    assert Settings().api_key == ("secret",)
    monkeypatch.setenv("JAXTP_API_KEY", "")
    assert Settings().api_key == ()
    with pytest.raises(ValueError, match="api_key holds an empty key"):
        Settings(api_key=("",))


def test_other_sites_may_ask_only_where_they_are_named(engine, server):
    origin = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    status, headers, _ = ask(server, "OPTIONS", "/v1/completions", headers=origin)
    assert (status, headers["access-control-allow-origin"]) == (405, None)
    assert ask(server, "GET", "/v1/models", headers=origin)[1]["access-control-allow-origin"] is None
    with serving.serving(serving.served(engine), api_key=("k",), allowed_origins=("https://chat.example",)) as named:
        connection = http.client.HTTPConnection(urlsplit(named.url).netloc)
        connection.request("OPTIONS", "/v1/completions", headers=origin)
        answer = connection.getresponse()
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "https://chat.example")
        connection.close()
        denied = ask(named, "GET", "/v1/models", headers=origin)  # a page can read why
        assert (denied[0], denied[1]["access-control-allow-origin"]) == (401, "https://chat.example")


def test_bodies_beyond_the_limit(engine):
    with serving.serving(serving.served(engine), max_body_bytes=1000) as server:
        assert ask(server, "POST", "/v1/completions", {**TEXT, "user": "x" * 900, "max_tokens": 1})[0] == 200
        error = refused(ask(server, "POST", "/v1/completions", {**TEXT, "user": "x" * 1000}), 413)
        assert error["message"] == "the body is larger than 1,000 bytes (--max-body-bytes)"
        chunks = [b'{"prompt": "', *[b"x" * 100] * 20, b'"}']  # whose length is not told
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", iter(chunks), headers, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()


def test_limits_on_prompts_and_n(engine):
    with serving.serving(serving.served(engine), max_prompts=2, max_n=3) as server:
        assert ask(server, "POST", "/v1/completions", {"prompt": ["a", "b"], "n": 3, "max_tokens": 1})[0] == 200
        assert refused(ask(server, "POST", "/v1/completions", {"prompt": ["a"] * 3}), 400)["param"] == "prompt"
        assert refused(ask(server, "POST", "/v1/chat/completions", {**CHAT, "n": 4}), 400)["param"] == "n"


def test_a_full_queue():
    engine = fake_engine.FakeEngine(serving.tokenizer(), rows=1, queued=2)
    with serving.serving(serving.served(engine)) as server:
        engine.hold()
        waiting = [threading.Thread(target=ask, args=(server, "POST", "/v1/completions", TEXT)) for _ in range(2)]
        for thread in waiting:
            thread.start()
        serving.wait_for(lambda: engine.stats().waiting == 2)
        answer = ask(server, "POST", "/v1/completions", TEXT)
        error = refused(answer, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert "2 completions wait already" in error["message"]
        assert answer[1]["retry-after"] == "1"
        assert refused(ask(server, "POST", "/v1/completions", {"prompt": ["a", "b"], "stream": True}), 429)
        engine.go()
        for thread in waiting:
            thread.join()
        engine.hold()
        refused(ask(server, "POST", "/v1/completions", {"prompt": ["a"] * 3}), 429)
        assert len(engine.aborted) == 2  # those that had a place
        assert not server.service.loop.open
        engine.go()
        assert ask(server, "POST", "/v1/completions", TEXT)[0] == 200


def test_a_request_that_takes_too_long_is_ended_with_what_it_has(engine):
    engine.seconds = 0.01
    with serving.serving(serving.served(engine), request_seconds=0.2) as server:
        body = {**TEXT, "max_tokens": 500, "ignore_eos": True}
        choice = ask(server, "POST", "/v1/completions", body)[2]["choices"][0]
        assert choice["finish_reason"] == "abort"
        assert 0 < len(choice["text"]) < 100
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
            client.completions.create(
                model="tiny", prompt="Hi", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
            ) as stream,
        ):
            *_, last = stream
        assert last.choices[0].finish_reason == "abort"


def values(server):
    """Every sample of /metrics: (name, labels) -> value."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    assert answer.headers["content-type"].startswith("text/plain; version=")
    text = answer.read().decode()
    connection.close()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_have_the_names_and_values_that_dashboards_read(server, engine):
    ids = [7] * 40
    for _ in range(2):
        ask(server, "POST", "/v1/completions", {"prompt": ids, "n": 2, "max_tokens": 10, "min_tokens": 10, "seed": 1})
    found = values(server)
    labels = (("engine", "0"), ("model_name", "tiny"))

    def value(name, **more):
        return found[f"vllm:{name}", tuple(sorted([*labels, *more.items()]))]

    assert value("prompt_tokens_total") == engine.prompted
    assert value("prompt_tokens_cached_total") == value("prefix_cache_hits_total") == engine.hits > 0
    assert value("prefix_cache_queries_total") == engine.prompted
    assert value("generation_tokens_total") == 40
    assert (value("num_requests_running"), value("num_requests_waiting"), value("kv_cache_usage_perc")) == (0, 0, 0)
    assert value("num_preemptions_total") == 0
    assert [value("request_success_total", finished_reason=why) for why in ("stop", "length", "abort")] == [0, 4, 0]
    assert value("cache_config_info", block_size="16", num_gpu_blocks="64") == 1
    assert (value("request_prompt_tokens_sum"), value("request_prompt_tokens_count")) == (160, 4)
    assert (value("request_generation_tokens_sum"), value("request_generation_tokens_count")) == (40, 4)
    assert (value("request_params_n_sum"), value("request_params_n_count")) == (4, 2)
    assert value("request_params_max_tokens_sum") == 20
    assert value("iteration_tokens_total_sum") == 40
    assert value("time_to_first_token_seconds_count") == 2
    assert value("inter_token_latency_seconds_count") == 36
    for name in ("e2e_request_latency", "request_queue_time", "request_inference_time", "request_prefill_time"):
        assert value(f"{name}_seconds_count") == 4
    for name in ("request_decode_time", "request_time_per_output_token"):
        assert value(f"{name}_seconds_count") == 4
    assert value("e2e_request_latency_seconds_sum") >= value("request_inference_time_seconds_sum") > 0
    assert found["process_start_time_seconds", ()] > 0


def test_the_log_line():
    before = fake_engine.Stats(0, 0, 64, 0, 16, 100, 50, 0, 100, 40, 10)
    now = fake_engine.Stats(3, 2, 64, 16, 16, 300, 100, 0, 300, 140, 60)
    assert line(before, now, 10.0) == (
        "Avg prompt throughput: 20.0 tokens/s, Avg generation throughput: 10.0 tokens/s, Running: 3 reqs, Waiting: 2 reqs, "
        "KV cache usage: 25.0%, Prefix cache hit rate: 25.0%"
    )


def test_the_log_line_is_said_while_there_is_work_and_no_longer(engine, caplog):
    caplog.set_level(logging.INFO, logger="jaxtp")
    engine.seconds = 0.01
    with serving.serving(serving.served(engine), log_seconds=0.03) as server:
        ask(server, "POST", "/v1/completions", {**TEXT, "max_tokens": 15, "ignore_eos": True})
        serving.wait_for(lambda: "Running: 0 reqs, Waiting: 0 reqs" in caplog.text)
        time.sleep(0.1)  # a last step may be told in one more line
        said = caplog.text.count("Avg prompt")
        ask(server, "GET", "/health")
        time.sleep(0.1)
        assert caplog.text.count("Avg prompt") == said >= 3


def test_health_sees_an_engine_that_hangs(engine):
    stuck, inside = threading.Event(), threading.Event()
    step = engine.step

    def hanging():
        inside.set()
        return stuck.wait(20) and step()

    with serving.serving(serving.served(engine), stall_seconds=0.05) as server:
        assert ask(server, "GET", "/health")[2] == {"status": "ok"}
        engine.step = hanging
        asking = threading.Thread(target=ask, args=(server, "POST", "/v1/completions", TEXT))
        asking.start()
        assert inside.wait(10)
        serving.wait_for(lambda: server.service.loop.stepping > 0.05)
        assert "has not come to the end of a step" in refused(ask(server, "GET", "/health"), 503)["message"]
        assert refused(ask(server, "GET", "/ready"), 503)["code"] == "engine_stalled"
        engine.step = step
        stuck.set()
        asking.join()
        assert ask(server, "GET", "/health")[0] == 200  # an idle engine makes no steps


def test_version_load_docs_and_the_page(server):
    assert ask(server, "GET", "/version")[2].keys() == {"version"}
    assert ask(server, "GET", "/load")[2] == {"server_load": 0}
    for path, kind in (("/docs", b"swagger"), ("/", b"<!doctype html>")):
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.headers["content-type"].startswith("text/html")
        assert kind in answer.read()
        connection.close()


def test_an_address_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            OSError, match=rf"cannot listen on port {port} of 127.0.0.1: .*in use; --host and --port name another"
        ):
            bound("127.0.0.1", port)
    with pytest.raises(OSError, match="cannot listen on port 80 of nowhere"):
        bound("nowhere.invalid", 80)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70000}, "port=70000 must be at most 65535"),
        ({"max_n": 0}, "max_n=0 must be at least 1"),
        ({"drain_seconds": -1}, "drain_seconds=-1 must be a number of seconds, at least 0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_who_can_ask_without_a_key():
    assert [Settings(host=host).open for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "pod.example")] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert not Settings(host="0.0.0.0", api_key=("k",)).open
