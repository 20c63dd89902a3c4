"""Which shapes steps come in, so that few programs serve every load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtp.buckets import bucket
from jaxtp.engine.plan import Shape
from jaxtp.engine.scheduler import Limits, Work
from jaxtp.ops.pages import Read

MIN_REACH = 512


@dataclass(frozen=True)
class Buckets:
    """pages: of a row's table. read: see `ops.pages`. factor: from one number of lanes to the next."""

    limits: Limits
    read: Read
    pages: int
    factor: int = 2

    def shape(self, work: list[Work], steps: int, *, stops: int, biases: int) -> Shape:
        """The smallest shape that holds the work of every group, in so many steps."""
        rows = max(len(mine.rows) for mine in work)
        if self.limits.slab:
            rows = max((sequence.row + 1 for mine in work for sequence in mine.rows), default=0)
        chunks = max(len(mine.chunks) for mine in work)
        ends = [start + steps for mine in work for start in mine.starts]
        ends += [chunk.start + chunk.count for mine in work for chunk in mine.chunks]
        rows = rows if rows or chunks else 1
        reach = self._reach(max(ends, default=1), bool(chunks))
        return self._shape(self._up(rows), self._up(chunks), reach, stops=stops, biases=biases)

    def all(self, *, stops: int, biases: int) -> Iterator[Shape]:
        """Every shape that a step may have."""
        limits = self.limits
        rows = self._sizes(limits.rows)
        for chunks in (0, *self._sizes(max(1, limits.tokens // limits.chunk))):
            for count in rows if not chunks else (0, *rows):
                if count and chunks > self._up(max(1, (limits.tokens - count // self.factor) // limits.chunk)):
                    continue
                reaches = {self._reach(length, bool(chunks)) for length in range(1, self.pages * limits.size + 1, 64)}
                for reach in sorted(reaches):
                    yield self._shape(count, chunks, reach, stops=stops, biases=biases)

    def _shape(self, rows: int, chunks: int, reach: int, *, stops: int, biases: int) -> Shape:
        return Shape(
            rows=rows,
            chunks=chunks,
            chunk=self.limits.chunk,
            pages=self.pages,
            stops=stops,
            biases=biases,
            read=self.read,
            reach=reach,
        )

    def _reach(self, length: int, chunks: bool) -> int:
        """How far any lane sees, where the read must know it before."""
        most = self.pages * self.limits.size
        if self.read == "rows" or (self.read == "cudnn" and not chunks):
            return most
        return min(most, bucket(length, least=MIN_REACH))

    def _sizes(self, most: int) -> list[int]:
        sizes = [1]
        while sizes[-1] < most:
            sizes.append(sizes[-1] * self.factor)
        return sizes

    def _up(self, count: int) -> int:
        return self._sizes(count)[-1] if count else 0
