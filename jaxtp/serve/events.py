"""Server-sent events, and the care for clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class Gone(Exception):
    """The client has gone away."""


async def while_there(receive: Receive, work: Awaitable[T]) -> T:
    """What `work` gives, which is cancelled as soon as the client goes away. Raises Gone then."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, going = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, going}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for task in (working, going):
            task.cancel()
        await asyncio.gather(working, going, return_exceptions=True)


class Events(Response):
    """A response of events, one for each value, and `data: [DONE]` at the end.

    close: called when the last is sent, the client is gone, or `seconds` have passed.
    """

    media_type = "text/event-stream"

    def __init__(self, values: AsyncIterator[Any], *, close: Callable[[], None], seconds: float) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._values, self._close, self._seconds = values, close, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them. While a client does not read, `send` waits, and no values are asked for."""
        try:
            with contextlib.suppress(Gone, TimeoutError):
                await while_there(receive, asyncio.wait_for(self._send(send), self._seconds))
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for value in self._values:
            await send({"type": "http.response.body", "body": b"data: " + to_json(value) + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
