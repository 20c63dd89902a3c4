"""Levels of load, one after another: so many requests at once, or so many a second."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import aiohttp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxtp.load.client import Answer, Endpoint
from jaxtp.load.figures import Figures, Levels
from jaxtp.load.prompts import Prompt, Source
from jaxtp.log import console, interactive


@dataclass(frozen=True)
class Level:
    """concurrency: how many requests run at once, at most (None: any number). prompts: how many are sent and counted. rate: how
    many arrive a second (inf: each as soon as it may run). burstiness: 1 is Poisson's; less comes in bursts, more evenly.
    warmups: requests before, that are not counted; default as many as run at once, and one where that is not limited.
    """

    concurrency: int | None
    prompts: int
    rate: float = math.inf
    burstiness: float = 1.0
    warmups: int | None = None

    def __post_init__(self) -> None:
        if (self.concurrency is not None and self.concurrency < 1) or self.prompts < 1 or (self.warmups or 0) < 0:
            raise ValueError(
                f"{self.prompts} prompts, {self.concurrency} at once, {self.warmups} to warm up: each must be at least 1 "
                "(warm-ups: 0)"
            )
        if not self.rate > 0 or not 0 < self.burstiness < math.inf:
            raise ValueError(f"rate {self.rate:g} and burstiness {self.burstiness:g} must be more than 0")

    @property
    def warm(self) -> int:
        """Requests that are not counted."""
        return (self.concurrency or 1) if self.warmups is None else self.warmups

    def __str__(self) -> str:
        several = "" if self.concurrency is None else f"{self.concurrency} at once"
        return several if math.isinf(self.rate) and several else f"{self.rate:g}/s{several and f', {several}'}"


def arrivals(level: Level, rng: np.random.Generator) -> np.ndarray:
    """Seconds after the start at which each request of a level arrives: gaps of a gamma distribution, which with burstiness 1
    is Poisson's process, scaled so that the last one comes when it is expected to (as vLLM's benchmark does).
    """
    if math.isinf(level.rate):
        return np.zeros(level.prompts)
    times = np.cumsum(rng.gamma(level.burstiness, size=level.prompts))
    return times * (level.prompts / level.rate / times[-1])


def measure(endpoint: Endpoint, source: Source, levels: Sequence[Level], *, seed: int = 0, progress: bool = True) -> Levels:
    """Runs the levels in turn, each with prompts of its own, so that no cache of prefixes knows them from the one before.

    Raises ConnectionError where there is no server, RuntimeError where no request to warm up completes.
    """
    drawn = [np.random.default_rng([seed, i]) for i in range(len(levels))]
    total = source.draw(np.random.default_rng(seed), sum(level.warm + level.prompts for level in levels))
    prompts = iter(total)
    plans = [
        ([next(prompts) for _ in range(level.warm)], [next(prompts) for _ in range(level.prompts)], arrivals(level, rng))
        for level, rng in zip(levels, drawn, strict=True)
    ]

    async def run() -> Levels:
        async with endpoint.session() as session:
            model = endpoint.model or await endpoint.first_model(session)
            found = []
            for level, (warm, counted, times) in zip(levels, plans, strict=True):
                with _bar(f"{level}", level.prompts, shown=progress) as tick:
                    if warm:
                        await _warm(endpoint, session, model, warm, level)
                    start = time.perf_counter()
                    answers = await _send(endpoint, session, model, counted, times, level.concurrency, tick)
                    took = time.perf_counter() - start
                found.append(Figures.of(answers, seconds=took, concurrency=level.concurrency, rate=level.rate))
            return Levels({"url": endpoint.url, "model": model, "api": "chat" if endpoint.chat else "completions"}, found)

    return asyncio.run(run())


async def _warm(endpoint: Endpoint, session: aiohttp.ClientSession, model: str, prompts: list[Prompt], level: Level) -> None:
    answers = await _send(endpoint, session, model, prompts, np.zeros(len(prompts)), level.concurrency, lambda: None)
    if all(answer.error for answer in answers):
        raise RuntimeError(f"no request to warm up completed: {answers[0].error}: {answers[0].message}")


async def _send(
    endpoint: Endpoint,
    session: aiohttp.ClientSession,
    model: str,
    prompts: Sequence[Prompt],
    times: np.ndarray,
    concurrency: int | None,
    tick: Callable[[], None],
) -> list[Answer]:
    """The answers, in the order of the prompts. A request that waits for its turn here is not sent, and its time not begun."""
    free = asyncio.Semaphore(concurrency) if concurrency else contextlib.nullcontext()
    start = time.perf_counter()

    async def one(prompt: Prompt, at: float) -> Answer:
        await asyncio.sleep(start + at - time.perf_counter())
        async with free:
            answer = await endpoint.ask(session, prompt, model)
        tick()
        return answer

    return await asyncio.gather(*(one(prompt, at) for prompt, at in zip(prompts, times, strict=True)))


@contextlib.contextmanager
def _bar(title: str, total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not (shown and interactive()), transient=True, console=console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
