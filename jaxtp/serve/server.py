"""The routes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse
from fastapi.routing import APIRoute, APIRouter
from starlette.exceptions import HTTPException

from jaxtp.log import version
from jaxtp.serve import shapes
from jaxtp.serve.errors import Failure, on_crash, on_http, on_invalid
from jaxtp.serve.gate import Gate
from jaxtp.serve.openapi import documented
from jaxtp.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from jaxtp.serve.served import Served
from jaxtp.serve.service import Service
from jaxtp.serve.settings import Settings

PAGE = Path(__file__).with_name("page.html")
VERSION = version()
_ASKED = shapes.errors(400, 401, 404, 413, 415, 503)
_MADE = {**_ASKED, **shapes.errors(429, 500)}
_KEPT = shapes.errors(401, 503)


class JsonRoute(APIRoute):
    """A route whose bodies are JSON and nothing else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, behind a look at the content type."""
        handler = super().get_route_handler()

        async def checked(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if self.body_field is not None and kind != "application/json":
                said = f"the content type is {kind or 'not said'}; it must be application/json"
                raise Failure(415, said, code="unsupported_media_type")
            return await handler(request)

        return checked


def application(served: Served, settings: Settings) -> FastAPI:
    """The ASGI application. Its engine runs from its start-up to its end; `app.state.service` has it."""
    service = Service(served, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(title="jaxtp", version=VERSION, lifespan=lifespan, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    for kind, handler in ((HTTPException, on_http), (RequestValidationError, on_invalid), (Exception, on_crash)):
        app.add_exception_handler(kind, handler)
    app.add_middleware(Gate, settings=settings, away=service.away)
    if settings.allowed_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.allowed_origins, allow_methods=["*"], allow_headers=["*"])
    app.include_router(_api(service))
    app.include_router(_watch(service))
    documented(app, keys=bool(settings.api_key))
    return app


def _api(service: Service) -> APIRouter:
    """What clients ask."""
    api = APIRouter(route_class=JsonRoute)

    @api.post("/v1/completions", response_model=shapes.Completion, responses=_MADE)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Completes prompts."""
        return await service.complete(body, request)

    @api.post("/v1/chat/completions", response_model=shapes.ChatCompletion, responses=_MADE)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answers in a conversation."""
        return await service.complete(body, request)

    @api.post("/tokenize", response_model=shapes.Tokens, responses=_ASKED)
    async def tokenize(body: TokenizeRequest) -> Response:
        """The token ids of a text or a conversation."""
        return JSONResponse(await service.tokenize(body))

    @api.post("/detokenize", response_model=shapes.Text, responses=_ASKED)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        return JSONResponse(await service.detokenize(body))

    @api.get("/v1/models", response_model=shapes.Models, responses=_KEPT)
    async def models() -> Response:
        """The names of the model."""
        return JSONResponse({"object": "list", "data": [service.model(name) for name in service.served.names]})

    @api.get("/v1/models/{name:path}", response_model=shapes.Model, responses={**_KEPT, **shapes.errors(404)})
    async def model(name: str) -> Response:
        """One of them."""
        return JSONResponse(service.model(service.named(name)))

    @api.get("/version", response_model=shapes.Version, responses=_KEPT)
    async def version() -> Response:
        """The version of jaxtp."""
        return JSONResponse({"version": VERSION})

    @api.get("/load", response_model=shapes.Load, responses=_KEPT)
    async def load() -> Response:
        """How many requests are being answered."""
        return JSONResponse({"server_load": len(service.loop.open)})

    return api


def _watch(service: Service) -> APIRouter:
    """What those ask who watch over the server."""
    watch = APIRouter()

    @watch.get("/ping", response_model=shapes.Status, responses=shapes.errors(503))
    @watch.get("/health", response_model=shapes.Status, responses=shapes.errors(503))
    async def health() -> Response:
        """Whether the engine lives, and steps where there is work."""
        service.check_health()
        return JSONResponse({"status": "ok"})

    @watch.get("/ready", response_model=shapes.Status, responses=shapes.errors(503))
    async def ready() -> Response:
        """Whether requests are taken."""
        service.check_health()
        if away := service.away():
            raise away
        return JSONResponse({"status": "ok"})

    @watch.get("/metrics", responses={200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}})
    async def metrics(request: Request) -> Response:
        """For Prometheus."""
        text, kind = service.metrics.text(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": kind})

    @watch.get("/", include_in_schema=False)
    async def page() -> Response:
        """A page to chat with."""
        return FileResponse(PAGE, media_type="text/html")

    return watch
