"""What a load came to: throughput, and the latencies that vLLM's benchmark reports, by its definitions and names."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from jaxtp.load.client import Answer
from jaxtp.tables import Shown

PERCENTILES = (50, 90, 99)
# name in a record: what it is
LATENCIES = {
    "ttft": "time to first token (TTFT)",
    "itl": "between chunks (ITL)",
    "tpot": "a token after the first (TPOT)",
    "e2el": "whole request (E2E)",
}
COUNTS = {
    "completed": ("requests completed", ",.0f"),
    "failed": ("requests failed", ",.0f"),
    "duration": ("seconds", ",.2f"),
    "request_throughput": ("requests/s", ",.2f"),
    "output_throughput": ("tokens/s made", ",.1f"),
    "total_token_throughput": ("tokens/s in and out", ",.1f"),
}


@dataclass(frozen=True)
class Figures:
    """One level. record: its figures by vLLM's names, milliseconds where they end in _ms; latencies are of the requests that
    completed, None without any. errors: how many of each kind, and what the first of each said.
    """

    concurrency: int | None
    rate: float
    record: dict[str, float | None]
    errors: dict[str, tuple[int, str]]

    @classmethod
    def of(cls, answers: Sequence[Answer], *, seconds: float, concurrency: int | None, rate: float) -> Figures:
        """Of the answers to all requests that were sent within so many seconds.

        TTFT: from sending to the first chunk with a token. ITL: between two such chunks, which may hold several tokens. E2E: to
        the last chunk. TPOT = (E2E - TTFT) / (tokens - 1), of requests with two tokens or more.
        """
        good = [a for a in answers if a.error is None and a.first is not None and a.end is not None]
        ttft = [a.first - a.start for a in good]  # type: ignore[operator]
        e2el = [a.end - a.start for a in good]  # type: ignore[operator]
        several = [(e - t, a.output_tokens - 1) for a, t, e in zip(good, ttft, e2el, strict=True) if a.output_tokens > 1]
        read, made = sum(a.prompt_tokens or 0 for a in good), sum(a.output_tokens for a in good)
        record: dict[str, float | None] = {
            "num_prompts": len(answers),
            "completed": len(good),
            "failed": len(answers) - len(good),
            "duration": seconds,
            "total_input_tokens": read,
            "total_output_tokens": made,
            "counted_by_server": sum(a.counted for a in good),
            "request_throughput": len(good) / seconds,
            "output_throughput": made / seconds,
            "total_token_throughput": (read + made) / seconds,
        }
        tpot, itl = [took / tokens for took, tokens in several], [gap for a in good for gap in a.gaps]
        for name, times in {"ttft": ttft, "itl": itl, "tpot": tpot, "e2el": e2el}.items():
            record |= _summary(name, times)
        failed = [a for a in answers if a.error is not None]
        said = {a.error: a.message for a in reversed(failed)}
        errors = {str(kind): (count, said[kind]) for kind, count in Counter(a.error for a in failed).most_common()}
        return cls(concurrency, rate, record, errors)

    def json(self) -> dict[str, Any]:
        """As one object; a rate without limit is null."""
        errors = {kind: {"count": count, "first": said} for kind, (count, said) in self.errors.items()}
        rate = None if math.isinf(self.rate) else self.rate
        return {"max_concurrency": self.concurrency, "request_rate": rate, **self.record, "errors": errors}

    def told(self) -> str:
        """What the load was."""
        parts = [] if math.isinf(self.rate) and self.concurrency else [f"{self.rate:g}/s"]
        return ", ".join(parts + ([f"{self.concurrency} at once"] if self.concurrency else []))


@dataclass(frozen=True, repr=False)
class Levels(Shown):
    """The figures of every level, and the settings that they share."""

    settings: dict[str, Any]
    levels: list[Figures]

    def table(self) -> Table:
        """A column for each level."""
        table = Table(title="load on a server", caption=", ".join(f"{name} {value}" for name, value in self.settings.items()))
        table.add_column("figure")
        for level in self.levels:
            table.add_column(level.told(), justify="right")
        for name, (what, form) in COUNTS.items():
            table.add_row(what, *(format(level.record[name], form) for level in self.levels))
        for name, what in LATENCIES.items():
            table.add_section()
            for i, kind in enumerate(("mean", *(f"p{p}" for p in PERCENTILES))):
                row = [level.record[f"{kind}_{name}_ms"] for level in self.levels]
                cells = ("" if value is None else f"{value:,.1f}" for value in row)
                table.add_row(f"{what}, ms: {kind}" if i == 0 else f"  {kind}", *cells)
        kinds = dict.fromkeys(kind for level in self.levels for kind in level.errors)
        if kinds:
            table.add_section()
        for kind in kinds:
            said = next(level.errors[kind][1] for level in self.levels if kind in level.errors)
            counts = (str(level.errors[kind][0]) if kind in level.errors else "" for level in self.levels)
            table.add_row(f"{kind}: {said}"[:72], *counts)
        return table

    def json(self) -> dict[str, Any]:
        """Settings and levels as one object."""
        return {"settings": self.settings, "levels": [level.json() for level in self.levels]}

    def save(self, path: Path) -> None:
        """Writes them as JSON."""
        path.write_text(json.dumps(self.json(), indent=1) + "\n")


def _summary(name: str, times: Sequence[float]) -> dict[str, float | None]:
    """Mean, standard deviation and percentiles in milliseconds."""
    names = [f"{kind}_{name}_ms" for kind in ("mean", "std", *(f"p{p}" for p in PERCENTILES))]
    if not times:
        return dict.fromkeys(names)
    values = np.array(times) * 1e3
    return dict(zip(names, [float(v) for v in (values.mean(), values.std(), *np.percentile(values, PERCENTILES))], strict=True))
