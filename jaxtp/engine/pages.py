"""Pages of the KV cache on the host: who has which, and which of them hold a text that others may share."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class Pages:
    """The pages of one data-parallel group.

    A page that is full is published under a key that stands for its tokens and all before them (`chain`). Whoever comes with
    the same beginning shares it: pages count who has them, and one that nobody has keeps its key until it is taken again, the
    longest unused first. No shared page is ever written: its owners begin behind it.
    """

    def __init__(self, count: int, size: int, *, caching: bool = True) -> None:
        self.count, self.size, self.caching = count, size, caching
        self._owners = [0] * count
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        self._by_key: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def unused(self, pages: Iterable[int]) -> int:
        """How many of these nobody has."""
        return sum(page in self._free for page in pages)

    def take(self, page: int | None = None) -> int:
        """A free page (or that one), which loses what it held."""
        if page is None:
            page, _ = self._free.popitem(last=False)
        else:
            del self._free[page]
        self._owners[page] = 1
        if (key := self._keys.pop(page, None)) is not None:
            del self._by_key[key]
        return page

    def found(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the longest beginning that is there."""
        pages: list[int] = []
        for key in keys if self.caching else ():
            if (page := self._by_key.get(key)) is None:
                break
            pages.append(page)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One owner more for each."""
        for page in pages:
            self._owners[page] += 1
            self._free.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """One owner less for each. Of a text, the end is forgotten first."""
        for page in reversed(pages):
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free[page] = None
                if page not in self._keys:  # nothing to find in it
                    self._free.move_to_end(page, last=False)

    def publish(self, key: bytes, page: int) -> None:
        """Says that a page is full of what the key stands for. The first one to say so is the one that is found."""
        if self.caching and key not in self._by_key and page not in self._keys:
            self._by_key[key], self._keys[page] = page, key

    def check_integrity(self, held: Iterable[Sequence[int]] = ()) -> None:
        """Raises AssertionError unless exactly these have pages, and every other page is free."""
        owners = Counter(page for pages in held for page in pages)
        for page in range(self.count):
            counted, known = self._owners[page], owners[page]
            assert counted == known, f"page {page} counts {counted} owners, {known} have it"
            assert (page in self._free) == (not counted), f"page {page} with {counted} owners stands wrongly in the free list"
        assert len(self._by_key) == len(self._keys), "keys and pages differ in number"
        for key, page in self._by_key.items():
            assert self._keys[page] == key, f"page {page} is found under a key that is not its own"


def chain(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a page: of its tokens and, through the key of the page before, of all that stands before them.

    A hash that nobody can find two texts for: who could, would read what others wrote.
    """
    return hashlib.blake2b(before + array("i", tokens).tobytes(), digest_size=16).digest()
