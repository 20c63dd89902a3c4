"""Several processes on this machine, each as if it were a node."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from conftest import COMPILED_QUICKLY

TESTS = Path(__file__).parent


def free_port() -> int:
    """A port of which the next one is free as well (the coordinator's), from below those that the system gives to whoever asks
    for any: hardly anybody takes it before it is used.
    """
    while True:
        port = random.randrange(10_000, 32_000, 2)
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("", port))
                second.bind(("", port + 1))
            except OSError:
                continue
            return port


def start(
    commands: Sequence[Sequence[str]], *, ranks: Sequence[int] | None = None, count: int | None = None, join=40, silence=20
):
    """Each command (arguments of Python) as a node; ranks and count: what the launcher says, right or wrong."""
    port, environment = free_port(), {**os.environ, **COMPILED_QUICKLY, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = f"{TESTS.parent}:{TESTS}"
    flags = ["--nnodes", str(count or len(commands)), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    flags += ["--join-timeout", str(join), "--silence-timeout", str(silence)]
    return [
        subprocess.Popen(
            [sys.executable, *command, *flags, "--node-rank", str(rank)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for command, rank in zip(commands, ranks or range(len(commands)), strict=True)
    ]  # fmt: skip


def ended(processes: Sequence[subprocess.Popen], *, within: float = 240) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; none is left behind."""
    deadline = time.monotonic() + within
    try:
        found = []
        for process in processes:
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
            found.append((process.returncode, out, err))
        return found
    finally:
        for process in processes:
            kill(process)


def kill(process: subprocess.Popen) -> None:
    """Leaves nothing behind."""
    process.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()
