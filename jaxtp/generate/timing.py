"""How fast a call of `LLM.generate` was."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from jaxtp.engine.engine import Engine
from jaxtp.engine.programs import Programs
from jaxtp.engine.stats import Landing
from jaxtp.generate.memory import Budget
from jaxtp.log import logger


class Timing:
    """Tokens and seconds of a call of `generate`, compilation apart: of steps that took prompts along (`prompt_tokens` in
    `prefill` seconds), and of those with rows alone (`tokens` in `decode` seconds and `steps` steps, in which each device read
    `bytes`).
    """

    def __init__(self, programs: Programs, budget: Budget) -> None:
        self._programs, self._budget = programs, budget
        self._compiling = self._compiled = programs.compile_seconds
        self._clock = time.perf_counter()
        self.prompt_tokens = self.tokens = self.steps = self.bytes = 0
        self.prefill = self.decode = 0.0

    @contextlib.contextmanager
    def watch(self, engine: Engine) -> Iterator[None]:
        """Counts what lands inside."""
        self._clock, self._compiled = time.perf_counter(), self._programs.compile_seconds
        engine.on_land.append(self._landed)
        try:
            yield
        finally:
            engine.on_land.remove(self._landed)

    def _landed(self, landing: Landing) -> None:
        now, compiled = time.perf_counter(), self._programs.compile_seconds
        took = now - self._clock - (compiled - self._compiled)
        self._clock, self._compiled = now, compiled
        self.prompt_tokens += landing.prompt_tokens
        if landing.prompt_tokens:
            self.prefill += took
            return
        self.decode += took
        self.tokens += landing.tokens
        self.steps += landing.steps
        budget = self._budget
        self.bytes += landing.steps * budget.read_bytes + landing.slots * budget.slot_bytes // (budget.groups * budget.ranks)

    def report(self) -> None:
        """Logs the rates."""
        compiling = self._programs.compile_seconds - self._compiling
        if compiling:
            logger.info("compiling: %.1f s, once for these shapes", compiling)
        if self.prefill:
            logger.info("prefill: %d tokens, %.0f tokens/s", self.prompt_tokens, self.prompt_tokens / self.prefill)
        if self.steps:
            logger.info(
                "decode: %d tokens, %.1f tokens/s, %.2f ms/token, %.1f GB/s read by each device",
                self.tokens,
                self.tokens / self.decode,
                1e3 * self.decode / self.steps,
                self.bytes / self.decode / 1e9,
            )
