"""The library's logger, and its version. `show()` sends the log to stderr where the program has not set up logging itself."""

from __future__ import annotations

import importlib.util
import logging
import sys

from rich.console import Console

console = Console(stderr=True)
logger = logging.getLogger("jaxtp")


def show(level: int = logging.INFO) -> None:
    """Prints the log of the first process, unless handlers are already there."""
    logger.setLevel(level)
    if not logger.filters:
        logger.addFilter(lambda record: _first())
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.propagate = False  # some libraries set up the root logger when they are imported


def version() -> str:
    """jaxtp's own; a clone that is imported where it lies has none."""
    from importlib import metadata  # takes a while, which most starts need not spend

    try:
        return metadata.version("jaxtp")
    except metadata.PackageNotFoundError:
        return "0 (not installed)"


def interactive() -> bool:
    """Whether somebody watches: progress bars are drawn on terminals and in notebooks with widgets, by the first process."""
    widgets = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    return (console.is_terminal or widgets) and _first()


def _first() -> bool:
    """Whether this is the first process of a job, or the only one. Asking touches no device, where there is only one."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0
