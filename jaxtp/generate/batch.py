"""A batch on its way through the device: from the host's rows to arrays and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxtp import buckets
from jaxtp.engine.programs import Programs
from jaxtp.generate.request import Row
from jaxtp.generate.step import CALL_TOKENS, Group, Made, State, begin, decode, empty, nothing, prefill
from jaxtp.model import Cache, Llama
from jaxtp.ops.sampling import Counts, Features, Logprobs, Rows
from jaxtp.parallel.circulate import drain, prefill_ticks
from jaxtp.parallel.schedules import Circulation
from jaxtp.sharding import fetch, put

STOP_STRING_STEPS = 8  # the host looks for stop strings this often


class Batch:
    """Rows that run together from their prompts to their ends; where the model's layers stand in stages, in groups."""

    def __init__(self, model: Llama, programs: Programs, rows: Sequence[Row], *, chunk_tokens: int) -> None:
        """`chunk_tokens`: the most tokens, over all rows, that one prefill call takes."""
        self.model, self.programs, self.rows = model, programs, rows
        self.size, self.groups = batch_size(model, len(rows))
        self.features = features(rows)
        self.total = max(len(row.prompt) + row.max_tokens for row in rows)
        # of a row's tokens the newest needs no slot yet; where groups circulate, it is on its way into one
        self.outside = 0 if model.stacks else 1
        self.chunks = chunks(model, rows, chunk_tokens)
        filled = sum(self.chunks[-1])
        self.slots = buckets.slots(filled, max(self.total, filled))

    def run(self, *, steps: int = CALL_TOKENS, show: bool = False) -> Iterator[None]:
        """Generates until every row has ended; yields whenever the rows have new tokens."""
        state, made = self.begin()
        self._take(made, show)
        yield
        while not all(row.finished for row in self.rows):
            open_rows = [row for row in self.rows if not row.finished]
            room = state.cache.slots - max(row.length for row in open_rows) + self.outside
            wanted = min(steps, room, max(row.max_tokens - len(row.output.token_ids) for row in open_rows))
            if wanted == 0:
                state = self.grow(state)
                continue
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
            if state.cache.slots >= self.total - self.outside:
                return
            state = self.grow(state)

    def grow(self, state: State) -> State:
        """The state with the next larger cache."""
        self.slots = buckets.slots(state.cache.slots, self.total)
        return replace(state, cache=state.cache.grown(self.slots))

    def begin(self) -> tuple[State, Made]:
        """Prefills the prompts and samples the first tokens."""
        cache = self._cache()
        shape = (self.size // self.groups, self.model.config.hidden_size)
        last = tuple(self._put(np.zeros(shape, self.model.layout.dtype), "batch", None) for _ in range(self.groups))
        cache, last = (self._prefill_stages if self.model.stacks else self._prefill)(cache, last)
        return self.programs.run(begin, last, self._state(cache), donate=(1,), features=self.features)

    def _prefill(self, cache: Cache, last: tuple[jax.Array, ...]) -> tuple[Cache, tuple[jax.Array, ...]]:
        for start, tokens in self.chunks:
            (ids,) = self._tokens(start, tokens)
            cache, *last = self.programs.run(prefill, cache, *last, ids, np.int32(start), donate=(0, 1))
        return cache, tuple(last)

    def _prefill_stages(self, cache: Cache, last: tuple[jax.Array, ...]) -> tuple[Cache, tuple[jax.Array, ...]]:
        """One chunk of each group behind another, and then the last ones through."""
        run, (_, tokens), turns = self.programs.run, self.chunks[0], len(self.chunks)
        between = run(nothing, rows=self.size // self.groups, tokens=tokens)
        for turn in range(turns + drain(self.model.stages, self.groups)):
            cache = replace(cache, fresh=turn == 0 or turns == 1)  # all that is there are first chunks
            ids = self._tokens(turn * tokens, tokens)
            args = cache, last, between, ids, np.int32(turn), np.int32(turns)
            cache, last, between = run(prefill_ticks, *args, donate=(0, 1, 2))
        return cache, last

    def decode(self, state: State, steps: int) -> tuple[State, Made]:
        """Up to `steps` more tokens for the rows that are still open; the state is donated."""
        stop = self._row_arrays(lambda row: row.finished, True, np.bool_)
        return self.programs.run(decode, state, stop, np.int32(steps), donate=(0,), features=self.features)

    # -- to the device -------------------------------------------------------------------------------------------------

    def _put(self, array: np.ndarray, *dims: str | None) -> jax.Array:
        return put(array, self.model.layout.sharding(*dims))

    def _parted(self, array: np.ndarray, *dims: str | None) -> tuple[jax.Array, ...]:
        """[B, ...] of all rows: that of each group."""
        return tuple(self._put(part, "batch", *dims) for part in np.split(array, self.groups))

    def _row_arrays(self, value: Callable[[Row], object], fill: object, dtype: type) -> tuple[jax.Array, ...]:
        return self._parted(self._by_row(value, fill, dtype))

    def _by_row(self, value: Callable[[Row], object], fill: object, dtype: type) -> np.ndarray:
        return np.array([value(row) for row in self.rows] + [fill] * (self.size - len(self.rows)), dtype)

    def _padded(self, lists: Sequence[Sequence[float]], fill: float, dtype: type, *, width: int = 1) -> tuple[jax.Array, ...]:
        """[B, N] from a list for each row, N a power of two."""
        longest = max([width, *map(len, lists)])
        out: Any = np.full((self.size, 1 << (longest - 1).bit_length()), fill, dtype)
        for i, values in enumerate(lists):
            out[i, : len(values)] = values
        return self._parted(out, None)

    def _cache(self) -> Cache:
        cache = self.programs.run(empty, batch=self.size, slots=self.slots, groups=self.groups)
        lengths = self._by_row(lambda row: len(row.prompt), 1, np.int32)
        if self.model.stacks:
            return replace(cache, lengths=self._put(lengths.reshape(self.groups, -1), None, "batch"))
        return replace(cache, lengths=self._put(lengths, "batch"))

    def _tokens(self, start: int, count: int) -> tuple[jax.Array, ...]:
        out = np.zeros((self.size, count), np.int32)
        for i, row in enumerate(self.rows):
            part = row.prompt[start : start + count]
            out[i, : len(part)] = part
        return self._parted(out, "tokens")

    def _state(self, cache: Cache) -> State:
        arrays = self._row_arrays

        def floats(name: str, off: float) -> tuple[jax.Array, ...]:
            return arrays(lambda row: getattr(row.params, name), off, np.float32)

        def zeros() -> tuple[jax.Array, ...]:
            return arrays(lambda row: 0, 0, np.int32)

        seeds = np.zeros((self.size, 2), np.uint32)
        seeds[: len(self.rows)] = [(row.seed, row.output.index) for row in self.rows]
        biases = [row.params.logit_bias for row in self.rows]
        columns = {
            "temperature": floats("temperature", 0.0),
            "top_k": arrays(lambda row: max(row.params.top_k, 0), 0, np.int32),
            "top_p": floats("top_p", 1.0),
            "min_p": floats("min_p", 0.0),
            "repetition": floats("repetition_penalty", 1.0),
            "presence": floats("presence_penalty", 0.0),
            "frequency": floats("frequency_penalty", 0.0),
            "seed": self._parted(seeds, None),
            "bias_ids": self._padded([list(b) for b in biases], -1, np.int32),
            "bias": self._padded([list(b.values()) for b in biases], 0.0, np.float32),
            "stop_ids": self._padded([row.stop_ids for row in self.rows], -1, np.int32, width=4),
            "min_tokens": arrays(lambda row: row.params.min_tokens, 0, np.int32),
            "max_tokens": arrays(lambda row: row.max_tokens, 1, np.int32),
        }
        rows = [Rows(**dict(zip(columns, group, strict=True))) for group in zip(*columns.values(), strict=True)]
        done = arrays(lambda row: False, True, np.bool_)
        return State(cache, tuple(map(Group, zeros(), zeros(), done, rows, self._counts())))

    def _counts(self) -> Sequence[Counts | None]:
        if not self.features.penalties:
            return [None] * self.groups
        sharding = self.model.layout.at("head").sharding("batch", "logits")
        seen = np.zeros((self.size, self.model.vocab_held), np.bool_)
        for i, row in enumerate(self.rows):
            seen[i, row.prompt] = True
        return [
            Counts(put(part, sharding), put(np.zeros(part.shape, np.int32), sharding)) for part in np.split(seen, self.groups)
        ]

    # -- and back ------------------------------------------------------------------------------------------------------

    def _take(self, made: Made, show: bool) -> None:
        def whole(*parts: jax.Array) -> np.ndarray:
            return np.concatenate([fetch(part) for part in parts])

        tokens = whole(*made.tokens)[:, : int(made.count)].tolist()
        logprobs = jax.tree.map(whole, *made.logprobs)
        for i, row in enumerate(self.rows):
            found = None if logprobs is None else lambda at, i=i: Logprobs(*(a[i, at] for a in jax.tree.leaves(logprobs)))
            row.take(tokens[i], found, show=show)


def batch_size(model: Llama, rows: int) -> tuple[int, int]:
    """Rows of a batch for that many, and into how many groups they are cut."""
    dp = model.layout.parts("batch")
    groups = Circulation.groups_of(-(-rows // dp), model.stages) if model.stacks else 1
    return buckets.rows(rows, dp=dp * groups), groups


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


def chunks(model: Llama, rows: Sequence[Row], chunk_tokens: int) -> list[tuple[int, int]]:
    """How the prompts of a batch are prefilled: see `buckets.chunks`."""
    (size, groups), longest = batch_size(model, len(rows)), max(len(row.prompt) for row in rows)
    largest = buckets.chunk_size(size, chunk_tokens)
    if model.stacks:
        largest = min(largest, buckets.filling(longest, model.stages, groups, size // groups // model.layout.parts("batch")))
    return buckets.chunks(longest, largest=largest, alike=bool(model.stacks))


def slots_needed(model: Llama, rows: Sequence[Row], chunk_tokens: int) -> int:
    """Slots of the cache that a batch comes to take, of all its rows together."""
    most = max(sum(chunks(model, rows, chunk_tokens)[-1]), *(len(row.prompt) + row.max_tokens for row in rows))
    return batch_size(model, len(rows))[0] * buckets.bucket(most, least=buckets.MIN_SLOTS)
