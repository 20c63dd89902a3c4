"""What /openapi.json says beside what FastAPI knows."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from jaxtp.serve.gate import WATCHED


def documented(app: FastAPI, *, keys: bool) -> None:
    """Lets the application tell of keys, of streams, and not of the 422 that it never answers."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(get_openapi(title=app.title, version=app.version, routes=app.routes), keys=keys)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _described(found: dict[str, Any], *, keys: bool) -> dict[str, Any]:
    components = found["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    for path, methods in found["paths"].items():
        for method in methods.values():
            method["responses"].pop("422", None)
            if keys and path not in WATCHED:
                method["security"] = [{"key": []}]
            if not keys:
                method["responses"].pop("401", None)
            if path.endswith("completions"):
                method["responses"]["200"]["content"]["text/event-stream"] = {}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found
