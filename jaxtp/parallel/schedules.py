"""Pipeline schedules as data: which rank does which piece of work at which tick. Pure arithmetic, no arrays on devices.

p ranks, v chunks of layers on each (chunk c of rank r is stage c·p + r of the model), M microbatches. F is a chunk's forward
pass of a microbatch, B its backward pass, which begins by computing F again from the stashed input.

One program runs on all ranks in lockstep: a tick is an F, a B, or an F and then a B, the same for every rank, though some
ranks idle through it (the bubble). What a rank computes at a tick reaches its neighbour before the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Literal, NamedTuple, get_args

Name = Literal["gpipe", "1f1b", "interleaved_1f1b", "forward"]
Kind = Literal["F", "FB", "B"]


class Work(NamedTuple):
    """A microbatch and the chunk of the rank that it goes through."""

    microbatch: int
    chunk: int


@dataclass(frozen=True)
class Schedule:
    """A schedule's phases are runs of ticks of one kind; `forward` and `backward` say who does what at a tick.

    gpipe: every F, then every B. 1f1b: a B as soon as there is one, so that few microbatches are under way (arXiv:2104.04473).
    interleaved_1f1b: the same with v chunks a rank, which divides the bubble by v. forward: no B at all, for evaluation.
    """

    name: Name
    ranks: int
    microbatches: int
    chunks: int = 1

    def __post_init__(self) -> None:
        if self.name not in get_args(Name):
            raise ValueError(f"no schedule is named {self.name!r}; schedules: {', '.join(get_args(Name))}")
        for what, value in (("ranks", self.ranks), ("microbatches", self.microbatches), ("chunks", self.chunks)):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{what}={value!r} must be at least 1, and whole")
        if self.chunks > 1 and self.name in ("gpipe", "1f1b"):
            raise ValueError(f"{self.name} has one chunk a rank, not {self.chunks}; interleaved_1f1b has several")
        if self.chunks > 1 and self.microbatches % self.ranks:
            p, M = self.ranks, self.microbatches
            near = " or ".join(str(n) for n in (M // p * p, M // p * p + p) if n)
            raise ValueError(f"with {self.chunks} chunks a rank, {p} ranks must divide the microbatches; {M} could be {near}")

    @cached_property
    def phases(self) -> tuple[tuple[Kind, int], ...]:
        """(kind, ticks), in order."""
        p, v, M = self.ranks, self.chunks, self.microbatches
        if self.name == "forward":
            return (("F", M * v + p - 1),)
        if self.name == "gpipe":
            return ("F", M + p - 1), ("B", M + p - 1)
        return ("F", v * p - 1), ("FB", M * v + p - v * p), ("B", v * p - 1)

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of every tick."""
        return tuple(kind for kind, ticks in self.phases for _ in range(ticks))

    def forward(self, tick: int, rank: int) -> Work | None:
        """The F of a rank at a tick; None where it has none."""
        return self._work(tick - rank, backward=False) if "F" in self.kinds[tick] else None

    def backward(self, tick: int, rank: int) -> Work | None:
        """The B of a rank at a tick; None where it has none."""
        first = len(self.kinds) - (self.microbatches * self.chunks + self.ranks - 1)  # the tick of the very first B
        return self._work(tick - first - (self.ranks - 1 - rank), backward=True) if "B" in self.kinds[tick] else None

    def _work(self, turn: int, *, backward: bool) -> Work | None:
        """A rank's work in its own `turn`-th turn: p microbatches through a chunk, the same p through the next, and so on."""
        p, v = self.ranks, self.chunks
        if not 0 <= turn < self.microbatches * v:
            return None
        chunk = turn // p % v
        return Work(turn // (p * v) * p + turn % p, v - 1 - chunk if backward else chunk)

    # -- what follows from it ------------------------------------------------------------------------------------------

    def time(self, forward: float = 1.0, backward: float = 2.0) -> float:
        """Of a step, where a microbatch's F and B through all layers of a rank take so long."""
        each = {"F": forward, "B": backward, "FB": forward + backward}
        return sum(ticks * each[kind] for kind, ticks in self.phases) / self.chunks

    @property
    def bubble(self) -> float:
        """Time lost over time of work: (p-1) / (v·M)."""
        work = 1.0 if self.name == "forward" else 3.0
        return self.time() / (work * self.microbatches) - 1.0

    def in_flight(self, rank: int) -> int:
        """Inputs of chunks that a rank holds at most: those whose F is done and whose B is not (an FB tick's own included)."""
        return max(self.slots(rank).values(), default=-1) + 1

    def slots(self, rank: int) -> dict[Work, int]:
        """Where a rank keeps the input of each piece of work from its F to its B: the first place that is free."""
        free: list[int] = []
        held: dict[Work, int] = {}
        most = 0
        for tick in range(len(self.kinds)):
            work, done = self.forward(tick, rank), self.backward(tick, rank)
            if work is not None:
                if not free:
                    free, most = [most], most + 1
                held[work] = free.pop()
            if done is not None:
                free.append(held[done])
        return held


@dataclass(frozen=True)
class Circulation:
    """Generation over p ranks: groups of rows follow each other through the stages, one tick apart, and come around.

    A row's next token is known once the last rank is done with it, so that a group enters the first rank every p ticks, and as
    many groups as ranks keep all of them busy.
    """

    ranks: int
    groups: int

    def __post_init__(self) -> None:
        if not 1 <= self.groups <= self.ranks:
            raise ValueError(f"{self.groups} groups of rows on {self.ranks} ranks: at least one, and at most as many as ranks")

    def group(self, tick: int, rank: int) -> int | None:
        """Which group a rank works on; None where it idles."""
        turn = (tick - rank) % self.ranks
        return turn if turn < self.groups and tick >= rank else None

    @property
    def idle(self) -> float:
        """The share of ticks in which a rank has nothing to do, once the first group is through."""
        return 1.0 - self.groups / self.ranks
