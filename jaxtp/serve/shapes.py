"""The shapes of answers, as /openapi.json tells them."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from jaxtp.serve.errors import ErrorBody

Reason = Literal["stop", "length", "abort"]


class CachedTokens(TypedDict):
    """Tokens of the prompt that need not be read again."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(TypedDict):
    """An entry for each token in each."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Reason
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class Completion(TypedDict):
    """The answer of /v1/completions; a stream's chunks are alike, and their usage is null or left out."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(TypedDict):
    """A token that could stand there."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that stands there."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """An entry for each token."""

    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(TypedDict):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]


class ChatCompletion(TypedDict):
    """The answer of /v1/chat/completions; a stream's chunks have a `delta` in place of the message."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: NotRequired[list[int]]


class Model(TypedDict):
    """A name that the model has here."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class Models(TypedDict):
    """All of its names."""

    object: Literal["list"]
    data: list[Model]


class Tokens(TypedDict):
    """The answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(TypedDict):
    """The answer of /detokenize."""

    prompt: str


class Version(TypedDict):
    """The answer of /version."""

    version: str


class Status(TypedDict):
    """The answer of /health and /ready."""

    status: Literal["ok"]


class Load(TypedDict):
    """The answer of /load."""

    server_load: int


_SAID = {
    400: "A field is unknown, of the wrong type, out of range, or not supported.",
    401: "No key that is known.",
    404: "No such route or model.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "Too many requests wait.",
    500: "The engine or the server has failed.",
    503: "The server goes down, or the engine has failed.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route may answer beside 200."""
    return {status: {"model": ErrorBody, "description": _SAID[status]} for status in statuses}
