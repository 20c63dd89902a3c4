"""Completions as the command prints and writes them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtp import CompletionOutput, Logprob, RequestOutput


def printed(requests: Iterable[RequestOutput]) -> str:
    """Prompts with their completions, one below another; each with the table of its logprobs, where they were asked for."""
    shown = [
        f"{request.prompt or ''}{output.text}" + ("" if output.logprobs is None else f"\n\n{logprobs_table(output)}")
        for request in requests
        for output in request.outputs
    ]
    return "\n\n".join(shown)


def logprobs_table(output: CompletionOutput) -> str:
    """A line for each token: itself, its log-probability and rank, and the alternatives with theirs, the likeliest first."""
    rows = [("token", "logprob", "rank", "alternatives")]
    for token, found in zip(output.token_ids, output.logprobs or [], strict=False):
        others = sorted(((i, p) for i, p in found.items() if i != token), key=lambda other: other[1].rank)
        told = "  ".join(f"{_text(i, p)} {p.logprob:.3f}" for i, p in others)
        rows.append((_text(token, found[token]), f"{found[token].logprob:.3f}", str(found[token].rank), told))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows)


def jsonl(requests: Iterable[RequestOutput]) -> str:
    """A line of JSON for each request."""
    return "".join(
        json.dumps(
            {
                "prompt": request.prompt,
                "prompt_token_ids": request.prompt_token_ids,
                "outputs": [dataclasses.asdict(output) for output in request.outputs],
            },
            ensure_ascii=False,
        )
        + "\n"
        for request in requests
    )


def print_stream(stream: Iterator[RequestOutput]) -> str:
    """Prints the completion of one prompt as it grows, then its logprobs where they were asked for, and returns it."""
    shown, output = 0, None
    for request in stream:
        output = request.outputs[0]
        whole = f"{request.prompt or ''}{output.text}"
        sys.stdout.write(whole[shown:])
        sys.stdout.flush()
        shown = len(whole)
    sys.stdout.write("\n")
    if output is not None and output.logprobs is not None:
        sys.stdout.write(f"\n{logprobs_table(output)}\n")
    return "" if output is None else output.text


def _text(token: int, found: Logprob) -> str:
    return str(token) if found.decoded_token is None else repr(found.decoded_token)
