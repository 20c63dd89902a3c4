"""What was asked, and what comes of it, piece by piece."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxtp.engine.outputs import CompletionOutput, Logprob
from jaxtp.engine.params import SamplingParams


class QueueFull(RuntimeError):
    """Too many requests wait already."""


@dataclass(frozen=True)
class Update:
    """What is new of one completion. The texts of a completion's updates, joined, are its text: none is taken back.

    index: which of the request's completions. text may be empty, where a character or what may be a stop string is incomplete.
    token_ids: those that are new, with the one that ended it. logprobs: one for each of them, where they were asked for.
    finish_reason: "stop", "length", "abort", or None while it grows. stop_reason: see `CompletionOutput`.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


Listener = Callable[["Request", list[Update]], None]


@dataclass(eq=False)
class Request:
    """A prompt and its `params.n` completions on their way through the engine.

    priority: lower ones first. arrived, scheduled, first_token, finished_at: `time.monotonic()` of when it came, got its first
    row, had its first token and its last. cached_tokens: of the prompt, which the prefix cache had. stream: whether somebody
    reads along. sequences: its completions, as the engine has them.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    seed: int = 0
    priority: int = 0
    stream: bool = False
    listener: Listener | None = None
    sequences: list[Any] = field(default_factory=list)
    outputs: list[CompletionOutput] = field(default_factory=list)
    arrived: float = field(default_factory=time.monotonic)
    scheduled: float | None = None
    first_token: float | None = None
    finished_at: float | None = None
    cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        """Whether all of its completions have ended."""
        return all(output.finish_reason is not None for output in self.outputs)
