"""Tables that print in a terminal and show in a notebook."""

from __future__ import annotations

import abc
import io
from typing import Any

from rich.console import Console
from rich.table import Table

WIDE = 140


class Shown(abc.ABC):
    """Something with a `table()`: `print(x)` draws it, a notebook shows it as HTML."""

    @abc.abstractmethod
    def table(self) -> Table:
        """The table."""

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDE, color_system=None, force_jupyter=False)
        console.print(self.table())
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    __repr__ = __str__

    def print(self, **options: Any) -> None:
        """Draws it as wide as the terminal is; where the output is none, wide enough."""
        terminal = Console(force_jupyter=False)
        console = terminal if terminal.is_terminal else Console(width=WIDE, force_jupyter=False)
        console.print(self.table(**options))

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), record=True, width=WIDE, force_jupyter=False)
        console.print(self.table())
        return console.export_html(inline_styles=True, code_format="<pre style='line-height:1.2'>{code}</pre>")
