"""What groups do in a step, and within which limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxtp.buckets import chunk_lanes
from jaxtp.engine.sequence import Sequence

Policy = Literal["fcfs", "priority"]
LONG = b"long"  # how keys are turned beyond `Limits.turn`


@dataclass(frozen=True)
class Limits:
    """groups: of data parallelism; each has `rows` rows and `pages` pages of `size` tokens. chunk: prompt tokens of a lane.
    tokens: of a group in one step, rows and chunks together (one chunk always goes along). stages: ticks from a token's entry
    to its successor. queue: completions that may wait (None: any number). caching: texts that begin alike share pages. slab: a
    page holds a whole row, and row i has page i. turn: rows that grow beyond so many tokens are computed anew there, since
    their rotary embedding is another one from then on (None: it is not).
    """

    groups: int
    rows: int
    pages: int
    size: int
    chunk: int
    tokens: int
    stages: int = 1
    policy: Policy = "fcfs"
    queue: int | None = None
    caching: bool = True
    slab: bool = False
    turn: int | None = None

    def most(self, work: list[Work]) -> int:
        """Rows that a step with this work must have in each group."""
        if self.slab:
            return max((sequence.row + 1 for mine in work for sequence in mine.rows), default=0)
        return max(len(mine.rows) for mine in work)

    def up(self, rows: int) -> int:
        """Rows that a program with chunks has for so many: a power of four, all, or none."""
        return min(1 << -(-(rows - 1).bit_length() // 2) * 2 if rows else 0, self.rows)

    def lanes(self, rows: int) -> int:
        """Chunks that may go along with so many rows, so that a step keeps within `tokens`."""
        return chunk_lanes(self.tokens, rows=rows, chunk=self.chunk)


@dataclass(frozen=True)
class Chunk:
    """Tokens start … start+count-1 of a sequence; `ends`: the last that are known, so that number `produced` is made."""

    sequence: Sequence
    start: int
    count: int
    ends: bool
    produced: int


@dataclass
class Work:
    """What one group does in a step. starts, produced: where the newest token of each row goes, and how many it had made."""

    rows: list[Sequence] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    produced: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
