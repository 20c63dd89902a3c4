"""How fast a call of `LLM.generate` was."""

from __future__ import annotations

import time
from collections.abc import Iterator

from jaxtp.engine.programs import Programs
from jaxtp.generate.batch import Batch
from jaxtp.generate.memory import Budget
from jaxtp.log import logger


class Timing:
    """Tokens and seconds of a call of `generate`, compilation apart: prompt_tokens in `prefill` seconds, tokens in `decode`
    seconds and `steps` steps, in which each device read `bytes`.
    """

    def __init__(self, programs: Programs, budget: Budget) -> None:
        self._programs, self._budget = programs, budget
        self._compiling = programs.compile_seconds
        self.prompt_tokens = self.tokens = self.steps = self.bytes = 0
        self.prefill = self.decode = 0.0

    def watch(self, batch: Batch, *, steps: int) -> Iterator[None]:
        """Runs the batch; the first yield ends its prefill."""
        programs, first = self._programs, True
        self.prompt_tokens += sum(len(row.prompt) for row in batch.rows)
        clock, compiled, made, before = time.perf_counter(), programs.compile_seconds, 0, 0
        for _ in batch.run(steps=steps):
            took = time.perf_counter() - clock - (programs.compile_seconds - compiled)
            now = sum(len(row.output.token_ids) for row in batch.rows)
            if first:
                self.prefill += took
            else:
                self.decode += took
                self.tokens += now - made
                longest = max(len(row.output.token_ids) for row in batch.rows)
                self.steps += longest - before
                self.bytes += (longest - before) * self._budget.step_bytes(batch.size, batch.slots)
            before = max(len(row.output.token_ids) for row in batch.rows)
            first, made = False, now
            yield
            clock, compiled = time.perf_counter(), programs.compile_seconds

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
