"""The HTTP server: OpenAI's API over the engine. Nothing of HTTP is imported before `serve` is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxtp.serve.settings import Settings

if TYPE_CHECKING:
    from jaxtp import LLM

__all__ = ["Settings", "serve"]


def serve(load: Callable[[], LLM], settings: Settings | None = None) -> None:
    """Serves the model that `load` gives until SIGTERM or SIGINT. Nothing is loaded before the address is taken.

    Raises OSError where the address cannot be had, and RuntimeError (`jaxtp.serve.stream.EngineFailed`) where the engine fails.
    """
    from jaxtp.serve.run import run
    from jaxtp.serve.served import Served

    found = settings or Settings()
    run(lambda: Served.of(load(), found), found)
