"""The HTTP server: OpenAI's API over the engine. Nothing of HTTP is imported before `serve` is called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtp.serve.settings import Settings

if TYPE_CHECKING:
    from jaxtp import LLM

__all__ = ["Settings", "serve"]


def serve(llm: LLM, settings: Settings | None = None) -> None:
    """Serves a model until SIGTERM or SIGINT.

    Raises OSError where the address cannot be had, and RuntimeError where the engine fails.
    """
    from jaxtp.serve.run import run
    from jaxtp.serve.served import Served

    settings = settings or Settings()
    run(Served.of(llm, settings), settings)
