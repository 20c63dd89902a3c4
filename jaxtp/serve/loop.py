"""The engine's own thread, and the way of what it makes to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial

from jaxtp.engine.params import SamplingParams
from jaxtp.engine.request import Request, Update
from jaxtp.log import logger
from jaxtp.serve.metrics import Course, Metrics
from jaxtp.serve.served import Engine
from jaxtp.serve.stream import EngineFailed, Stream

_Heard = tuple[float, Stream, int, Course, Request, list[Update]]


class EngineLoop:
    """Steps an engine for as long as there is work, in a thread; `submit` and the rest are the event loop's thread's.

    failed: set when the engine has raised, which `error` is then. open: the streams whose requests have not been answered.
    """

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.engine, self._metrics = engine, metrics
        self.open: set[Stream] = set()
        self.error: BaseException | None = None
        self.failed, self.idle = asyncio.Event(), asyncio.Event()
        self.idle.set()
        self._loop = asyncio.get_running_loop()
        self._heard: deque[_Heard] = deque()
        self._called = self._stopping = False
        self._stepping: float | None = None  # since when
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def stepping(self) -> float:
        """For how many seconds the step that it makes has been made; 0 while there is nothing to do."""
        since = self._stepping
        return 0.0 if since is None else time.monotonic() - since

    def submit(
        self, prompts: Sequence[list[int]], params: SamplingParams, *, id: str, priority: int = 0, eager: bool = False
    ) -> Stream:
        """Asks the engine for completions of the prompts. Close what it returns.

        Raises what the engine does for one of them (then none of them runs), and EngineFailed.
        """
        if self.error:
            raise EngineFailed(str(self.error))
        stream = Stream(len(prompts) * params.n, eager=eager)
        self.open.add(stream)
        self.idle.clear()
        try:
            for i, prompt in enumerate(prompts):
                listener = partial(self._hear, stream, i, self._metrics.course(prompt, params))
                name = f"{id}-{i}" if len(prompts) > 1 else id
                asked = self.engine.submit(prompt, params, id=name, priority=priority, stream=eager, listener=listener)
                stream.requests.append(asked)
        except BaseException:
            self.close(stream)
            raise
        return stream

    def abort(self, stream: Stream) -> None:
        """Ends what has not ended; the stream gets what there is of it."""
        try:
            for request in stream.requests:
                if not request.finished:
                    self.engine.abort(request)
        except Exception as error:  # of another thread of the engine's
            self._broke(error)

    def close(self, stream: Stream) -> None:
        """Nobody takes anything from the stream any more."""
        self.open.discard(stream)
        if not self.open:
            self.idle.set()
        self.abort(stream)

    def stop(self) -> None:
        """Ends the thread after its step, if it makes one."""
        self._stopping = True
        self.engine.wake.set()
        self._thread.join(timeout=5)

    # -- in the engine's threads ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self.engine.wake.clear()  # before it looks for work: what comes from now on wakes it
                self._stepping = time.monotonic()
                if not self.engine.step():
                    self._stepping = None
                    self.engine.wake.wait()
        except BaseException as error:
            self._broke(error)

    def _broke(self, error: BaseException) -> None:
        if self.error is None:
            logger.error("the engine failed", exc_info=error)
            self.error = error
            self._call(self._fail)

    def _hear(self, stream: Stream, prompt: int, course: Course, request: Request, updates: list[Update]) -> None:
        self._heard.append((time.monotonic(), stream, prompt, course, request, updates))
        if not self._called:  # many rows have something new at each step: one call is for all of them
            self._called = True
            self._call(self._hand_out)

    def _call(self, function: object) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has been closed
            self._loop.call_soon_threadsafe(function)  # type: ignore[arg-type]

    # -- in the event loop's -------------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        self._called = False
        while self._heard:
            when, stream, prompt, course, request, updates = self._heard.popleft()
            course.add(when, request, updates)
            stream.put(prompt, updates)

    def _fail(self) -> None:
        self._stepping = None
        for stream in self.open:
            stream.fail(EngineFailed(str(self.error)))
        self.failed.set()
