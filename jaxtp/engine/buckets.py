"""Which shapes steps come in, so that few programs serve every load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtp.buckets import chunk_reach, reach
from jaxtp.engine.plan import Shape
from jaxtp.engine.scheduler import Limits, Work
from jaxtp.ops.pages import Read


@dataclass(frozen=True)
class Buckets:
    """pages: of a row's table. read: see `ops.pages`. factor: from one number of lanes to the next, at least."""

    limits: Limits
    read: Read
    pages: int
    factor: int = 2

    def shape(self, work: list[Work], steps: int, *, stops: int, biases: int) -> Shape:
        """The smallest shape that holds the work of every group, in so many steps."""
        chunks = max(len(mine.chunks) for mine in work)
        ends = [start + steps for mine in work for start in mine.starts]
        ends += [chunk.start + chunk.count for mine in work for chunk in mine.chunks]
        return self._shape(self.limits.most(work), chunks, max(ends, default=1), stops=stops, biases=biases)

    def all(self, *, stops: int, biases: int) -> Iterator[Shape]:
        """Every shape that a step may have."""
        limits, found = self.limits, set()
        ends = range(1, self.pages * limits.size + 1, 64) if self.read != "rows" else (1,)
        for rows in range(limits.rows + 1):
            for chunks in range(limits.lanes(limits.up(rows)) + 1):
                found |= (
                    {self._shape(rows, chunks, end, stops=stops, biases=biases) for end in ends} if rows or chunks else set()
                )
        yield from sorted(found, key=lambda shape: (shape.chunks, shape.rows, shape.reach))

    def _shape(self, rows: int, chunks: int, end: int, *, stops: int, biases: int) -> Shape:
        limits = self.limits
        if not chunks:  # XLA would write a single token twice in stages, each time into a copy of the pool
            rows = max(rows, 2 if limits.stages > 1 else 1)
        rows = max(limits.up(rows) if chunks else 0, min(self._up(rows), limits.rows))
        return Shape(
            rows=rows,
            chunks=max(chunks, min(self._up(chunks), limits.lanes(rows))),
            chunk=limits.chunk,
            pages=self.pages,
            stops=stops,
            biases=biases,
            read=self.read,
            reach=self._reach(end, chunks),
        )

    def _reach(self, end: int, chunks: int) -> int:
        """Slots that are read of every row."""
        most = self.pages * self.limits.size
        if self.read == "rows" or (self.read == "cudnn" and not chunks):
            return most
        return chunk_reach(end, most) if chunks else reach(end, most)

    def _up(self, count: int) -> int:
        size = 1
        while size < count:
            size *= self.factor
        return size if count else 0
