"""One completion while it is made, on the host: its tokens, its text, and whether it has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxtp.engine.outputs import CompletionOutput, Logprob
from jaxtp.engine.params import SamplingParams
from jaxtp.ops.sampling import Logprobs
from jaxtp.text import Tokenizer, find_stop, held


class Row:
    """The row of a batch that holds sample `index` of a prompt."""

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        index: int,
        seed: int,
        limit: int,
        eos: Sequence[int],
        tokenizer: Tokenizer | None,
    ) -> None:
        """`limit` is the most tokens that prompt and completion may have together."""
        self.prompt, self.params, self.seed = prompt, params, seed
        room = limit - len(prompt)
        self.max_tokens = room if params.max_tokens is None else min(room, params.max_tokens)
        self.stop_ids = (*(() if params.ignore_eos else eos), *params.stop_token_ids)
        self.output = CompletionOutput(index, "", [], logprobs=None if params.logprobs is None else [])
        self._tokenizer = tokenizer
        self._text = tokenizer.growing(prompt, skip_special_tokens=params.skip_special_tokens) if tokenizer else None
        self._whole = ""  # the text so far; what is shown of it may end earlier
        self._searched = 0
        self._unspelled: list[int] = []  # tokens that are not in the text yet

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.output.finish_reason is not None

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt) + len(self.output.token_ids)

    def take(self, tokens: Sequence[int], logprobs: Callable[[int], Logprobs] | None, *, show: bool) -> None:
        """Adds what a call made for this row; -1 and whatever comes after the end is dropped.

        The text is brought up to date where it is shown, at the end, and where stop strings are looked for.
        """
        for i, token in enumerate(tokens):
            if token < 0 or self.finished:
                break
            self.output.token_ids.append(token)
            if logprobs is not None and self.output.logprobs is not None:
                self.output.logprobs.append(self._logprobs(token, logprobs(i)))
            self._advance(token)
            if self.params.stop:
                self._spell()
                self._find_stop()
        if show or self.finished:
            self._spell()

    def _advance(self, token: int) -> None:
        output, made = self.output, len(self.output.token_ids)
        stopped = token in self.stop_ids and made >= self.params.min_tokens
        if stopped:
            output.finish_reason = "stop"
            output.stop_reason = token if token in self.params.stop_token_ids else None
        elif made >= self.max_tokens:
            output.finish_reason = "length"
        if not stopped or self.params.include_stop_str_in_output:
            self._unspelled.append(token)

    def _spell(self) -> None:
        if self._text is not None and (self._unspelled or self.finished) and self.output.stop_reason not in self.params.stop:
            self._text.add(self._unspelled, last=self.finished)
            self._unspelled, self._whole = [], self._text.text
            self.output.text = self._whole if self.finished else self._whole[: len(self._whole) - self._hidden()]

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

    def _logprobs(self, token: int, found: Logprobs) -> dict[int, Logprob]:
        def entry(token: int, logprob: float, rank: int) -> Logprob:
            text = self._tokenizer.decode([token], skip_special_tokens=False) if self._tokenizer else None
            return Logprob(float(logprob), int(rank), text)

        best = zip(np.asarray(found.ids).tolist(), np.asarray(found.best).tolist(), strict=True)
        wanted = [(i, p) for i, p in best][: self.params.logprobs]
        entries = {token: entry(token, float(found.chosen), int(found.rank))}
        entries.update({i: entry(i, p, rank + 1) for rank, (i, p) in enumerate(wanted) if i != token})
        return entries
