"""The `jaxtp` command: each verb a few lines that call the library."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import tyro

from jaxtp.cli.evaluate import Eval
from jaxtp.cli.measure import Bench, Doctor, Plan, Profile
from jaxtp.cli.options import Launch, mistakes
from jaxtp.cli.run import Chat, Export, Generate, Train

__all__ = ["Launch", "main"]

VERBS: dict[str, Callable[..., Any]] = {
    "generate": Generate,
    "chat": Chat,
    "train": Train,
    "export": Export,
    "eval": Eval,
    "plan": Plan,
    "doctor": Doctor,
    "bench": Bench,
    "profile": Profile,
}


def main() -> None:
    """The command line. Mistakes end with one line and exit code 2; with JAXTP_DEBUG=1, with the traceback."""
    warnings.simplefilter("default")
    arguments, rest = sys.argv[1:], []
    if arguments == ["--version"]:
        print(f"jaxtp {importlib.metadata.version('jaxtp')}")
        return
    if arguments[:1] == ["train"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        arguments, rest = arguments[:2], arguments[2:]  # what follows the file are settings of the run
    elif arguments[:1] == ["profile"]:
        arguments, rest = _apart(arguments)
    command = tyro.extras.subcommand_cli_from_dict(
        VERBS, args=arguments, prog="jaxtp", description="A Llama on more than one GPU, in JAX."
    )
    try:
        with mistakes():
            (dataclasses.replace(command, overrides=tuple(rest)) if rest else command).run()
    except BrokenPipeError:  # whoever read has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
