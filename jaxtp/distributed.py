"""Several processes, one on each node: how they find one another, and how they end together.

JAX's own coordination aborts a process that misses another one. So the processes first call the roll over plain TCP, where
what is wrong can be said; the connections stay open, and whoever ends or falls silent is named by all the others, which
end as well.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxtp.log import logger, show
from jaxtp.mesh import make_mesh

PORT = 29500  # of the roll call; JAX's coordinator takes the next one
LOST = 77  # the exit code of a process that ends because another one did
GRACE = 10.0  # seconds after a collective failed until it is known who was lost; a busy machine buries the dead slowly


@dataclass(frozen=True)
class Nodes:
    """How many processes there are, which one this is, and where process 0 listens."""

    count: int
    index: int
    host: str
    port: int


def nodes(
    *,
    nnodes: int | None = None,
    node_rank: int | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
    env: Mapping[str, str] = os.environ,
) -> Nodes | None:
    """From the arguments, or from what Slurm or Open MPI tells, or from NNODES, NODE_RANK (or JOB_COMPLETION_INDEX, of a
    Kubernetes job); MASTER_ADDR, which only Slurm knows by itself, and MASTER_PORT. None where nothing speaks of a second
    process.

    Raises ValueError where something is missing or does not fit.
    """
    port = master_port or int(env.get("MASTER_PORT", PORT))
    host = master_addr or env.get("MASTER_ADDR")
    if nnodes is not None or node_rank is not None or master_addr is not None:
        count = _int(env, "NNODES") if nnodes is None else nnodes
        index = _int(env, "NODE_RANK", "JOB_COMPLETION_INDEX") if node_rank is None else node_rank
        where = "--nnodes and --node-rank"
        if count is None:
            raise ValueError("--node-rank and --master-addr need --nnodes, the number of processes")
    elif "SLURM_PROCID" in env:
        count, index, where = _int(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), _int(env, "SLURM_PROCID"), "Slurm"
        host = host or _first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "")
        port = port if master_port or "MASTER_PORT" in env else 20000 + 2 * (int(env.get("SLURM_JOB_ID", "0")) % 10000)
    elif "OMPI_COMM_WORLD_RANK" in env:
        count, index, where = _int(env, "OMPI_COMM_WORLD_SIZE"), _int(env, "OMPI_COMM_WORLD_RANK"), "Open MPI"
    else:
        count, index, where = _int(env, "NNODES"), _int(env, "NODE_RANK", "JOB_COMPLETION_INDEX"), "NNODES and NODE_RANK"
    if count is None or count == 1:
        return None
    if index is None or not 0 <= index < count:
        raise ValueError(
            f"by {where} there are {count} processes, of which this is number {index}; it must be 0 to {count - 1}"
        )
    if host is None:
        raise ValueError(
            f"by {where} there are {count} processes, but nothing tells where the first is: --master-addr or MASTER_ADDR"
        )
    if not 0 < port < 2**16 - 1:  # the next one is JAX's coordinator's
        raise ValueError(f"port {port} of process 0 (--master-port or MASTER_PORT) must be 1 to {2**16 - 2}")
    return Nodes(count, index, host, port)


@contextlib.contextmanager
def processes(
    *,
    nnodes: int | None = None,
    node_rank: int | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
    timeout: float = 300.0,
    silence: float = 60.0,
) -> Iterator[Nodes | None]:
    """Joins the processes of this job (see `nodes`), before anything touches a device; alone, it does nothing.

    timeout: seconds for all to be there, and for a first collective over all devices. silence: seconds without a sign of life
    after which a process is given up. Raises ValueError or TimeoutError that names who is missing. When a process ends inside
    of this block, the others print which one it was and exit with the code 77.
    """
    found = nodes(nnodes=nnodes, node_rank=node_rank, master_addr=master_addr, master_port=master_port)
    if found is None:
        yield None
        return
    show()
    peers = Peers(found, timeout=timeout, silence=silence)
    try:
        with _within(timeout, f"JAX on process {found.index} did not join the others"):
            jax.distributed.initialize(
                f"{found.host}:{found.port + 1}",
                found.count,
                found.index,
                cluster_detection_method="deactivate",
                initialization_timeout=int(timeout) + 1,
                heartbeat_timeout_seconds=int(10 * silence),  # who is lost is found, and told, by Peers
                shutdown_timeout_seconds=int(silence) + 1,
            )
        with _within(
            timeout, f"a first all-reduce over {jax.device_count()} devices did not come back on process {found.index}"
        ):
            _first_collective()
        logger.info("%d processes with %d devices", found.count, jax.device_count())
        yield found
    except BaseException as error:
        peers.fail(error)
        # at its end JAX would wait for the others, and abort
        atexit.register(_exit, error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
        raise
    peers.leave()


class Peers:
    """The connections between process 0 and each other one, and the threads that watch them."""

    def __init__(self, nodes: Nodes, *, timeout: float, silence: float) -> None:
        self._nodes, self._silence = nodes, silence
        self._lost = threading.Event()
        self._leaving = False
        self._links: dict[int, _Link] = {}
        deadline = time.monotonic() + timeout
        if nodes.index == 0:
            self._call_the_roll(deadline, timeout)
        else:
            self._answer(deadline, timeout)
        for index, link in self._links.items():
            threading.Thread(target=self._watch, args=(index, link), daemon=True).start()
        threading.Thread(target=self._ping, daemon=True).start()

    def leave(self) -> None:
        """The work is done: this process may end."""
        self._leaving = True
        self._tell({"end": "done"})

    def fail(self, error: BaseException) -> None:
        """This process ends with an error: the others must not wait for it."""
        # a collective fails when another process is lost, of which the watcher's message speaks, and ends this one. It is
        # waited for in short turns: whatever keeps the interpreter meanwhile keeps the watcher from it as well
        cause = error.__cause__ or error
        if isinstance(cause, RuntimeError):
            seconds = GRACE + (self._silence if re.search("gloo|nccl", str(cause), re.IGNORECASE) else 0.0)
            if any(self._lost.wait(1.0) for _ in range(int(seconds))):
                time.sleep(60)
        self._leaving = True
        self._tell({"end": "failed"})
        if self._nodes.index == 0:  # JAX's coordinator dies with this process, and the others would abort before they can speak
            time.sleep(4.0)
        for link in self._links.values():
            link.close()

    # -- the roll ------------------------------------------------------------------------------------------------------

    def _call_the_roll(self, deadline: float, timeout: float) -> None:
        count, port = self._nodes.count, self._nodes.port
        try:
            socket.create_server(("", port + 1)).close()  # JAX's coordinator takes it, and would not say which it could not
            listening = socket.create_server(("", port), backlog=count)
        except OSError as error:
            raise OSError(
                f"process 0 cannot listen on ports {port} and {port + 1}: {error.strerror}; --master-port or MASTER_PORT names "
                "another pair"
            ) from None
        with listening as server:
            while len(self._links) < count - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = sorted({*range(1, count)} - {*self._links})
                    self._refuse(
                        f"of {count} processes, number {', '.join(map(str, missing))} did not answer within {timeout:.0f} s"
                    )
                link = _Link(connection)
                hello = link.receive(5.0)
                if hello is None or "index" not in hello:
                    link.close()
                    continue
                index, link.host = hello["index"], hello["host"]
                if hello["count"] != count:
                    self._links[-1] = link
                    self._refuse(
                        f"process {index} ({link.host}) was started for {hello['count']} processes, process 0 for {count}"
                    )
                if index == 0 or index in self._links:
                    other = self._links[index].host if index else socket.gethostname()
                    self._links[-1] = link
                    self._refuse(f"two processes say that they are number {index}: {other} and {link.host}")
                self._links[index] = link
        self._tell({"go": True, "host": socket.gethostname()})

    def _answer(self, deadline: float, timeout: float) -> None:
        nodes = self._nodes
        while True:
            try:
                connection = socket.create_connection((nodes.host, nodes.port), timeout=5.0)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"process {nodes.index}: process 0 did not answer at {nodes.host}:{nodes.port} within {timeout:.0f} s "
                        f"({error})"
                    ) from None
                time.sleep(0.2)
        link = _Link(connection)
        link.send({"index": nodes.index, "count": nodes.count, "host": socket.gethostname()})
        answer = link.receive(max(deadline - time.monotonic(), 0.01) + 5.0)  # process 0 knows more, and speaks first
        if answer is None or "error" in answer:
            raise TimeoutError(
                answer["error"] if answer else f"process 0 at {nodes.host}:{nodes.port} did not begin within {timeout:.0f} s"
            )
        link.host = answer["host"]
        self._links[0] = link

    def _refuse(self, why: str) -> None:
        self._tell({"error": why})
        raise TimeoutError(why)

    # -- watching ------------------------------------------------------------------------------------------------------

    def _watch(self, index: int, link: _Link) -> None:
        """Process 0 watches each other one, which watch process 0: what it hears of one it tells the rest."""
        while True:
            message = link.receive(self._silence)
            if self._leaving:
                return
            if message is None:
                how = f"gave no sign of life for {self._silence:.0f} s" if link.open else "ended"
                self._end(f"process {index} ({link.host}) {how}")
            elif message.get("end") == "done":
                return
            elif message.get("end") == "failed":
                time.sleep(2.0)  # where all fail alike, each says why itself
                if self._leaving:
                    return
                self._end(f"process {index} ({link.host}) ended with an error")
            elif "lost" in message:
                self._end(message["lost"])

    def _end(self, why: str) -> None:
        self._lost.set()
        self._tell({"lost": why})
        print(f"jaxtp: {why}; process {self._nodes.index} ends as well", file=sys.stderr, flush=True)
        os._exit(LOST)

    def _ping(self) -> None:
        while True:
            time.sleep(self._silence / 5)
            self._tell({})

    def _tell(self, message: dict[str, Any]) -> None:
        for link in list(self._links.values()):
            link.send(message)


@dataclass
class _Link:
    """A connection that carries lines of JSON."""

    socket: socket.socket
    host: str = ""
    open: bool = True
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _rest: bytes = b""

    def send(self, message: dict[str, Any]) -> None:
        """Says something, if anybody still listens."""
        with self._lock, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """The next message; None where none came in time, or the other side is gone (then `open` is False)."""
        try:
            self.socket.settimeout(timeout)
            while b"\n" not in self._rest:
                data = self.socket.recv(4096)
                if not data:
                    self.open = False
                    return None
                self._rest += data
        except TimeoutError:
            return None
        except OSError:
            self.open = False
            return None
        line, self._rest = self._rest.split(b"\n", 1)
        try:
            message = json.loads(line)
        except json.JSONDecodeError:
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        """Hangs up."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _first_collective() -> None:
    """A sum over every device, which needs every link."""
    mesh = make_mesh(dp=-1)
    ones = np.ones(mesh.shape["dp"], np.float32)
    lain = NamedSharding(mesh, PartitionSpec("dp"))
    there = jax.make_array_from_callback(ones.shape, lain, lambda index: ones[index])
    with jax.set_mesh(mesh):
        total = jax.jit(lambda x: x.sum())(there)
    assert float(total) == len(ones), total


@contextlib.contextmanager
def _within(seconds: float, what: str) -> Iterator[None]:
    """Ends the process with a message where the block takes longer: what hangs in a collective cannot be interrupted."""

    def end() -> None:
        print(f"jaxtp: {what} within {seconds:.0f} s", file=sys.stderr, flush=True)
        os._exit(LOST)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _int(env: Mapping[str, str], *names: str) -> int | None:
    return next((int(env[name]) for name in names if name in env), None)


def _first_host(names: str) -> str | None:
    """Of a Slurm list such as "gpu[003-005,9],login1": gpu003."""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", names)
    return None if match is None else match[1] + (match[2] or "")
