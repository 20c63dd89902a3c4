"""Which shapes steps come in, so that few programs serve every load."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtp.buckets import power, reach
from jaxtp.engine.plan import Shape
from jaxtp.engine.scheduler import Limits, Work
from jaxtp.ops.pages import Read


@dataclass(frozen=True)
class Buckets:
    """rows, chunks: numbers of lanes that programs have (0 for none). pages: of a row's table. read: see `ops.pages`."""

    limits: Limits
    read: Read
    pages: int

    def shape(self, work: list[Work], steps: int, *, stops: int, biases: int) -> Shape:
        """The smallest shape that holds the work of every group, in so many steps."""
        rows = self.limits.width(work)
        chunks = max(len(mine.chunks) for mine in work)
        return Shape(
            rows=rows if rows or chunks else 1,
            chunks=max(chunks, min(power(chunks), self.limits.lanes(rows))),
            chunk=self.limits.chunk,
            pages=self.pages,
            stops=stops,
            biases=biases,
            read=self.read,
            reach=self._reach(work, steps, bool(chunks)),
        )

    def _reach(self, work: list[Work], steps: int, chunks: bool) -> int:
        """How far any lane sees, where the read must know it before."""
        most = self.pages * self.limits.size
        if self.read == "rows" or (self.read == "cudnn" and not chunks):
            return most
        ends = [start + steps for mine in work for start in mine.starts]
        ends += [chunk.start + chunk.count for mine in work for chunk in mine.chunks]
        return reach(max(ends, default=1), most)
