"""Log-probabilities in the two forms of OpenAI's API."""

from __future__ import annotations

from typing import Any

from jaxtp.engine.outputs import Logprob
from jaxtp.engine.request import Update
from jaxtp.text import Tokenizer

_LEAST = -9999.0  # JSON has no -inf; vLLM says this as well


class Offsets:
    """Where each token of a completion begins in its text. A character's tokens all begin where it does."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: list[int], *, skip_special_tokens: bool) -> None:
        self._text = tokenizer.growing(prompt, skip_special_tokens=skip_special_tokens) if tokenizer else None

    def next(self, token: int) -> int:
        """Where the next token begins."""
        if self._text is None:
            return 0
        at = len(self._text.text)
        self._text.add([token])
        return at


def of_completion(update: Update, tokenizer: Tokenizer | None, offsets: Offsets) -> dict[str, Any]:
    """The form of /v1/completions: four lists with an entry for each token."""
    tokens, each = update.token_ids, update.logprobs or []
    return {
        "tokens": [_spelled(token, tokenizer)[0] for token in tokens],
        "token_logprobs": [_finite(found[token]) for token, found in zip(tokens, each, strict=True)],
        "top_logprobs": [_by_text(found, tokenizer) for found in each],
        "text_offset": [offsets.next(token) for token in tokens],
    }


def _by_text(found: dict[int, Logprob], tokenizer: Tokenizer | None) -> dict[str, float]:
    """Text to log-probability, the likeliest token where several have the same text."""
    entries: dict[str, float] = {}
    for token, logprob in sorted(found.items(), key=lambda entry: entry[1].rank):
        entries.setdefault(_spelled(token, tokenizer)[0], _finite(logprob))
    return entries


def of_chat(update: Update, tokenizer: Tokenizer | None, best: int) -> dict[str, Any]:
    """The form of /v1/chat/completions: an entry for each token, with the `best` likeliest tokens at its place."""
    content = []
    for token, found in zip(update.token_ids, update.logprobs or [], strict=True):
        ranked = sorted(found.items(), key=lambda entry: entry[1].rank)[:best]
        top = [_entry(other, logprob, tokenizer) for other, logprob in ranked]
        content.append({**_entry(token, found[token], tokenizer), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(token: int, logprob: Logprob, tokenizer: Tokenizer | None) -> dict[str, Any]:
    text, spelling = _spelled(token, tokenizer)
    return {"token": text, "logprob": _finite(logprob), "bytes": list(spelling)}


def _spelled(token: int, tokenizer: Tokenizer | None) -> tuple[str, bytes]:
    """A token's text, and its bytes, which may be a part of a character."""
    if tokenizer is None:
        return f"token_id:{token}", b""
    spelling = tokenizer.spelled(token)
    return spelling.decode(errors="replace"), spelling


def _finite(logprob: Logprob) -> float:
    return max(_LEAST, logprob.logprob)
