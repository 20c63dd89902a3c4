"""The library's logger. `show()` sends it to stderr where the program has not set up logging itself."""

from __future__ import annotations

import importlib.util
import logging

import jax
from rich.console import Console

console = Console(stderr=True)
logger = logging.getLogger("jaxtp")


def show(level: int = logging.INFO) -> None:
    """Prints the log of the first process, unless handlers are already there."""
    logger.setLevel(level)
    if not logger.filters:
        logger.addFilter(lambda record: jax.process_index() == 0)
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.propagate = False  # some libraries set up the root logger when they are imported


def interactive() -> bool:
    """Whether somebody watches: progress bars are drawn on terminals and in notebooks with widgets, by the first process."""
    widgets = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    return (console.is_terminal or widgets) and jax.process_index() == 0
