"""Tables that print in a terminal and show in a notebook."""

from __future__ import annotations

import abc
import io

from rich.console import Console
from rich.table import Table


class Shown(abc.ABC):
    """Something with a `table()`: `print(x)` draws it, a notebook shows it as HTML."""

    @abc.abstractmethod
    def table(self) -> Table:
        """The table."""

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=140, color_system=None, force_jupyter=False)
        console.print(self.table())
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    __repr__ = __str__

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), record=True, width=140, force_jupyter=False)
        console.print(self.table())
        return console.export_html(inline_styles=True, code_format="<pre style='line-height:1.2'>{code}</pre>")
