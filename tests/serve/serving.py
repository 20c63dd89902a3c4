"""A server in a thread, on a port of its own, with a fake engine; also as a process (`python serving.py`)."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fake_engine
import pytest

from jaxtp.serve.run import Server, run
from jaxtp.serve.served import Served
from jaxtp.serve.settings import Settings
from jaxtp.text import Tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('no role ' + m.role) }}"
    "{% endif %}{{ m.role }}: {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    "{% if shout is defined %}LOUD{% endif %}"
)


@functools.cache
def folder() -> Path:
    """A tokenizer of characters with a chat template, and no model."""
    import tiny

    made = Path(tempfile.mkdtemp())
    tiny.byte_tokenizer(made, fake_engine.VOCABULARY)
    settings = json.loads((made / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return made


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(folder())


def served(engine, *, names=("tiny",), defaults=None, priorities=False) -> Served:
    return Served(names=names, engine=engine, tokenizer=engine.tokenizer, defaults=defaults or {}, priorities=priorities)


@contextlib.contextmanager
def serving(model: Served, **settings) -> Iterator[Server]:
    """A server that takes requests. Whatever it runs in raises, the test raises at the end."""
    server = Server(Settings(port=0, **settings))
    raised = server.raised = []

    def work() -> None:
        try:
            server.run(model)
        except BaseException as error:
            raised.append(error)
            server.ready.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert server.ready.wait(20)
    try:
        yield server
    finally:
        if thread.is_alive():
            server.stop()
            server.stop()
        thread.join(20)
        assert not thread.is_alive()
    if raised and not isinstance(raised[0], RuntimeError):
        raise raised[0]


@pytest.fixture
def engine():
    """A fake one, nothing of which is left behind."""
    made = fake_engine.FakeEngine(tokenizer())
    yield made
    made.go()
    wait_for(lambda: not made.running and not made.waiting)


@pytest.fixture
def server(engine):
    with serving(served(engine)) as running:
        yield running


def wait_for(condition, seconds: float = 10.0) -> None:
    """Waits until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.005)


if __name__ == "__main__":
    folder, engine, settings = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    try:
        run(lambda: served(fake_engine.FakeEngine(Tokenizer(Path(folder)), **engine)), Settings(**settings))
    except RuntimeError as error:
        raise SystemExit(f"jaxtp: {error}") from None
