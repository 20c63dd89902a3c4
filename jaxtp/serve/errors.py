"""What goes wrong, in the one form that every route answers with: OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.responses import Response
from typing_extensions import TypedDict

from jaxtp.log import logger


class ErrorDetail(TypedDict):
    """message: for people. type: the kind. param: the field, "messages.0.role". code: what programs may look for."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """An error, as OpenAI's API says it."""

    error: ErrorDetail


class Failure(HTTPException):
    """A request that gets no answer but this."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code


_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unsupported": "unsupported_parameter",
}
MOST = 5  # mistakes of a request that are told of


def form(status: int, message: str, *, param: str | None = None, code: str | None = None) -> ErrorBody:
    """The body of an error."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    sound = message.encode("utf-8", "backslashreplace").decode()  # JSON may hold halves of surrogate pairs
    param = param and param.encode("utf-8", "backslashreplace").decode()
    return {"error": {"message": sound, "type": kind, "param": param, "code": code}}


def answer(error: HTTPException) -> Response:
    """The response of an error."""
    body = form(error.status_code, str(error.detail), param=getattr(error, "param", None), code=getattr(error, "code", None))
    return Response(to_json(body), error.status_code, error.headers, media_type="application/json")


async def on_http(request: Request, error: Exception) -> Response:
    """What FastAPI and Starlette refuse, and we: routes that there are not, methods that they do not take."""
    assert isinstance(error, HTTPException)
    if isinstance(error, Failure):
        return answer(error)
    where = f"{request.method} {request.url.path}"
    said = {
        400: "the body is not JSON that can be read",  # the detail of FastAPI's says less
        404: f"there is no {where}; /docs lists what there is",
        405: f"there is no {where}; it takes {(error.headers or {}).get('Allow', 'other methods')}",
    }
    return answer(Failure(error.status_code, said.get(error.status_code, str(error.detail)), headers=error.headers))


async def on_invalid(request: Request, error: Exception) -> Response:
    """A body of the wrong form."""
    assert isinstance(error, RequestValidationError)
    return answer(invalid(error.errors()))


async def on_crash(request: Request, error: Exception) -> Response:
    """Our own mistakes. The traceback is the server's, which logs it."""
    logger.error("%s %s failed: %r", request.method, request.url.path, error)
    return answer(Failure(500, "the server made a mistake; its log says more"))


def invalid(errors: Sequence[Mapping[str, Any]]) -> Failure:
    """What a body of the wrong form is told: all mistakes in one message, the first one's field and code."""
    told = [_told(error) for error in errors[:MOST]]
    message = "; ".join(dict.fromkeys(said for said, _, _ in told))
    more = f"; and {len(errors) - MOST} more" if len(errors) > MOST else ""
    return Failure(400, message + more, param=told[0][1], code=told[0][2])


def _told(error: Mapping[str, Any]) -> tuple[str, str | None, str]:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "json_invalid":
        return f"the body is not valid JSON: {context.get('error')} (character {error['loc'][-1]})", None, "invalid_json"
    place = [str(part) for part in error["loc"][1:] if not str(part).startswith(("(", "[key]"))]
    name = ".".join(place) or None
    if kind == "missing":
        said = f"{name} is missing" if name else "the body is missing: a JSON object is needed"
    elif kind == "extra_forbidden":
        said = f"{name} is no field of this request (/docs lists them)"
    elif kind == "unsupported":
        said = f"{name} {error['msg']}"
    else:
        rule = error["msg"].replace("Input should be", "must be").replace("Input should", "must")
        rule = rule[:1].lower() + rule[1:] if rule[:2] != rule[:2].upper() else rule
        said = f"{name or 'the body'} {rule}; given: {_short(error.get('input'))}"
    code = _CODES.get(kind, "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value")
    return said, name, code


def _short(value: Any) -> str:
    said = repr(value) if not isinstance(value, dict | list) or len(value) < 20 else f"a {type(value).__name__} of {len(value)}"
    return said if len(said) <= 60 else f"{said[:57]}..."
