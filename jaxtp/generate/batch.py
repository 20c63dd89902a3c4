"""A batch on its way through the device: from the host's rows to arrays and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxtp.generate import buckets
from jaxtp.generate.programs import Programs
from jaxtp.generate.request import Row
from jaxtp.generate.step import CALL_TOKENS, Made, State, begin, decode, empty, prefill
from jaxtp.model import Cache, Llama
from jaxtp.ops.sampling import Counts, Features, Logprobs, Rows
from jaxtp.sharding import fetch, put

STOP_STRING_STEPS = 8  # the host looks for stop strings this often


class Batch:
    """Rows that run together from their prompts to their ends."""

    def __init__(self, model: Llama, programs: Programs, rows: Sequence[Row], *, chunk_tokens: int) -> None:
        """`chunk_tokens`: the most tokens, over all rows, that one prefill call takes."""
        self.model, self.programs, self.rows = model, programs, rows
        self.size = buckets.rows(len(rows), dp=model.layout.parts("batch"))
        self.features = features(rows)
        self.longest = max(len(row.prompt) for row in rows)
        self.total = max(len(row.prompt) + row.max_tokens for row in rows)
        self.chunks = buckets.chunks(self.longest, largest=chunk_size(self.size, chunk_tokens))
        start, tokens = self.chunks[-1]
        self.slots = buckets.slots(start + tokens, max(self.total, start + tokens))

    def run(self, *, steps: int = CALL_TOKENS, show: bool = False) -> Iterator[None]:
        """Generates until every row has ended; yields whenever the rows have new tokens."""
        state, made = self.begin()
        self._take(made, show)
        yield
        while not all(row.finished for row in self.rows):
            open_rows = [row for row in self.rows if not row.finished]
            room = state.cache.slots - max(row.length for row in open_rows) + 1  # the newest token is not in the cache yet
            if room == 0:
                state = self.grow(state)
                continue
            wanted = min(steps, room, max(row.max_tokens - len(row.output.token_ids) for row in open_rows))
            if any(row.params.stop for row in open_rows):
                wanted = min(wanted, STOP_STRING_STEPS)
            state, made = self.decode(state, wanted)
            self._take(made, show)
            yield

    def warm_up(self) -> None:
        """Compiles what `run` calls, by one step with every size of the cache on the way."""
        state, _ = self.begin()
        while True:
            state, _ = self.decode(state, 1)
            if state.cache.slots >= self.total - 1:
                return
            state = self.grow(state)

    def grow(self, state: State) -> State:
        """The state with the next larger cache."""
        self.slots = buckets.slots(state.cache.slots, self.total)
        return replace(state, cache=state.cache.grown(self.slots))

    def begin(self) -> tuple[State, Made]:
        """Prefills the prompts and samples the first tokens."""
        model, run = self.model, self.programs.run
        cache = self._cache()
        last = self._put(np.zeros((self.size, model.config.hidden_size), model.layout.dtype), "batch", None)
        for start, tokens in self.chunks:
            cache, last = run(prefill, cache, last, self._tokens(start, tokens), np.int32(start), donate=(0, 1))
        state = self._state(cache)
        return run(begin, last, state, donate=(1,), features=self.features)

    def decode(self, state: State, steps: int) -> tuple[State, Made]:
        """Up to `steps` more tokens for the rows that are still open; the state is donated."""
        stop = self._row_array(lambda row: row.finished, True, np.bool_)
        return self.programs.run(decode, state, stop, np.int32(steps), donate=(0,), features=self.features)

    # -- to the device -------------------------------------------------------------------------------------------------

    def _put(self, array: np.ndarray, *dims: str | None) -> jax.Array:
        return put(array, self.model.layout.sharding(*dims))

    def _row_array(self, value: Callable[[Row], object], fill: object, dtype: type) -> jax.Array:
        values = [value(row) for row in self.rows] + [fill] * (self.size - len(self.rows))
        return self._put(np.array(values, dtype), "batch")

    def _padded(self, lists: Sequence[Sequence[float]], fill: float, dtype: type, *, width: int = 1) -> jax.Array:
        """[B, N] from a list for each row, N a power of two."""
        longest = max([width, *map(len, lists)])
        out: Any = np.full((self.size, 1 << (longest - 1).bit_length()), fill, dtype)
        for i, values in enumerate(lists):
            out[i, : len(values)] = values
        return self._put(out, "batch", None)

    def _cache(self) -> Cache:
        cache = self.programs.run(empty, batch=self.size, slots=self.slots)
        return replace(cache, lengths=self._row_array(lambda row: len(row.prompt), 1, np.int32))

    def _tokens(self, start: int, count: int) -> jax.Array:
        out = np.zeros((self.size, count), np.int32)
        for i, row in enumerate(self.rows):
            part = row.prompt[start : start + count]
            out[i, : len(part)] = part
        return self._put(out, "batch", "tokens")

    def _state(self, cache: Cache) -> State:
        array = self._row_array

        def floats(name: str, off: float) -> jax.Array:
            return array(lambda row: getattr(row.params, name), off, np.float32)

        seeds = np.zeros((self.size, 2), np.uint32)
        seeds[: len(self.rows)] = [(row.seed, row.output.index) for row in self.rows]
        biases = [row.params.logit_bias for row in self.rows]
        rows = Rows(
            temperature=floats("temperature", 0.0),
            top_k=array(lambda row: max(row.params.top_k, 0), 0, np.int32),
            top_p=floats("top_p", 1.0),
            min_p=floats("min_p", 0.0),
            repetition=floats("repetition_penalty", 1.0),
            presence=floats("presence_penalty", 0.0),
            frequency=floats("frequency_penalty", 0.0),
            seed=self._put(seeds, "batch", None),
            bias_ids=self._padded([list(b) for b in biases], -1, np.int32),
            bias=self._padded([list(b.values()) for b in biases], 0.0, np.float32),
            stop_ids=self._padded([row.stop_ids for row in self.rows], -1, np.int32, width=4),
            min_tokens=array(lambda row: row.params.min_tokens, 0, np.int32),
            max_tokens=array(lambda row: row.max_tokens, 1, np.int32),
        )
        zero = array(lambda row: 0, 0, np.int32)
        return State(cache, zero, zero + 0, array(lambda row: False, True, np.bool_), rows, self._counts())

    def _counts(self) -> Counts | None:
        if not self.features.penalties:
            return None
        layout = self.model.layout.at("head")
        seen = np.zeros((self.size, self.model.vocab_held), np.bool_)
        for i, row in enumerate(self.rows):
            seen[i, row.prompt] = True
        sharding = layout.sharding("batch", "logits")
        return Counts(put(seen, sharding), put(np.zeros(seen.shape, np.int32), sharding))

    # -- and back ------------------------------------------------------------------------------------------------------

    def _take(self, made: Made, show: bool) -> None:
        tokens = fetch(made.tokens)[:, : int(made.count)].tolist()
        logprobs = jax.tree.map(fetch, made.logprobs)
        for i, row in enumerate(self.rows):
            found = None if logprobs is None else lambda at, i=i: Logprobs(*(a[i, at] for a in jax.tree.leaves(logprobs)))
            row.take(tokens[i], found, show=show)


def features(rows: Sequence[Row]) -> Features:
    """What the rows ask of the sampler."""
    params = [row.params for row in rows]
    hot = [p for p in params if p.temperature > 0]
    logprobs = [p.logprobs for p in params if p.logprobs is not None]
    return Features(
        random=bool(hot),
        min_p=any(p.min_p > 0 for p in hot),
        truncate=any(p.top_k > 0 or p.top_p < 1 for p in hot),
        penalties=any(p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty for p in params),
        bias=any(p.logit_bias for p in params),
        min_tokens=any(p.min_tokens for p in params),
        logprobs=max(logprobs, default=None),
    )


def chunk_size(rows: int, chunk_tokens: int) -> int:
    """Prompt tokens of each row in one prefill call: a power of two, so that all chunks but the last are alike."""
    each = max(chunk_tokens // rows, buckets.MIN_TOKENS)
    return 1 << (each.bit_length() - 1)
