"""The verb that serves a model over HTTP."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from jaxtp import files
from jaxtp.cli.options import Engine, Launch, Model, ModelFlag, one_model
from jaxtp.cli.parse import flags
from jaxtp.serve import Settings

if TYPE_CHECKING:
    from jaxtp import LLM


@dataclass(frozen=True, kw_only=True)
class Serving(Engine):
    """What a server's engine has beside."""

    enable_prefix_caching: bool = True
    """Prompts that begin alike share what was computed for them."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """priority: requests with a lower priority number go first."""
    max_num_queued: int = 4096
    """Completions that may wait; requests beyond get 429."""


@dataclass(frozen=True)
class Serve:
    """Serve a model over HTTP: OpenAI's API, with vLLM's fields and metrics."""

    model: Model = None
    """Checkpoint folder, hub id, or "demo"."""
    named_model: ModelFlag = None
    """The same."""
    config: Path | None = None
    """YAML file of these flags (max-model-len: 8192); flags given beside it come first."""
    engine: tyro.conf.OmitArgPrefixes[Serving] = field(default_factory=Serving)
    server: tyro.conf.OmitArgPrefixes[tyro.conf.FlagCreatePairsOff[Settings]] = field(default_factory=Settings)
    launch: tyro.conf.OmitArgPrefixes[Launch] = field(default_factory=Launch)

    def run(self) -> None:
        """Serves until SIGTERM or SIGINT; exit code 1 where the engine fails. Of several processes the first speaks HTTP."""
        from jaxtp.engine.follow import Leader, follow
        from jaxtp.serve import serve
        from jaxtp.serve.stream import EngineFailed

        model = one_model(self.model, self.named_model, verb="serve")
        settings = dataclasses.replace(self.server, served_model_name=self.server.served_model_name or (model,))
        self.engine.see_devices()
        with self.launch.join() as nodes, contextlib.ExitStack() as ends:
            if nodes and nodes.index:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends when the first process does
                follow(self.engine.llm(model).engine.runner)
                return

            def load() -> LLM:
                llm = self.engine.llm(model)
                if nodes:
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX keeps it for training
                    llm.engine.runner = ends.enter_context(Leader(llm.engine.runner, nodes.host))
                return llm

            try:
                serve(load, settings)
            except EngineFailed as failed:
                print(f"jaxtp: {failed}", file=sys.stderr)
                raise SystemExit(1) from None


def with_config(arguments: Sequence[str]) -> list[str]:
    """The arguments with the flags of the file that --config names before them. Raises ValueError that names the file."""
    given = [part for argument in arguments for part in (argument.split("=", 1) if argument[:9] == "--config=" else [argument])]
    if "--config" not in given[:-1]:
        return [*arguments]
    at = given.index("--config")
    path, rest = given[at + 1], given[:at] + given[at + 2 :]
    found = files.read_yaml(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold flags, one a line, such as max-model-len: 8192")
    known, own = flags(Serve, "jaxtp serve"), []
    if rest[:1] and not rest[0].startswith("-"):
        found.pop("model", None)
    for name, value in found.items():
        flag = f"--{str(name).replace('_', '-')}"
        if flag not in known or flag == "--config":
            raise ValueError(f"{path}: {name} is no flag of jaxtp serve (jaxtp serve --help lists all)")
        own += _flag(flag, value, known)
    positional = rest[:1] if rest[:1] and not rest[0].startswith("-") else []
    return [*positional, *own, *rest[len(positional) :]]


def _flag(flag: str, value: Any, known: Sequence[str]) -> list[str]:
    if isinstance(value, bool):
        off = f"--no-{flag[2:]}"
        return [flag] if value else [off] if off in known else []
    return [flag, *map(str, value if isinstance(value, list) else [value])]
