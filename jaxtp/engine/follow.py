"""Serving over several processes: the first one schedules, the others do the same steps on their devices.

A step is a program of all processes, so each must dispatch the same ones in the same order. What the first calls on its
`Runner`, it tells the others before, over TCP: a step's plan is some ten thousand numbers.
"""

from __future__ import annotations

import contextlib
import secrets
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtp.engine.runner import Runner

CALLS = ("run", "compile", "recount")
SECRET = 32  # bytes


class Leader:
    """A runner whose calls the other processes make as well."""

    def __init__(self, runner: Runner, host: str) -> None:
        """host: under which the others reach this process. They must be in `follow`."""
        self._runner = runner
        key = secrets.token_bytes(SECRET)
        with Listener(("", 0), backlog=jax.process_count(), authkey=key) as listener:
            _, port = listener.address  # type: ignore[misc]
            _tell(np.frombuffer(key, np.uint8), np.uint32(port), np.frombuffer(host.encode().ljust(256, b"\0"), np.uint8))
            self._others: list[Connection[Any, Any]] = [listener.accept() for _ in range(jax.process_count() - 1)]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._runner, name)
        if name not in CALLS:
            return found

        def call(*args: Any) -> Any:
            for other in self._others:
                other.send((name, args))
            return found(*args)

        return call

    def __enter__(self) -> Runner:
        return cast(Runner, self)

    def __exit__(self, *error: object) -> None:
        """Lets the others go."""
        for other in self._others:
            with contextlib.suppress(OSError):  # gone already: then this process ends as well
                other.send(None)
            other.close()


def follow(runner: Runner) -> None:
    """Does what the first process does, until that lets go. Raises EOFError where it is gone without a word."""
    empty = np.zeros(SECRET, np.uint8), np.uint32(0), np.zeros(256, np.uint8)
    key, port, host = _tell(*empty)
    address = host.tobytes().rstrip(b"\0").decode(), int(port)
    with Client(address, authkey=key.tobytes()) as leader:
        while (call := leader.recv()) is not None:
            name, args = call
            getattr(runner, name)(*args)


def _tell(*values: Any) -> Any:
    """What the first process says, on every one."""
    return multihost_utils.broadcast_one_to_all(values)
