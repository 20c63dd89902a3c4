"""What a server is told: where it listens, who may ask, and how much."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass, field

from jaxtp import checks

KEY = "JAXTP_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the server listens and what it lets through."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is all of this machine's."""
    port: int = 8000
    """Port; 0 takes a free one, which the log names."""
    served_model_name: tuple[str, ...] = ()
    """Names that requests give the model; default MODEL as it was given."""
    api_key: tuple[str, ...] = field(default_factory=lambda: tuple(filter(None, [os.environ.get(KEY)])))
    """Keys, of which every request needs one; default that of the variable JAXTP_API_KEY, else none is asked for."""
    allowed_origins: tuple[str, ...] = ()
    """Other sites whose pages may ask (CORS); "*" is all."""
    max_body_bytes: int = 16 * 2**20
    """The largest body of a request."""
    max_prompts: int = 256
    """The most prompts of a request."""
    max_n: int = 128
    """The most completions of a prompt."""
    request_seconds: float = 1800.0
    """Seconds after which a request is ended, with what it has."""
    drain_seconds: float = 30.0
    """Seconds that running requests have after SIGTERM."""
    stall_seconds: float = 300.0
    """Seconds without a step while there is work, after which /health says that the engine hangs. Compiling counts: --warm-up
    does it ahead."""
    warm_up: bool = False
    """Compile all that may be needed before requests are taken."""
    trust_request_chat_template: bool = False
    """Let requests bring the source of a chat template, which is a program; without it they name one of the model's."""
    access_log: bool = False
    """Log every request."""
    log_seconds: float = 10.0
    """Seconds between lines that say how busy the engine is; 0: none."""

    def __post_init__(self) -> None:
        checks.whole("port", self.port, least=0, most=65535)
        for name in ("max_body_bytes", "max_prompts", "max_n"):
            checks.whole(name, getattr(self, name), least=1)
        for name in ("request_seconds", "drain_seconds", "stall_seconds", "log_seconds"):
            value = getattr(self, name)
            if not checks.number(value) or not value >= 0:
                raise ValueError(f"{name}={value!r} must be a number of seconds, at least 0")
        if "" in self.api_key:
            raise ValueError("api_key holds an empty key, which every request would have")

    @property
    def open(self) -> bool:
        """Whether other machines can ask without a key."""
        return not self.api_key and not _loopback(self.host)


def bound(host: str, port: int) -> socket.socket:
    """A socket at that address, which nobody can connect to before it listens. Raises OSError that names both."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except OSError as error:
        raise OSError(
            f"cannot listen on port {port} of {host}: {error.strerror or error}; --host and --port name another"
        ) from None
    return found


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
