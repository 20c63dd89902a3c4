"""The server's process: its socket, its signals, its log line, its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from jaxtp.log import logger
from jaxtp.serve.metrics import usage
from jaxtp.serve.served import Served
from jaxtp.serve.server import application
from jaxtp.serve.service import Service
from jaxtp.serve.settings import Settings, bound
from jaxtp.serve.stream import EngineFailed

CLOSING = 3  # seconds for what has been answered to reach its clients


class _Uvicorn(uvicorn.Server):
    """uvicorn with the signals left to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes none."""
        yield


class Server:
    """Serves on a socket until it is told to stop. Signals are taken in the main thread alone. ready: set when requests are."""

    def __init__(self, settings: Settings) -> None:
        """Takes the address, so that nothing is loaded for one that is in use. Raises OSError."""
        self._settings = settings
        self.socket = bound(settings.host, settings.port)
        self.service: Service
        self.error: BaseException | None = None
        self.ready = threading.Event()
        self._drain, self._hurry = asyncio.Event(), asyncio.Event()

    @property
    def url(self) -> str:
        """Where it is."""
        host, port = self.socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self, served: Served) -> None:
        """Serves, until a signal or `stop`. Raises EngineFailed."""
        app = application(served, self._settings)
        self.service = app.state.service
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=self._settings.access_log,
            server_header=False,
            timeout_graceful_shutdown=CLOSING,
            lifespan="on",
            ws="none",
        )
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(self._run(_Uvicorn(config)))
        if self.error:
            raise EngineFailed(f"the engine failed: {type(self.error).__name__}: {self.error}") from self.error

    async def _run(self, server: uvicorn.Server) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        taken = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        for sign in taken:
            loop.add_signal_handler(sign, self._signalled)
        serving = asyncio.ensure_future(server.serve(sockets=[self.socket]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        helpers = [asyncio.ensure_future(work) for work in (self._end(server), self._log_lines())]
        logger.info("serving %s at %s", ", ".join(self.service.served.names), self.url)
        self.ready.set()
        if self._settings.open:
            logger.warning("other machines may ask, and no key is needed: --api-key asks for one")
        try:
            await serving
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
            for sign in taken:
                loop.remove_signal_handler(sign)

    def stop(self) -> None:
        """As the first signal does; from any thread."""
        self._loop.call_soon_threadsafe(self._signalled)

    def _signalled(self) -> None:
        if self._drain.is_set():
            self._hurry.set()
            return
        self.service.draining = True
        self._drain.set()
        count = len(self.service.loop.open)
        logger.info("going down: %d requests have %g s to end; a second signal ends them", count, self._settings.drain_seconds)

    async def _end(self, server: uvicorn.Server) -> None:
        """Waits for the end of all, one way or another, and lets it be orderly."""
        loop = self.service.loop
        if await _first(self._drain, loop.failed) is self._drain:
            await _first(loop.idle, loop.failed, self._hurry, seconds=self._settings.drain_seconds)
            for stream in list(loop.open):
                loop.abort(stream)
        self.error = loop.error
        await _first(loop.idle, loop.failed, seconds=CLOSING)
        if loop.failed.is_set():
            self.error = loop.error
            await _first(loop.idle, seconds=CLOSING)  # streams are told
        server.should_exit = True

    async def _log_lines(self) -> None:
        seconds, engine = self._settings.log_seconds, self.service.served.engine
        before = engine.stats()
        while seconds:
            await asyncio.sleep(seconds)
            now = engine.stats()
            if now.running or now.waiting or now.steps != before.steps:
                logger.info(line(before, now, seconds))
            before = now


async def _first(*events: asyncio.Event, seconds: float | None = None) -> asyncio.Event | None:
    """The first of the events that is set; None where none is in time."""
    waits = {asyncio.ensure_future(event.wait()): event for event in events}
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return next((event for event in events if event.is_set()), None)
    finally:
        for wait in waits:
            wait.cancel()


def line(before: Any, now: Any, seconds: float) -> str:
    """How busy the engine was between two of its stats."""
    queries, hits = now.prefix_queries - before.prefix_queries, now.prefix_hits - before.prefix_hits
    return (
        f"Avg prompt throughput: {(now.prompt_tokens - before.prompt_tokens) / seconds:.1f} tokens/s, "
        f"Avg generation throughput: {(now.generation_tokens - before.generation_tokens) / seconds:.1f} tokens/s, "
        f"Running: {now.running} reqs, Waiting: {now.waiting} reqs, "
        f"KV cache usage: {100 * usage(now):.1f}%, Prefix cache hit rate: {100 * hits / queries if queries else 0:.1f}%"
    )


def run(load: Callable[[], Served], settings: Settings) -> None:
    """Takes the address, loads, and serves, in this thread. Raises as `serve`."""
    server = Server(settings)
    for name in ("uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.INFO if name.endswith("access") else logging.WARNING)
        for handler in logger.handlers:
            logging.getLogger(name).addHandler(handler)
    with server.socket:
        server.run(load())
