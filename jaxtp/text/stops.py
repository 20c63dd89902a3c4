"""Stop strings: where one stands in a text that grows, and how much of its end may still become one."""

from __future__ import annotations

from collections.abc import Sequence


def find_stop(text: str, stops: Sequence[str], *, searched: int) -> tuple[int, str] | None:
    """Where the first stop string stands that ends behind the first `searched` characters of `text`, and which it is."""
    found = [(at, stop) for stop in stops if (at := text.find(stop, max(0, searched - len(stop) + 1))) >= 0]
    return min(found, default=None, key=lambda f: f[0])


def held(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` are the beginning of a stop string, and so not to be shown yet."""
    longest = max(map(len, stops), default=1) - 1
    for count in range(min(longest, len(text)), 0, -1):
        end = text[-count:]
        if any(len(stop) > count and stop.startswith(end) for stop in stops):
            return count
    return 0
