"""Arguments as people give them: what cannot be is refused by name, with the bound, before any work."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

INT32 = 2**31 - 1  # what the devices count with


def whole(name: str, value: Any, *, least: int, most: int | None = None, bound: str = "") -> int:
    """An int within its bounds. bound: what `most` is, for the message.

    Raises TypeError for what is no int (a bool is none) and ValueError beyond the bounds.
    """
    if not _int(value):
        raise TypeError(f"{name}={value!r} must be an int of at least {least}")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{name}={value} must be at most {most}{f', {bound}' if bound else ''}")
    return int(value)


def seed(name: str, value: Any) -> int:
    """An int that fixes random numbers. Raises as `whole`."""
    if not _int(value):
        raise TypeError(f"{name}={value!r} must be an int in [0, 2^32)")
    if not 0 <= value < 2**32:
        raise ValueError(f"{name}={value} must be in [0, 2^32)")
    return int(value)


def flags(**values: Any) -> None:
    """Raises TypeError for the first that is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r} must be True or False")


def number(value: Any) -> bool:
    """Whether it is a number (a bool is none)."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
