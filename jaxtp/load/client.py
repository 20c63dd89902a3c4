"""One streaming request to an OpenAI-compatible server, with the time of every token."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from jaxtp.load.prompts import Prompt

SAID = 300  # characters of a server's message that are kept
KEPT = 3  # seconds that an idle connection is used again: less than any server keeps it
GARBAGE = "no chunk of a stream"


@dataclass
class Answer:
    """How a request fared. Times are of time.perf_counter(); output_tokens is the server's count, else that of its chunks.

    error: its kind, None for a request that completed; message: what was said with it.
    """

    start: float
    first: float | None = None
    end: float | None = None
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int = 0
    counted: bool = False  # by the server
    error: str | None = None
    message: str = ""


class _Failed(Exception):
    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Endpoint:
    """A server (http://host:port, with or without /v1), the model that is asked, and how. timeout: seconds a request."""

    url: str
    model: str | None = None
    api_key: str | None = None
    chat: bool = False
    ignore_eos: bool = False
    temperature: float = 0.0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"{self.url} is no address of a server; such as http://localhost:8000")

    def route(self, name: str) -> str:
        """The address of /v1/`name`."""
        return f"{self.url.rstrip('/').removesuffix('/v1')}/v1/{name}"

    def session(self) -> aiohttp.ClientSession:
        """What requests go through; as many at once as are asked."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        timeout = aiohttp.ClientTimeout(total=self.timeout)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT)
        return aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout)

    async def first_model(self, session: aiohttp.ClientSession) -> str:
        """The first one of the server's list. Raises ConnectionError where there is no server, ValueError where it has none."""
        where = self.route("models")
        try:
            async with session.get(where) as response:
                content = await response.read()
                if response.status != 200:
                    raise ValueError(f"{where} answers {response.status}: {_said(content)}; --model names the model without it")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ConnectionError(f"there is no server at {self.url}: {_one_line(error)}") from None
        try:
            return str(json.loads(content)["data"][0]["id"])
        except (ValueError, TypeError, LookupError):
            raise ValueError(f"{where} lists no model; --model names it") from None

    def body(self, prompt: Prompt, model: str) -> dict[str, Any]:
        """The request."""
        asked = {"messages": [{"role": "user", "content": prompt.content}]} if self.chat else {"prompt": prompt.content}
        return {
            "model": model,
            **asked,
            "max_tokens": prompt.output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.ignore_eos else {}),
        }

    async def ask(self, session: aiohttp.ClientSession, prompt: Prompt, model: str) -> Answer:
        """Sends a prompt and reads the stream to its end. Whatever goes wrong is the answer's error."""
        body = json.dumps(self.body(prompt, model)).encode()
        headers = {"Content-Type": "application/json"}
        where = self.route("chat/completions" if self.chat else "completions")
        answer = Answer(start=time.perf_counter(), prompt_tokens=prompt.tokens)
        try:
            async with session.post(where, data=body, headers=headers) as response:
                if response.status != 200:
                    raise _Failed(f"status {response.status}", _said(await response.read()))
                await _read(response, answer)
        except _Failed as error:
            answer.error, answer.message = error.kind, str(error)
        except (AttributeError, TypeError) as error:  # something that is no object where one belongs
            answer.error, answer.message = GARBAGE, _one_line(error)
        except TimeoutError:
            answer.error, answer.message = "timeout", f"no end after {self.timeout:g} s"
        except aiohttp.ClientConnectorError as error:
            answer.error, answer.message = "no connection", _one_line(error)
        except (aiohttp.ClientError, OSError) as error:
            answer.error, answer.message = "connection lost", _one_line(error)
        if answer.end is None or answer.error:
            answer.end = time.perf_counter()
        return answer


async def _read(response: aiohttp.ClientResponse, answer: Answer) -> None:
    """Notes every chunk that holds something new; the last one that has choices ends the request."""
    ended, chunks = False, 0
    async for now, event in _events(response):
        if event == "[DONE]":
            ended = True
            continue
        chunk = _chunk(event)
        if usage := chunk.get("usage"):
            answer.output_tokens, answer.counted = usage.get("completion_tokens") or 0, True
            answer.prompt_tokens = usage.get("prompt_tokens", answer.prompt_tokens)
        for choice in chunk.get("choices") or []:
            ended = ended or choice.get("finish_reason") is not None
            if _grows(choice):
                if answer.first is None:
                    answer.first = now
                else:
                    answer.gaps.append(now - (answer.end or now))
                chunks += 1
            answer.end = now
    if not ended:
        raise _Failed("stream cut short", f"the stream ended after {chunks} chunks, without a finish_reason")
    if answer.first is None:
        raise _Failed("no tokens", "the stream ended without a token")
    answer.output_tokens = answer.output_tokens if answer.counted else chunks


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[float, str]]:
    """(when it came, content) of the data lines of a stream of events."""
    kept = b""
    async for data in response.content.iter_any():
        now = time.perf_counter()
        *lines, kept = (kept + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield now, line[5:].strip().decode("utf-8", "replace")
    if kept.strip():
        yield time.perf_counter(), kept.decode("utf-8", "replace").removeprefix("data:").strip()


def _chunk(event: str) -> dict[str, Any]:
    try:
        chunk = json.loads(event)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise _Failed(GARBAGE, event[:SAID])
    if error := chunk.get("error"):
        raise _Failed("error in the stream", str(error.get("message", error) if isinstance(error, dict) else error)[:SAID])
    return chunk


def _grows(choice: dict[str, Any]) -> bool:
    """Whether a chunk holds a token, be it one that is no text yet. Not the role that begins a message, nor a bare end."""
    delta = choice.get("delta") or {}
    if choice.get("text") or any(delta.get(name) for name in ("content", "reasoning", "reasoning_content")):
        return True
    return choice.get("finish_reason") is None and "role" not in delta


def _said(content: bytes) -> str:
    """The message in the body of an error."""
    text = content.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        found = found.get("error", found.get("detail", text))
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:SAID] or "nothing more"


def _one_line(error: BaseException) -> str:
    said = error.os_error.strerror if isinstance(error, aiohttp.ClientConnectorError) else str(error)
    return " ".join(str(said).split())[:SAID] or type(error).__name__
