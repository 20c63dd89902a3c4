"""What the routes do: requests to the engine, and its answers back."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool

from jaxtp.engine.request import QueueFull
from jaxtp.serve.answers import Answer, ChatAnswer, CompletionAnswer
from jaxtp.serve.errors import Failure, form
from jaxtp.serve.events import Events, Gone, while_there
from jaxtp.serve.loop import EngineLoop
from jaxtp.serve.metrics import Metrics
from jaxtp.serve.prompts import chat_ids, encoded, prompts_of, tokenizer_of
from jaxtp.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeChat, TokenizeText
from jaxtp.serve.sampling import params_of, refused
from jaxtp.serve.served import Served
from jaxtp.serve.settings import Settings
from jaxtp.serve.stream import EngineFailed, Stream

GRACE = 10.0  # seconds that a client has to read what a request has made by the end of its time
_FAILED = "the engine failed; its log says why"


class Service:
    """Everything behind the routes. draining: no new requests are taken."""

    def __init__(self, served: Served, settings: Settings) -> None:
        self.served, self.settings = served, settings
        self.metrics = Metrics(served.engine, served.names[0])
        self.draining = False
        self.loop: EngineLoop

    def start(self) -> None:
        """Lets the engine run, in the event loop that is there."""
        self.loop = EngineLoop(self.served.engine, self.metrics)

    def stop(self) -> None:
        """Ends it."""
        self.loop.stop()

    # -- how it stands -------------------------------------------------------------------------------------------------

    def away(self) -> Failure | None:
        """What new requests are told while none are taken."""
        if self.loop.error:
            return Failure(503, _FAILED, code="engine_failed")
        wait = {"Retry-After": "10"}
        return (
            Failure(503, "the server goes down and takes no requests", code="draining", headers=wait) if self.draining else None
        )

    def check_health(self) -> None:
        """Raises Failure where the engine has failed, or has been in one step for too long."""
        if self.loop.error:
            raise Failure(503, _FAILED, code="engine_failed")
        if (seconds := self.loop.stepping) > self.settings.stall_seconds:
            raise Failure(503, f"the engine has not come to the end of a step for {seconds:.0f} seconds", code="engine_stalled")

    def named(self, name: str | None) -> str:
        """The name that answers give the model. Raises Failure for one that it does not have."""
        if name is None or name in self.served.names:
            return name or self.served.names[0]
        known = ", ".join(self.served.names)
        raise Failure(404, f"there is no model {name!r} here; there is {known}", param="model", code="model_not_found")

    def model(self, name: str) -> dict[str, Any]:
        """What /v1/models tells of it."""
        served = self.served
        about = {"id": name, "object": "model", "created": served.created, "owned_by": "jaxtp", "root": served.names[0]}
        return {**about, "parent": None, "max_model_len": served.engine.max_model_len}

    # -- what is asked -------------------------------------------------------------------------------------------------

    async def complete(self, body: CompletionRequest | ChatRequest, request: Request) -> Response:
        """The response to a completion or an answer in a chat."""
        name, params = self.named(body.model), params_of(body, self.served, self.settings)
        prompts = await run_in_threadpool(prompts_of, body, self.served, self.settings)
        if away := self.away():  # meanwhile
            raise away
        chat = isinstance(body, ChatRequest)
        id = f"{'chatcmpl' if chat else 'cmpl'}-{body.request_id or uuid.uuid4().hex}"
        try:
            ids = [prompt.ids for prompt in prompts]
            stream = self.loop.submit(ids, params, id=id, priority=body.priority or 0, eager=bool(body.stream))
        except QueueFull as full:
            raise Failure(429, str(full), code="queue_full", headers={"Retry-After": "1"}) from None
        except (ValueError, TypeError) as error:
            raise refused(error, body, otherwise="messages" if chat else "prompt") from None
        except EngineFailed:
            raise Failure(503, _FAILED, code="engine_failed") from None
        timer = asyncio.get_running_loop().call_later(self.settings.request_seconds, self.loop.abort, stream)

        def close() -> None:
            timer.cancel()
            self.loop.close(stream)

        kind: type[Answer] = ChatAnswer if chat else CompletionAnswer
        answer = kind(id, name, body, prompts, stream.requests, self.served.tokenizer)
        if body.stream:
            return Events(_chunks(stream, answer), close=close, seconds=self.settings.request_seconds + GRACE)
        try:
            updates = await while_there(request.receive, stream.take())
        except Gone:
            return Response(status_code=499)  # nobody reads it; the access log does
        except EngineFailed:
            raise Failure(500, _FAILED, code="engine_failed") from None
        finally:
            close()
        return Response(to_json(answer.full(updates)), media_type="application/json")

    async def tokenize(self, body: TokenizeText | TokenizeChat) -> dict[str, Any]:
        """What /tokenize answers."""
        self.named(body.model)
        return await run_in_threadpool(self._tokens, body)

    def _tokens(self, body: TokenizeText | TokenizeChat) -> dict[str, Any]:
        if isinstance(body, TokenizeChat):
            ids = chat_ids(body, self.served, self.settings, special=bool(body.add_special_tokens))
        else:
            ids = encoded(body.prompt, self.served, special=body.add_special_tokens is not False, param="prompt")
        backend = tokenizer_of(self.served, "prompt").backend
        names = [backend.id_to_token(token) for token in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": self.served.engine.max_model_len, "tokens": ids, "token_strs": names}

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        """What /detokenize answers."""
        self.named(body.model)
        tokenizer = tokenizer_of(self.served, "tokens")
        if wrong := [token for token in body.tokens if not 0 <= token < tokenizer.size]:
            said = f"tokens holds {wrong[:5]}, outside the tokenizer's {tokenizer.size}"
            raise Failure(400, said, param="tokens", code="invalid_value")
        return {"prompt": await run_in_threadpool(tokenizer.decode, body.tokens, skip_special_tokens=False)}


async def _chunks(stream: Stream, answer: Answer) -> AsyncIterator[Any]:
    """The chunks of a stream, to its end or to the engine's."""
    try:
        while not stream.ended:
            for chunk in answer.chunks(await stream.take()):
                yield chunk
        for chunk in answer.last_chunks():
            yield chunk
    except EngineFailed:
        yield form(500, _FAILED, code="engine_failed")
