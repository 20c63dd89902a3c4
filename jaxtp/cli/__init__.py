"""The `jaxtp` command: each verb a few lines that call the library."""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import warnings
from typing import Any

from jaxtp.cli import others
from jaxtp.cli.evaluate import Eval
from jaxtp.cli.load import BenchServe
from jaxtp.cli.measure import Bench, Doctor, Plan, Profile
from jaxtp.cli.options import Launch, mistakes
from jaxtp.cli.parse import nearest, parse
from jaxtp.cli.run import Chat, Export, Generate, Quantize, Train
from jaxtp.cli.serve import Serve, with_config
from jaxtp.log import show, version

__all__ = ["Launch", "main"]

VERBS: dict[str, Any] = {
    "generate": Generate,
    "chat": Chat,
    "serve": Serve,
    "train": Train,
    "export": Export,
    "quantize": Quantize,
    "eval": Eval,
    "plan": Plan,
    "doctor": Doctor,
    "bench": Bench,
    "profile": Profile,
}
EXAMPLES = """
  jaxtp generate --prompt "ROMEO:"                     # the small model that ships with jaxtp
  jaxtp generate path/to/checkpoint --prompt "Once upon a time" --tensor-parallel-size 4
  jaxtp generate --help                                # the flags of a verb
"""


def main() -> None:
    """The command line. Mistakes end with one line and exit code 2; with JAXTP_DEBUG=1, with the traceback."""
    warnings.simplefilter("default")
    gc.set_threshold(10_000)  # what imports and tracing make stays; to look through it at every 700 takes an eighth of a start
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
    elif arguments[0] in ("--version", "-V", "version"):
        print(f"jaxtp {version()}")
    else:
        try:
            with mistakes():
                asked = command(arguments)
                show()  # before what some libraries set up when they are imported
                asked.run()
        except BrokenPipeError:  # whoever read has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def overview() -> str:
    """Every verb in a line, and how to begin."""
    lines = [f"  {name:<10}{(kind.__doc__ or '').splitlines()[0]}" for name, kind in VERBS.items()]
    return "\n".join(["A Llama on more than one GPU, in JAX: jaxtp VERB ...", "", *lines, EXAMPLES.rstrip()])


def command(arguments: list[str]) -> Any:
    """What the arguments ask for. Raises ValueError for what there is not."""
    name, given, rest = arguments[0], arguments[1:], []
    if name not in VERBS:
        raise ValueError(_no_verb(name))
    if name == "train" and given and not given[0].startswith("-"):
        given, rest = given[:1], given[1:]  # what follows the file are settings of the run
    elif name == "serve":
        given = with_config(given)
    elif name == "profile":
        given, rest = _apart(given)
    elif name == "bench" and given[:1] == ["serve"]:
        return parse(BenchServe, given[1:], prog="jaxtp bench serve")
    found = parse(VERBS[name], given, prog=f"jaxtp {name}")
    return dataclasses.replace(found, overrides=tuple(rest)) if rest else found


def _no_verb(name: str) -> str:
    if name.startswith("-"):
        return f"the verb comes first: jaxtp generate {name} ... (jaxtp alone lists the verbs)"
    told = others.verb(name)
    return f"there is no jaxtp {name}{f': {told}' if told else nearest(name, VERBS)} (jaxtp alone lists the verbs)"


def _apart(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Arguments without the settings of a run among them (--data.train FILE), and these."""
    mine: list[str] = []
    settings: list[str] = []
    current = mine
    for argument in arguments:
        if argument.startswith("-"):
            current = settings if "." in argument.split("=")[0] else mine
        current.append(argument)
    return mine, settings
