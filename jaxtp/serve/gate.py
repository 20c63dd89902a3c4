"""What a request passes before it reaches its route: keys, the server's going down, and the size of its body."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxtp.serve.errors import Failure, answer
from jaxtp.serve.settings import Settings

WATCHED = ("/health", "/ping", "/ready", "/metrics")  # for those who watch over the server: no key, also while it goes down
OPEN = (*WATCHED, "/")  # the page asks for the key itself


class Gate:
    """ASGI middleware. away: why no requests are taken any more, if so."""

    def __init__(self, app: ASGIApp, *, settings: Settings, away: Callable[[], Failure | None]) -> None:
        self._app, self._away, self._most = app, away, settings.max_body_bytes
        self._keys = [_digest(key.encode()) for key in settings.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets it through, or answers it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif refusal := self._refusal(Request(scope)):
            await answer(refusal)(scope, receive, send)
        else:
            await self._app(scope, self._limited(receive), send)

    def _refusal(self, request: Request) -> Failure | None:
        path = request.url.path
        if self._keys and path not in OPEN and not self._known(request.headers.get("authorization", "")):
            said = "a key is needed, as in the header Authorization: Bearer KEY" + (
                "; this one is not known" if "authorization" in request.headers else ""
            )
            return Failure(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if path not in WATCHED and (away := self._away()):
            return away
        length = request.headers.get("content-length", "")
        return self._too_large() if length.isascii() and length.isdigit() and int(length) > self._most else None

    def _known(self, authorization: str) -> bool:
        """Whether it holds one of the keys; the time that this takes tells nothing of them."""
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip().encode("latin-1"))
        return scheme.lower() == "bearer" and sum([hmac.compare_digest(given, key) for key in self._keys]) > 0

    def _limited(self, receive: Receive) -> Receive:
        """`receive` until the body is too large, in whatever pieces it comes."""
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> Failure:
        return Failure(413, f"the body is larger than {self._most:,} bytes (--max-body-bytes)", code="body_too_large")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
