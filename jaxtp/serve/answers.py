"""Answers made of the engine's updates: whole ones, and the chunks of a stream."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from jaxtp.engine.request import Request, Update
from jaxtp.serve.logprobs import Offsets, of_chat, of_completion
from jaxtp.serve.prompts import Asked
from jaxtp.serve.protocol import ChatRequest, CompletionRequest
from jaxtp.serve.stream import Place
from jaxtp.text import Tokenizer

Json = dict[str, Any]


class Answer:
    """The answer to one request. n: completions of each prompt; their numbers go through the prompts."""

    whole: ClassVar[str]
    part: ClassVar[str]

    def __init__(
        self,
        id: str,
        model: str,
        body: CompletionRequest | ChatRequest,
        prompts: Sequence[Asked],
        requests: Sequence[Request],
        tokenizer: Tokenizer | None,
    ) -> None:
        self.id, self.model, self.created = id, model, int(time.time())
        self._prompts, self._requests, self._tokenizer = prompts, requests, tokenizer
        self._n = body.n or 1
        self._ids = bool(body.return_token_ids)
        self._shows_tokens = self._ids or body.wanted_logprobs is not None
        self._ends_with_usage, self._tells_usage = body.usage
        self._made: dict[Place, int] = {}

    def full(self, updates: Iterable[tuple[Place, Update]]) -> Json:
        """All of it at once."""
        choices = []
        for place, update in sorted(updates, key=lambda one: one[0]):
            self._count(place, update)
            choices.append(self._choice(place, update, self._text_and_logprobs(place, update, first=True, whole=True)))
        return {**self._envelope(self.whole, choices), "usage": self.usage()}

    def chunks(self, updates: Iterable[tuple[Place, Update]]) -> Iterable[Json]:
        """Chunks of what is new."""
        for place, update in updates:
            first = place not in self._made
            self._count(place, update)
            if first:
                yield from self._opening(place)
            if update.text or update.finish_reason or (self._shows_tokens and update.token_ids) or (first and self._echoes):
                yield self._chunk(place, update, self._text_and_logprobs(place, update, first=first, whole=False), first=first)

    def last_chunks(self) -> Iterable[Json]:
        """What stands at the end of a stream."""
        if self._ends_with_usage:
            yield {**self._envelope(self.part, []), "usage": self.usage()}

    def usage(self) -> Json:
        """The tokens that were read and made."""
        read, made = sum(len(prompt.ids) for prompt in self._prompts), sum(self._made.values())
        cached = sum(request.cached_tokens for request in self._requests)
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    # -- what the two APIs differ in -----------------------------------------------------------------------------------

    _echoes = False
    _many = False  # whether there may be several prompts, so that each choice says which was its

    def _opening(self, place: Place) -> Iterable[Json]:
        """Chunks before the first of a completion."""
        return ()

    @abstractmethod
    def _text_and_logprobs(self, place: Place, update: Update, *, first: bool, whole: bool) -> Json:
        """The fields of a choice that hold what is new."""

    # -- what they share -----------------------------------------------------------------------------------------------

    def _count(self, place: Place, update: Update) -> None:
        self._made[place] = self._made.get(place, 0) + len(update.token_ids)

    def _choice(self, place: Place, update: Update | None, said: Json, *, first: bool = True) -> Json:
        choice = {
            "index": place[0] * self._n + place[1],
            **said,
            "finish_reason": update and update.finish_reason,
            "stop_reason": update and update.stop_reason,
        }
        if self._ids and update is not None:
            choice["token_ids"] = update.token_ids
            if first and self._many:
                choice["prompt_token_ids"] = self._prompts[place[0]].ids
        return choice

    def _chunk(self, place: Place, update: Update | None, said: Json, *, first: bool) -> Json:
        chunk = self._envelope(self.part, [self._choice(place, update, said, first=first)])
        if self._ends_with_usage:
            chunk["usage"] = self.usage() if self._tells_usage else None
        return chunk

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


class CompletionAnswer(Answer):
    """That of /v1/completions."""

    whole = part = "text_completion"
    _many = True

    def __init__(self, id: str, model: str, body: CompletionRequest, *rest: Any) -> None:
        super().__init__(id, model, body, *rest)
        self._echoes, self._skip = bool(body.echo), body.skip_special_tokens is not False
        self._offsets: dict[Place, Offsets] = {}

    def _text_and_logprobs(self, place: Place, update: Update, *, first: bool, whole: bool) -> Json:
        prompt = self._prompts[place[0]]
        logprobs = None
        if update.logprobs is not None:
            if place not in self._offsets:
                self._offsets[place] = Offsets(self._tokenizer, prompt.ids, skip_special_tokens=self._skip)
            logprobs = of_completion(update, self._tokenizer, self._offsets[place])
        return {"text": prompt.echo + update.text if first else update.text, "logprobs": logprobs}


class ChatAnswer(Answer):
    """That of /v1/chat/completions."""

    whole, part = "chat.completion", "chat.completion.chunk"

    def __init__(self, id: str, model: str, body: ChatRequest, *rest: Any) -> None:
        super().__init__(id, model, body, *rest)
        self._best = body.wanted_logprobs or 0

    def full(self, updates: Iterable[tuple[Place, Update]]) -> Json:
        """All of it at once."""
        return {**super().full(updates), **self._prompt()}

    def _opening(self, place: Place) -> Iterable[Json]:
        said = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
        yield {**self._chunk(place, None, said, first=True), **self._prompt()}

    def _prompt(self) -> Json:
        return {"prompt_token_ids": self._prompts[0].ids} if self._ids else {}

    def _text_and_logprobs(self, place: Place, update: Update, *, first: bool, whole: bool) -> Json:
        logprobs = None if update.logprobs is None else of_chat(update, self._tokenizer, self._best)
        if whole:
            return {"message": {"role": "assistant", "content": update.text, "refusal": None}, "logprobs": logprobs}
        return {"delta": {"content": update.text} if update.text else {}, "logprobs": logprobs}
