"""From tokens to text, and to what a listener is told: at once, or in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from jaxtp.engine.outputs import Logprob
from jaxtp.engine.request import Request, Update
from jaxtp.engine.sequence import Sequence
from jaxtp.text import Tokenizer, find_stop, held


@dataclass(frozen=True)
class Alternatives:
    """Of a token, its log-probability and rank, and the best ones' ids and log-probabilities."""

    chosen: float
    rank: int
    ids: list[int]
    best: list[float]


@dataclass(frozen=True)
class Arrival:
    """Tokens of a sequence that came back, their alternatives where they are asked for, and whether they were the last."""

    sequence: Sequence
    tokens: list[int]
    alternatives: list[Alternatives] | None = None
    finish_reason: str | None = None


class Text:
    """A completion's text while it grows. The output is brought up to date in place."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer | None) -> None:
        request = sequence.request
        self.params, self.output = request.params, request.outputs[sequence.index]
        self._tokenizer = tokenizer
        skip = self.params.skip_special_tokens
        self._text = tokenizer.growing(request.prompt, skip_special_tokens=skip) if tokenizer else None
        self._whole = ""  # the text so far; what is shown of it may end earlier
        self._searched = self._told = self._told_tokens = 0
        self._unspelled: list[int] = []  # tokens that are not in the text yet

    def take(self, arrival: Arrival, *, show: bool) -> None:
        """Adds what arrived; what comes after a stop string is dropped.

        The text is brought up to date where it is shown, at the end, and where stop strings are looked for.
        """
        output, last = self.output, len(arrival.tokens) - 1
        for i, token in enumerate(arrival.tokens):
            output.token_ids.append(token)
            if arrival.alternatives is not None and output.logprobs is not None:
                output.logprobs.append(self._logprobs(token, arrival.alternatives[i]))
            reason = arrival.finish_reason if i == last else None
            if reason is not None:
                output.finish_reason = reason
            if reason == "stop":
                output.stop_reason = token if token in self.params.stop_token_ids else None
            if reason != "stop" or self.params.include_stop_str_in_output:
                self._unspelled.append(token)
            if self.params.stop:
                self._spell()
                self._find_stop()
                if output.finish_reason is not None:
                    break
        if last < 0:
            output.finish_reason = arrival.finish_reason
        if show or output.finish_reason is not None:
            self._spell()

    def update(self) -> Update:
        """What was not told yet."""
        output = self.output
        text, tokens = output.text[self._told :], output.token_ids[self._told_tokens :]
        logprobs = None if output.logprobs is None else output.logprobs[self._told_tokens :]
        self._told, self._told_tokens = len(output.text), len(output.token_ids)
        return Update(output.index, text, tokens, logprobs, output.finish_reason, output.stop_reason)

    def _spell(self) -> None:
        done = self.output.finish_reason is not None
        if self._text is not None and (self._unspelled or done) and self.output.stop_reason not in self.params.stop:
            self._text.add(self._unspelled, last=done)
            self._unspelled, self._whole = [], self._text.text
            self.output.text = self._whole if done else self._whole[: len(self._whole) - self._hidden()]

    def _hidden(self) -> int:
        """How much of the end is not shown yet. What is shown is never taken back: where the stop string is a part of the text,
        the text ends behind it and so behind all that was shown.
        """
        return 0 if self.params.include_stop_str_in_output else held(self._whole, self.params.stop)

    def _find_stop(self) -> None:
        output, params = self.output, self.params
        if output.finish_reason == "stop":
            return
        if len(output.token_ids) < params.min_tokens:
            self._searched = len(self._whole)  # a stop string that ends before does not count later either
            return
        found = find_stop(self._whole, params.stop, searched=self._searched)
        self._searched = len(self._whole)
        if found:
            at, stop = found
            output.text = self._whole[: at + len(stop) * params.include_stop_str_in_output]
            output.finish_reason, output.stop_reason = "stop", stop

    def _logprobs(self, token: int, found: Alternatives) -> dict[int, Logprob]:
        def entry(token: int, logprob: float, rank: int) -> Logprob:
            text = self._tokenizer.decode([token], skip_special_tokens=False) if self._tokenizer else None
            return Logprob(logprob, rank, text)

        wanted = list(zip(found.ids, found.best, strict=True))[: self.params.logprobs]
        entries = {token: entry(token, found.chosen, found.rank)}
        entries.update({i: entry(i, p, rank + 1) for rank, (i, p) in enumerate(wanted) if i != token})
        return entries


class Detokenizer:
    """Spells what arrives, tells listeners, and says which sequences a stop string has ended (`stopped`).

    Without `start` it does so at once, where `put` is called; after it, in a thread, so that no step waits for texts.
    """

    def __init__(self, tokenizer: Tokenizer | None, stopped: Callable[[Sequence], None]) -> None:
        self._tokenizer, self._stopped = tokenizer, stopped
        self._texts: dict[Sequence, Text] = {}
        self._queue: queue.SimpleQueue[list[Arrival] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.failed: BaseException | None = None

    def put(self, arrivals: list[Arrival]) -> None:
        """What came back in one step. Raises what a listener raised."""
        if self.failed:
            raise self.failed
        if self._thread is None:
            self._take(arrivals)
        else:
            self._queue.put(arrivals)

    def start(self) -> None:
        """From now on in a thread."""
        self._thread = threading.Thread(target=self._run, name="detokenizer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread once all that arrived is told."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        try:
            while (arrivals := self._queue.get()) is not None:
                self._take(arrivals)
        except BaseException as error:  # the engine's next step says it
            self.failed = error

    def _take(self, arrivals: list[Arrival]) -> None:
        told: dict[Request, list[Update]] = {}
        for arrival in arrivals:
            sequence, request = arrival.sequence, arrival.sequence.request
            if request.outputs[sequence.index].finish_reason is not None:
                continue  # a stop string ended it, and this was under way
            text = self._texts.get(sequence) or self._texts.setdefault(sequence, Text(sequence, self._tokenizer))
            text.take(arrival, show=request.stream)
            if text.output.finish_reason is not None:
                del self._texts[sequence]
                if arrival.finish_reason is None:
                    self._stopped(sequence)
            if request.listener is not None:
                told.setdefault(request, []).append(text.update())
        for request, updates in told.items():
            assert request.listener
            request.listener(request, updates)
