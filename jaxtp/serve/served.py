"""The model that is served: the engine, the tokenizer, and how its folder wants it to be sampled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxtp.engine.params import SamplingParams
from jaxtp.engine.request import Listener, Request
from jaxtp.files import read_object
from jaxtp.log import console, interactive, logger
from jaxtp.serve.settings import Settings
from jaxtp.text import Tokenizer

if TYPE_CHECKING:
    from jaxtp import LLM

LOG_SECONDS = 10.0  # between two lines on what takes long
PATIENCE = 0.02  # seconds that who comes may wait for steps that were dispatched together
_NAMES = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    "max_new_tokens": "max_tokens",
}


class Engine(Protocol):
    """What the server needs of `jaxtp.engine.engine.Engine`."""

    wake: threading.Event
    max_model_len: int
    on_step: list[Callable[[int], None]]

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        id: str | None = None,
        priority: int = 0,
        stream: bool = True,
        listener: Listener | None = None,
    ) -> Request:
        """Takes a request in."""

    def abort(self, request: Request) -> None:
        """Ends a request."""

    def step(self) -> bool:
        """Makes a step; False where there is nothing to do."""

    def stats(self) -> Any:
        """How it stands."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """names: that requests may give the model, the first in answers. defaults: SamplingParams that the model's folder wants."""

    names: tuple[str, ...]
    engine: Engine
    tokenizer: Tokenizer | None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    priorities: bool = False
    """Whether the engine goes by the priority of requests."""
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, llm: LLM, settings: Settings) -> Served:
        """That of an LLM, its engine made, and its texts in a thread."""
        source, engine = llm.model.source, llm.engine
        defaults = defaults_of(source)
        engine.patience, engine.asked.levels = PATIENCE, True
        if settings.warm_up:
            _warm_up(engine)
        engine.detokenizer.start()
        return cls(
            names=settings.served_model_name or (source or "random",),
            engine=engine,
            tokenizer=llm.tokenizer,
            defaults=defaults,
            priorities=engine.limits.policy == "priority",
        )


def _warm_up(engine: Any) -> None:
    """Compiles ahead, with a bar where somebody watches, or a line in the log now and then."""
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    told = time.monotonic()
    with Progress(*columns, disable=not interactive(), transient=True, console=console) as bar:
        task = bar.add_task("")

        def progress(done: int, of: int) -> None:
            nonlocal told
            bar.update(task, completed=done, total=of)
            if not interactive() and time.monotonic() - told > LOG_SECONDS:
                told = time.monotonic()
                logger.info("compiling ahead: %d of %d steps", done, of)

        seconds = engine.warm_up(progress)
    logger.info("compiled ahead in %.1f s", seconds)


def defaults_of(folder: str | None) -> dict[str, Any]:
    """The SamplingParams that generation_config.json asks for. Raises ValueError, which names the file, for what cannot be."""
    path = Path(folder, "generation_config.json") if folder else None
    if path is None or not path.exists():
        return {}
    found = read_object(path)
    asked = {mine: found[theirs] for theirs, mine in _NAMES.items() if found.get(theirs) is not None}
    try:
        SamplingParams(**asked)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return asked
