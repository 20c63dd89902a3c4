"""Who runs in the next step: rows that make a token, and chunks of prompts. Pure Python; it knows nothing of devices."""

from __future__ import annotations

import heapq
import time
from bisect import insort

from jaxtp.engine.pages import Pages
from jaxtp.engine.request import QueueFull
from jaxtp.engine.sequence import Sequence
from jaxtp.engine.work import LONG, Chunk, Limits, Work

SOON = 8  # steps that whoever waits for a row may wait longer


class Scheduler:
    """The queue, the rows, and their pages.

    Requests are admitted in the order of their arrival (policy "priority": of their priority, then arrival), into the group
    with the most room. Rows that run make a token in every step; what is left of the budget goes to prompts, the earliest
    first, so that nobody waits for ever. Where pages run out the last in order gives its own back, and comes again later with
    the tokens that it has.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: list[Sequence] = []  # a heap
        self.running: list[list[Sequence]] = [[] for _ in range(limits.groups)]  # in order
        self.pages = [Pages(limits.pages, limits.size, caching=limits.caching) for _ in range(limits.groups)]
        self._free = [list(range(limits.rows)) for _ in range(limits.groups)]  # heaps
        self._resting: list[tuple[int, int, int]] = []  # (tick, group, row): rows whose last token is still under way then
        self.tick = 0
        self.preemptions = self.queries = self.hits = self.prompt_tokens = 0

    # -- from outside --------------------------------------------------------------------------------------------------

    def add(self, sequences: list[Sequence]) -> None:
        """Puts the completions of a request into the queue. Raises QueueFull where it is too long."""
        most = self.limits.queue
        if most is not None and len(self.waiting) + len(sequences) > most and self.waiting:
            raise QueueFull(f"{len(self.waiting)} requests are waiting, and at most {most} may (max_num_queued)")
        for sequence in sequences:
            heapq.heappush(self.waiting, sequence)

    def finish(self, sequence: Sequence) -> None:
        """It has ended, wherever it is: row and pages are free."""
        if sequence.running:
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            heapq.heapify(self.waiting)

    @property
    def busy(self) -> bool:
        """Whether anyone runs or waits."""
        return bool(self.waiting) or any(self.running)

    @property
    def used(self) -> int:
        """Pages that somebody has."""
        return sum(pages.count - pages.available for pages in self.pages)

    def check_integrity(self) -> None:
        """Raises AssertionError where rows or pages are lost, or held twice."""
        self._wake(self.tick + self.limits.stages)
        for running, pages, free in zip(self.running, self.pages, self._free, strict=True):
            pages.check_integrity(sequence.pages for sequence in running)
            rows = sorted([*free, *(sequence.row for sequence in running)])
            assert rows == list(range(self.limits.rows)), f"rows are {rows}"

    # -- a step --------------------------------------------------------------------------------------------------------

    def schedule(self, *, steps: int = 1) -> tuple[list[Work], int]:
        """The work of each group, and in how many steps: up to `steps` where no prompt goes along."""
        limits, tick = self.limits, self.tick
        self.tick += 1
        self._wake(tick)
        self._turn()
        work = [Work() for _ in range(limits.groups)]
        making = [
            [
                s
                for s in running
                if s.computed >= s.target and s.ready <= tick and s.sent < s.max_tokens and not self._at_turn(s)
            ]
            for running in self.running
        ]
        prompts = self._admissible() or any(s.computed < s.target for running in self.running for s in running)
        if prompts and not any(s.request.stream or s.sent > s.made_before + 1 for mine in making for s in mine):
            # nobody reads along, and nobody is further than the first token: prompts that came together go through by
            # themselves, in fewer and smaller programs
            making = [[] for _ in making]
        if prompts or limits.stages > 1:
            steps = 1
        elif steps > 1:
            steps = self._steps(steps, making)
        for group, mine in enumerate(work):
            if limits.stages > 1:
                share = -(-sum(s.computed >= s.target for s in self.running[group]) // limits.stages)
                making[group] = making[group][:share]
            for s in making[group]:
                count = min(steps, s.max_tokens - s.sent)
                if s.row < 0 or (len(s.pages) * limits.size < s.computed + count and not self._reach(s, s.computed + count)):
                    continue
                mine.rows.append(s)
                mine.starts.append(s.computed)
                mine.produced.append(s.sent)
                s.computed += count
                s.sent += count
                s.ready = tick + limits.stages
        room = [limits.lanes(limits.up(limits.most(work)))] * limits.groups
        for group, mine in enumerate(work):
            for sequence in self.running[group]:
                room[group] -= self._cut(sequence, mine, room[group], tick)
        while (admitted := self._admit(room)) is not None:
            group = admitted.group
            room[group] -= self._cut(admitted, work[group], room[group], tick)
        return work, steps

    def _steps(self, steps: int, making: list[list[Sequence]]) -> int:
        """How many steps rows can take together: as many as one of them needs, and all have pages for."""
        left = [s.max_tokens - s.sent for mine in making for s in mine]
        steps = min(steps, max(left, default=1))
        if (turn := self.limits.turn) is not None:
            steps = min([steps, *(turn - s.computed for mine in making for s in mine if s.span <= turn)])
        if self.waiting:  # for a row that ends
            steps = min(steps, min(left, default=1), SOON)
        size = self.limits.size
        while steps > 1:
            needs = (
                sum(max(0, -(-(s.computed + min(steps, s.max_tokens - s.sent)) // size) - len(s.pages)) for s in mine)
                for mine in making
            )
            if all(need <= pages.available for need, pages in zip(needs, self.pages, strict=True)):
                break
            steps //= 2
        return steps

    def _cut(self, sequence: Sequence, work: Work, lanes: int, tick: int) -> int:
        """Chunks of a sequence into the work, in at most so many lanes; how many it took."""
        taken, size = 0, self.limits.size
        while sequence.prefilling and taken < lanes:
            start = sequence.computed
            count = min(self.limits.chunk, sequence.target - start)
            sequence.computed += count
            ends = not sequence.prefilling
            work.chunks.append(Chunk(sequence, start, count, ends, sequence.sent))
            taken += 1
            if ends:
                sequence.sent += 1
                sequence.ready = tick + self.limits.stages
        if taken and not self.limits.slab:
            self.publish(sequence, upto=sequence.computed // size)
        return taken

    def publish(self, sequence: Sequence, *, upto: int) -> None:
        """The first so many pages of a sequence hold what others may share, once what was dispatched is done."""
        pages = self.pages[sequence.group]
        if not pages.caching or upto <= sequence.published:
            return
        for page, key in zip(sequence.pages, sequence.keys(pages.size, upto * pages.size), strict=False):
            pages.publish(key, page)
        sequence.published = upto

    # -- rows and pages ------------------------------------------------------------------------------------------------

    def _admissible(self) -> bool:
        return bool(self.waiting) and any(self._fits(self.waiting[0], group) is not None for group in range(self.limits.groups))

    def _fits(self, sequence: Sequence, group: int) -> list[int] | None:
        """The pages of its beginning that are there, where a group can take it; else None."""
        pages = self.pages[group]
        if not self._free[group]:
            return None
        if self.limits.slab:
            return []
        found = pages.found(sequence.keys(pages.size, len(sequence.ids) - 1))  # one token at least is left to compute
        free = pages.available - pages.unused(found)
        spare = max(1, pages.count // 100) if self.running[group] else 0  # for the rows that run to go on
        return found if free >= -(-len(sequence.ids) // pages.size) - len(found) + spare else None

    def _admit(self, room: list[int]) -> Sequence | None:
        """The first that waits gets a row, if a group with lanes left has one."""
        if not self.waiting:
            return None
        sequence, best = self.waiting[0], None
        for group in range(self.limits.groups):
            found = self._fits(sequence, group) if room[group] > 0 else None
            if found is not None:
                rank = (len(found), self.pages[group].available, len(self._free[group]), -group)
                best = max(best, (rank, group, found)) if best else (rank, group, found)
        if best is None:
            return None
        heapq.heappop(self.waiting)
        _, group, found = best
        pages, row = self.pages[group], heapq.heappop(self._free[group])
        pages.share(found)
        if self.limits.slab:
            sequence.pages = [pages.take(row)]
        else:
            need = -(-len(sequence.ids) // pages.size) - len(found)
            sequence.pages = [*found, *(pages.take() for _ in range(need))]
        sequence.group, sequence.row, sequence.target = group, row, len(sequence.ids)
        sequence.computed, sequence.published = len(found) * pages.size, len(found)
        sequence.sent = sequence.made_before = sequence.made
        sequence.tabled = 0
        self.queries += len(sequence.ids)
        self.hits += sequence.computed
        if (request := sequence.request).scheduled is None:
            request.scheduled, request.cached_tokens = time.monotonic(), sequence.computed
            self.prompt_tokens += len(request.prompt)
        insort(self.running[group], sequence)
        return sequence

    def _reach(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for so many tokens; the last in order gives way where there are none. False: that was itself."""
        pages = self.pages[sequence.group]
        while len(sequence.pages) * pages.size < tokens:
            if pages.available:
                sequence.pages.append(pages.take())
                continue
            last = self.running[sequence.group][-1]
            self._again(last)
            self.preemptions += 1
            if last is sequence:
                return False
        return True

    def _at_turn(self, sequence: Sequence) -> bool:
        """Whether its next token is the first that its rotary embedding does not reach."""
        turn = self.limits.turn
        return turn is not None and sequence.span <= turn <= sequence.computed

    def _turn(self) -> None:
        """Rows at their turn begin again, once all of their tokens have come back."""
        for running in self.running if self.limits.turn is not None else ():
            for sequence in [s for s in running if self._at_turn(s) and s.made == s.sent and s.sent < s.max_tokens]:
                self._again(sequence)

    def _again(self, sequence: Sequence) -> None:
        """It loses its row, and waits for another one with the tokens that it has."""
        self._leave(sequence)
        sequence.epoch += 1
        if self.limits.turn is not None and sequence.span <= self.limits.turn < len(sequence.ids):
            sequence.turn(LONG)
        heapq.heappush(self.waiting, sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.running[sequence.group].remove(sequence)
        self.pages[sequence.group].release(sequence.pages)
        heapq.heappush(self._resting, (self.tick + self.limits.stages - 1, sequence.group, sequence.row))
        sequence.pages, sequence.row = [], -1

    def _wake(self, tick: int) -> None:
        while self._resting and self._resting[0][0] <= tick:
            _, group, row = heapq.heappop(self._resting)
            heapq.heappush(self._free[group], row)
