"""One completion on its way through the engine: its tokens, and how far the device is with them."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtp.engine.pages import chain
from jaxtp.engine.request import Request


class Sequence:
    """Completion `index` of a request.

    ids: the prompt and the tokens that came back. order: by which they are served, the lowest first.

    While it has a row: group and row, its pages, and of its tokens `computed`, whose keys and values are in the cache once what
    was dispatched is done; the first `target` of them are known to the host and go in as chunks. sent: tokens of the completion
    that are made then; made_before: those that it came with. epoch: what was dispatched before it last lost its row is not
    waited for. published, tabled: of its pages, which others may find, and which stand in its card (see `plan`).

    span: tokens that its rotary embedding counts from the start, where that goes by the length of a row; turned: how keys were
    turned then, which alone share pages with others'.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        *,
        order: tuple[int, ...],
        max_tokens: int,
        stop_ids: tuple[int, ...],
        turned: bytes = b"",
    ) -> None:
        self.request, self.index, self.order = request, index, order
        self.max_tokens, self.stop_ids = max_tokens, stop_ids
        self.ids = list(request.prompt)
        self.finish_reason: str | None = None
        self.group = self.row = -1
        self.pages: list[int] = []
        self.computed = self.target = self.sent = self.ready = self.epoch = self.published = self.tabled = self.made_before = 0
        self.span, self.turned = len(request.prompt), turned
        self._keys: list[bytes] = []

    def turn(self, turned: bytes) -> None:
        """All of its tokens are to be computed anew, and its keys turned so."""
        self.span, self.turned, self._keys = len(self.ids), turned, []

    def __lt__(self, other: Sequence) -> bool:
        return self.order < other.order

    @property
    def running(self) -> bool:
        """Whether it has a row."""
        return self.row >= 0

    @property
    def prefilling(self) -> bool:
        """Whether tokens that the host knows have yet to go in."""
        return self.computed < self.target

    @property
    def made(self) -> int:
        """Tokens of the completion that came back."""
        return len(self.ids) - len(self.request.prompt)

    def keys(self, size: int, tokens: int) -> Iterator[bytes]:
        """Of each full page of `size` tokens among the first so many."""
        for i in range(min(tokens, len(self.ids)) // size):
            if i == len(self._keys):
                before = self._keys[-1] if self._keys else self.turned
                self._keys.append(chain(before, self.ids[i * size : (i + 1) * size]))
            yield self._keys[i]

    def take(self, token: int) -> None:
        """One more token came back."""
        self.ids.append(token)
        if token in self.stop_ids and self.made >= self.request.params.min_tokens:
            self.finish_reason = "stop"
        elif self.made >= self.max_tokens:
            self.finish_reason = "length"
