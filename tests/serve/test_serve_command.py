"""`jaxtp serve` as people start it, and the files that say how."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import serving
from conftest import COMPILED_QUICKLY
from test_refusals import ask

from jaxtp.cli.parse import parse
from jaxtp.cli.serve import Serve, with_config

HOUSE = Path(__file__).parents[2]


def asked(*arguments):
    return parse(Serve, with_config([*map(str, arguments)]), prog="jaxtp serve")


@contextlib.contextmanager
def started(*command):
    """The process, its log so far, and its url once it serves."""
    environment = {**os.environ, **COMPILED_QUICKLY, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stderr=subprocess.PIPE, text=True, env=environment, cwd=HOUSE
    )
    log: list[str] = []
    reading = threading.Thread(target=lambda: log.extend(process.stderr), daemon=True)
    reading.start()
    try:
        yield process, log
    finally:
        process.kill()
        process.wait()
        reading.join()
        process.stderr.close()


def url(process, log):
    def said():
        assert process.poll() is None, log
        return re.search(r"serving \S+ at (http://\S+)", "".join(log))

    serving.wait_for(said, 120)
    return said()[1]


class Url:
    def __init__(self, url):
        self.url = url


def test_it_serves_until_sigterm():
    flags = ("-tp", 2, "--virtual-devices", 2, "--port", 0, "--max-model-len", 128)
    with started("-m", "jaxtp", "serve", "demo", *flags) as (process, log):
        server = Url(url(process, log))
        assert [model["id"] for model in ask(server, "GET", "/v1/models")[2]["data"]] == ["demo"]
        status, _, body = ask(server, "POST", "/v1/completions", {"prompt": "ROMEO:", "max_tokens": 5, "temperature": 0})
        assert (status, body["usage"]["completion_tokens"]) == (200, 5)
        assert ask(server, "GET", "/health")[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert "Traceback" not in "".join(log)


def test_the_script_knows_the_servers_flags():
    command = [sys.executable, str(HOUSE / "scripts" / "serve.py"), "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "120"}).stdout
    assert "--drain-seconds" in said
    assert "--no-warm-up" not in said


def test_a_file_of_flags_and_those_given_beside_it(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text(
        "model: some/model\nport: 9000\ntensor_parallel_size: 4\nwarm-up: true\nenable-prefix-caching: false\n"
        "access-log: false\napi-key: [a, b]\nserved-model-name: m\n"
    )
    found = asked("--config", path, "--port", 9001)
    assert (found.named_model, found.server.port, found.engine.tensor_parallel_size) == ("some/model", 9001, 4)
    assert (found.server.warm_up, found.engine.enable_prefix_caching, found.server.access_log) == (True, False, False)
    assert (found.server.api_key, found.server.served_model_name) == (("a", "b"), ("m",))
    other = asked("other/model", f"--config={path}")
    assert (other.model, other.named_model, other.server.port) == ("other/model", None, 9000)
    assert asked("m").server.port == 8000


@pytest.mark.parametrize(
    ("content", "message"),
    [("prot: 1", "prot is no flag of jaxtp serve"), ("- a", "must hold flags, one a line"), ("config: x", "config is no flag")],
)
def test_files_that_cannot_be(tmp_path, content, message):
    path = tmp_path / "serve.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        asked("--config", path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("path", sorted((HOUSE / "configs" / "serve").glob("*.yaml")), ids=lambda path: path.name)
def test_the_files_of_the_house_are_read(path):
    assert asked("--config", path).named_model
