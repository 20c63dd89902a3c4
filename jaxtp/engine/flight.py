"""A step on its way: what was dispatched, and what comes back of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxtp.engine.detokenizer import Alternatives
from jaxtp.engine.plan import Shape
from jaxtp.engine.sequence import Sequence
from jaxtp.engine.stats import Landing
from jaxtp.engine.step import Made
from jaxtp.engine.work import Work
from jaxtp.sharding import fetch

Lane = tuple[int, int, Sequence, int]  # group, lane, sequence, epoch


@dataclass(frozen=True)
class Back:
    """What a call of so many steps made: tokens[group][lane], up to the first that is negative."""

    steps: int
    tokens: list[list[list[int]]]
    logprobs: list[np.ndarray] | None

    def alternatives(self, group: int, lane: int, count: int) -> list[Alternatives] | None:
        """The logprobs of the first so many tokens of a lane, where the step has them."""
        if self.logprobs is None:
            return None
        each = (tuple(a[group, step, lane] for a in self.logprobs) for step in range(count))
        return [Alternatives(float(chosen), int(rank), ids.tolist(), best.tolist()) for chosen, rank, ids, best in each]


@dataclass(frozen=True)
class Flight:
    """A step that was dispatched: what it makes, and for each lane that makes it of which sequence, in which epoch.

    prompt_tokens: that go along. slots: of the cache that its rows read in the first of its steps.
    """

    made: Made
    lanes: list[Lane]
    prompt_tokens: int
    slots: int

    @classmethod
    def of(cls, made: Made, work: list[Work], shape: Shape, *, slab: bool) -> Flight:
        """The flight of a step with this work; slab: row i is lane i."""
        cut = sum(chunk.count for mine in work for chunk in mine.chunks)
        slots = sum(start + 1 for mine in work for start in mine.starts)
        return cls(made, list(_lanes(work, shape, slab)), cut, slots)

    def read(self) -> Back:
        """Waits for it."""
        steps, found = int(self.made.count), self.made.logprobs
        tokens = fetch(self.made.tokens)[:, :steps].swapaxes(1, 2).tolist()
        logprobs = None if found is None else [fetch(a) for a in (found.chosen, found.rank, found.ids, found.best)]
        return Back(steps, tokens, logprobs)

    def landing(self, steps: int, tokens: int) -> Landing:
        """What is told of it, after so many steps that made so many tokens."""
        slots = self.slots * steps + len(self.lanes) * steps * (steps - 1) // 2
        return Landing(self.prompt_tokens, tokens, steps, slots)


def _lanes(work: list[Work], shape: Shape, slab: bool) -> Iterator[Lane]:
    for group, mine in enumerate(work):
        for i, sequence in enumerate(mine.rows):
            yield group, sequence.row if slab else i, sequence, sequence.epoch
        for i, chunk in enumerate(mine.chunks):
            if chunk.ends:
                yield group, shape.rows + i, chunk.sequence, chunk.sequence.epoch
