"""Arguments into dataclasses (the reading is tyro's). What is wrong with them is a ValueError of one line."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import tyro

from jaxtp.cli.others import renamed, why_not

_DRAWN = re.compile(r"\x1b\[[0-9;]*m|[│╭╮╰╯]")  # colours and boxes
_PLAIN = {
    r"(.*?): Could not find valid parse for arguments: \[(.*)\]": r"\1 cannot be \2",
    r"Error parsing (.*?): invalid literal for int\(\) with base 10: (.*)": r"\1 takes a whole number, not \2",
    r"Error parsing (.*?): could not convert string to float: (.*)": r"\1 takes a number, not \2",
    r"Error parsing [A-Z]\w*: (.*)": r"\1",
    r"Error parsing (.*)": r"\1",
}


def parse(kind: Any, arguments: Sequence[str], *, prog: str, default: Any = None) -> Any:
    """The `kind` that the arguments describe; what they do not say is as in `default`. Prints help, and ends, where asked.

    Raises ValueError for flags that there are not, with the nearest ones, and for values that cannot be.
    """
    found, rest = parse_known(kind, arguments, prog=prog, **({} if default is None else {"default": default}))
    if rest:
        raise ValueError(_unknown(rest, flags(kind, prog), prog))
    return found


def parse_known(kind: Any, arguments: Sequence[str], *, prog: str, **options: Any) -> tuple[Any, list[str]]:
    """The same, and what it does not know. options: tyro's."""
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            found, rest = tyro.cli(kind, args=[*arguments], prog=prog, return_unknown_args=True, **options)
    except SystemExit as stopped:
        if not stopped.code:
            raise
        raise ValueError(f"{_told(heard.getvalue())} ({prog} --help)") from None
    sys.stderr.write(heard.getvalue())
    return found, rest


def flags(kind: Any, prog: str) -> list[str]:
    """All that `kind` has, as its help lists them."""
    listed = io.StringIO()
    with contextlib.redirect_stdout(listed), contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], prog=prog)
    lines = [_DRAWN.sub("", line).strip() for line in listed.getvalue().splitlines()]
    return [flag for line in lines if line.startswith("-") for flag in re.findall(r"(?:^|, )(--?[a-z][\w.-]*)", line)]


def nearest(word: str, among: Iterable[str]) -> str:
    """Those that look like a word, as the end of a sentence; nothing where none does."""
    found = difflib.get_close_matches(word, [*among], n=3, cutoff=0.6)
    return f"; there is {', '.join(found)}" if found else ""


def _unknown(rest: Sequence[str], known: Sequence[str], prog: str) -> str:
    flag = next((word.split("=")[0] for word in rest if re.match("--?[A-Za-z]", word)), None)
    if flag is None:
        return f"{prog} takes no {rest[0]!r} there; a text with spaces is one argument in quotes ({prog} --help)"
    flag = flag.replace("_", "-")
    if reason := why_not(flag):
        return f"{flag} {reason}"
    other = renamed(flag)
    near = f"; it is {other} here" if other in known else nearest(flag, known)
    return f"{prog} has no {flag}{near} ({prog} --help lists all)"


def _told(box: str) -> str:
    """What is said in a box of tyro's, in one line: what stands between its title and the help below."""
    lines = [_DRAWN.sub("", line).strip() for line in box.splitlines()]
    parts = " ".join("\n" if re.fullmatch("[─-]+", line) or line.startswith("─") else line for line in lines).split("\n")
    said = re.sub(r"\s+", " ", parts[min(1, len(parts) - 1)]).strip()
    for pattern, plain in _PLAIN.items():
        said, changed = re.subn(pattern, plain, said)
        if changed:
            break
    said = said.replace(" (required)", "")
    return said[:1].lower() + said[1:] if re.match("[A-Z][a-z]+ ", said) else said
