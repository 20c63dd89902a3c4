"""Which shapes steps come in, so that few programs serve every load."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from jaxtp.buckets import chunk_reach, lanes, reach
from jaxtp.engine.plan import Shape
from jaxtp.engine.work import Limits, Work
from jaxtp.ops.pages import Read


@dataclass(frozen=True)
class Buckets:
    """pages: of a row's table. read: see `ops.pages`. factor: from one number of lanes to the next (2: and for prompts alone
    what is halfway, beyond 8).

    host_loops: whether a loop is the host's: on GPUs XLA asks the device before each step whether there is another, and a call
    comes back with the last one. Single steps are then programs without a loop, which the host dispatches and leaves.
    """

    limits: Limits
    read: Read
    pages: int
    factor: int = 2
    host_loops: bool = False

    def shape(self, work: list[Work], steps: int, *, stops: int, biases: int, loop: bool = True) -> Shape:
        """The smallest shape that holds the work of every group, in so many steps. loop: whether there may be several."""
        chunks = max(len(mine.chunks) for mine in work)
        ends = [start + steps for mine in work for start in mine.starts]
        ends += [chunk.start + chunk.count for mine in work for chunk in mine.chunks]
        reach = self._reach(max(ends, default=1), chunks)
        return self._shape(self.limits.most(work), chunks, reach, stops=stops, biases=biases, loop=loop)

    def all(self, *, stops: int, biases: int) -> Iterator[Shape]:
        """Every shape that a step may have."""
        limits, found = self.limits, set()
        ends = range(1, self.pages * limits.size + 1, 64)
        reaches = [{self._reach(end, chunks) for end in ends} for chunks in (0, 1)]
        loops = (True, False) if self.host_loops else (True,)
        for rows in range(limits.rows + 1):
            for chunks in range(limits.lanes(limits.up(rows)) + 1):
                if rows or chunks:
                    every = itertools.product(reaches[chunks > 0], loops)
                    found |= {self._shape(rows, chunks, at, stops=stops, biases=biases, loop=loop) for at, loop in every}
        yield from sorted(found, key=lambda shape: (shape.chunks, shape.rows, shape.reach, shape.loop))

    def _shape(self, rows: int, chunks: int, reach: int, *, stops: int, biases: int, loop: bool) -> Shape:
        limits = self.limits
        if not chunks:  # XLA would write a single token twice in stages, each time into a copy of the pool
            rows = max(rows, 2 if limits.stages > 1 else 1)
        rows = max(limits.up(rows) if chunks else 0, min(self._up(rows), limits.rows))
        return Shape(
            rows=rows,
            chunks=max(chunks, min(self._lanes(chunks, rows), limits.lanes(rows))),
            chunk=limits.chunk,
            pages=self.pages,
            stops=stops,
            biases=biases,
            read=self.read,
            reach=reach,
            loop=not chunks and limits.stages == 1 and (loop or not self.host_loops),
        )

    def _reach(self, end: int, chunks: int) -> int:
        """Slots that are read of every row."""
        most = self.pages * self.limits.size
        if self.read == "rows" or (self.read == "cudnn" and not chunks):
            return most
        return chunk_reach(end, most) if chunks else reach(end, most)

    def _lanes(self, chunks: int, rows: int) -> int:
        """Those halfway are a program more each: they are for prompts that have a step to themselves, or nearly so."""
        alone = rows <= 1 and self.limits.stages == 1
        return lanes(chunks) if alone and self.factor == 2 else self._up(chunks)

    def _up(self, count: int) -> int:
        size = 1
        while size < count:
            size *= self.factor
        return size if count else 0
