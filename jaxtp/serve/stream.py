"""What comes of the prompts of one HTTP request, as it comes or when all is there. Of the event loop's thread alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from jaxtp.engine.request import Request, Update


class EngineFailed(RuntimeError):
    """The engine has raised; nothing more will come."""


Place = tuple[int, int]  # which prompt, which of its completions


class Stream:
    """The updates of some prompts' completions.

    Those that nobody has taken yet are kept, and put together when they are: whoever reads slowly gets fewer and longer pieces,
    and no more is kept than the completions are.
    """

    def __init__(self, completions: int, *, eager: bool) -> None:
        """eager: whether somebody takes the updates one by one, and not all of them when the last completion has ended."""
        self.requests: list[Request] = []
        self._left, self._eager = completions, eager
        self._new: dict[Place, list[Update]] = {}
        self._ready = asyncio.Event()
        self._failed: EngineFailed | None = None

    @property
    def ended(self) -> bool:
        """Whether all completions have ended and nothing of them is left to take."""
        return self._left == 0 and not self._new

    def put(self, prompt: int, updates: Sequence[Update]) -> None:
        """Adds what is new of a prompt's completions."""
        for update in updates:
            self._new.setdefault((prompt, update.index), []).append(update)
            self._left -= update.finish_reason is not None
        if self._eager or self._left == 0:
            self._ready.set()

    def fail(self, error: EngineFailed) -> None:
        """Whoever waits, or will, gets this."""
        self._failed = error
        self._ready.set()

    async def take(self) -> list[tuple[Place, Update]]:
        """What is new, an update for each completion; of a stream that is not eager, all. Raises EngineFailed."""
        await self._ready.wait()
        self._ready.clear()
        if self._failed:
            raise self._failed
        new, self._new = self._new, {}
        return [(place, _joined(updates)) for place, updates in new.items()]


def _joined(updates: list[Update]) -> Update:
    """Updates of a completion as one."""
    last = updates[-1]
    if len(updates) == 1:
        return last
    return Update(
        last.index,
        "".join(update.text for update in updates),
        [token for update in updates for token in update.token_ids],
        None if last.logprobs is None else [each for update in updates for each in update.logprobs or ()],
        last.finish_reason,
        last.stop_reason,
    )
