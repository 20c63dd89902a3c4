"""What a request gives back, in vLLM's shape."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Logprob:
    """The log-probability of a token (natural logarithm, before any filter), its rank (1 is best), and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One completion. `finish_reason`: "stop", "length", or None while it grows.

    stop_reason: the stop string or the stop token id that ended it; None for the end-of-sequence token. logprobs: for each
    token, token id -> Logprob of the token taken and of the best alternatives.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass
class RequestOutput:
    """A prompt and its completions. `prompt` is None where token ids were given."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
