"""A server whose behaviour is known: what it does to each request is scripted, and what it saw is kept."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from aiohttp import web

PIECES = ["a", "é", "", "漢字", " b"]  # the texts of a stream, in turn; one token has none yet


@dataclass
class Fake:
    """script: what happens to each request in turn, by name; then "ok". delay: seconds before each token."""

    script: list[str] = field(default_factory=list)
    delay: float = 0.0
    usage: bool = True
    key: str | None = None
    bundled: int = 1  # tokens that a chunk stands for, by the count of the server
    together: int | None = None  # so many requests are answered only once all of them are there
    bodies: list[dict] = field(default_factory=list)
    came: list[float] = field(default_factory=list)
    sent: list[list[float]] = field(default_factory=list)  # when each token was
    running: int = 0
    peak: int = 0
    url: str = ""
    stop: Callable | None = None

    async def models(self, request):
        return self.refused(request) or web.json_response({"data": [{"id": "tiny"}, {"id": "other"}]})

    def refused(self, request):
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "which key?", "code": 401}}, status=401)
        return None

    async def answer(self, request):
        self.came.append(time.perf_counter())
        if refused := self.refused(request):
            return refused
        body = await request.json()
        self.bodies.append(body)
        act = self.script.pop(0) if self.script else "ok"
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            if self.together:
                async with asyncio.timeout(20):
                    await self.barrier.wait()
            return await self.act(act, request, body)
        finally:
            self.running -= 1

    async def act(self, act, request, body):
        if act == "busy":
            return web.json_response({"error": {"message": "the queue\n is full"}}, status=503)
        if act == "detail":
            return web.json_response({"detail": "prompt must be a string."}, status=400)
        if act == "slow":
            await asyncio.sleep(60)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chat = request.path.endswith("chat/completions")
        count = {"cut": 2, "die": 2, "error": 2, "none": 0}.get(act, body["max_tokens"])
        times: list[float] = []
        self.sent.append(times)
        await response.write(b": ping\n\n")
        if chat:
            await response.write(event(choice(delta={"role": "assistant", "content": ""})))
        for i in range(count):
            await asyncio.sleep(self.delay)
            text = PIECES[i % len(PIECES)]
            data = event(choice(delta={"content": text}) if chat else choice(text=text))
            half = len(data) // 2
            times.append(time.perf_counter())
            await response.write(data[:half])
            await asyncio.sleep(0)
            await response.write(data[half:])
        if act == "end":
            await self.stop()
        if act in ("die", "end"):
            request.transport.abort()
            return response
        if act == "cut":
            return response
        if act == "garbage":
            await response.write(b"data: <html>\n\n")
        if act == "list":
            await response.write(b'data: {"choices": ["a"]}\n\n')
        if act == "error":
            await response.write(b'data: {"error": {"message": "the engine ended"}}\n\n')
        usage = {"prompt_tokens": 7, "completion_tokens": count * self.bundled}
        if act == "last":  # all in the last chunk, and no [DONE]: transformers' way
            await response.write(event({**choice(text="", finish_reason="length"), "usage": usage}))
            return response
        await response.write(event(choice(**({"delta": {}} if chat else {"text": ""}), finish_reason="length")))
        if self.usage:
            await response.write(event({"choices": [], "usage": usage}))
        await response.write(b"data: [DONE]\n\n")
        return response


def choice(finish_reason=None, **kind):
    return {"choices": [{"index": 0, "finish_reason": finish_reason, **kind}]}


def event(chunk):
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()


@contextlib.contextmanager
def serving(**settings) -> Iterator[Fake]:
    """A fake server, in a thread of its own."""
    fake, ready = Fake(**settings), threading.Event()
    done, loop = asyncio.Event(), None

    async def serve():
        nonlocal loop
        loop = asyncio.get_running_loop()
        fake.barrier = asyncio.Barrier(fake.together or 1)
        app = web.Application()
        app.add_routes([web.get("/v1/models", fake.models), web.post("/v1/completions", fake.answer)])
        app.add_routes([web.post("/v1/chat/completions", fake.answer)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        fake.stop = site.stop
        ready.set()
        await done.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(20)
        yield fake
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(20)
