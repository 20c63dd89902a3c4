"""Verbs that run a model or make one: generate, chat, train, export, quantize."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import signal
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxtp.cli.options import Alias, Engine, Flag, Launch, Model, ModelFlag, Sampling, one_model, writable
from jaxtp.cli.parse import parse, parse_known
from jaxtp.cli.prompts import Asked, read_prompts
from jaxtp.cli.show import jsonl, print_stream, printed

if TYPE_CHECKING:
    from jaxtp import LLM


@dataclass(frozen=True)
class Generate:
    """Complete prompts."""

    model: Model = None
    """Checkpoint folder, hub id, or "demo" (the default): a small model that ships with jaxtp and writes like Shakespeare."""
    named_model: ModelFlag = None
    """The same."""
    prompt: Annotated[tuple[str, ...], Alias(metavar="TEXT [TEXT ...]")] = ()
    """Prompts, given here; the completions are printed."""
    prompts_file: Path | None = None
    """Prompts from a file: one a line, or JSON (.jsonl, .json) with "prompt" or "prompt_token_ids" and, where they differ from
    the flags, settings such as "max_tokens"; "-" is standard input, of either kind."""
    output: Path | None = None
    """Where to write JSONL; default standard output."""
    stream: Flag = False
    """Print the text as it comes."""
    engine: tyro.conf.OmitArgPrefixes[Engine] = field(default_factory=Engine)
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    launch: tyro.conf.OmitArgPrefixes[Launch] = field(default_factory=Launch)

    def run(self) -> None:
        """Generates and prints."""
        if bool(self.prompt) == (self.prompts_file is not None):
            raise ValueError("give either --prompt TEXT or --prompts-file FILE")
        writable("--output", self.output)
        model = one_model(self.model, self.named_model, verb="generate", default="demo")
        params = self.sampling.params()
        asked: list[Asked] = [(_said(text), params) for text in self.prompt]
        if self.prompts_file:
            asked = read_prompts(self.prompts_file, params)
        if self.stream and (self.output or any(how.n > 1 for _, how in asked)):
            raise ValueError("--stream prints one completion of each prompt; it goes with neither --output nor --n")
        self.engine.see_devices()
        with self.launch.join() as nodes:
            speaks = nodes is None or nodes.index == 0
            if nodes:
                _same_everywhere([(prompt, dataclasses.asdict(how)) for prompt, how in asked])
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX keeps it for training, which saves first
            with contextlib.nullcontext() if speaks else contextlib.redirect_stdout(io.StringIO()):
                self._generate(self.engine.llm(model), asked, writes=speaks)

    def _generate(self, llm: LLM, asked: list[Asked], *, writes: bool) -> None:
        if self.stream:
            for prompt, params in asked:  # one after another: they would interleave
                print_stream(llm.stream(prompt, params))
            return
        prompts, params_of_each = zip(*asked, strict=True)
        requests = llm.generate(prompts, params_of_each)
        if self.prompts_file is None and self.output is None:
            print(printed(requests))
        elif self.output is None:
            sys.stdout.write(jsonl(requests))
        elif writes:
            self.output.write_text(jsonl(requests), encoding="utf-8")


@dataclass(frozen=True)
class Chat:
    """Talk with a model that has a chat template. An empty line or end of input ends it."""

    model: Model = None
    """Checkpoint folder or hub id."""
    named_model: ModelFlag = None
    """The same."""
    system: str | None = None
    """The system message."""
    engine: tyro.conf.OmitArgPrefixes[Engine] = field(default_factory=Engine)
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=lambda: Sampling(max_tokens=1024))

    def run(self) -> None:
        """Reads, answers, and remembers."""
        params = self.sampling.params()
        llm = self.engine.llm(one_model(self.model, self.named_model, verb="chat"))
        messages = [{"role": "system", "content": self.system}] if self.system else []
        llm.chat_prompts([[*messages, {"role": "user", "content": ""}]])  # no template: say it before asking
        while question := _ask():
            messages.append({"role": "user", "content": question})
            answer = print_stream(llm.stream(llm.chat_prompts(messages), params))
            messages.append({"role": "assistant", "content": answer})


@dataclass(frozen=True)
class _Start:
    """What `jaxtp train` takes beside the settings of the run."""

    launch: tyro.conf.OmitArgPrefixes[Launch] = field(default_factory=Launch)
    no_compilation_cache: Flag = False


@dataclass(frozen=True)
class Train:
    """Train or fine-tune as a YAML file says; flags after it change single settings (--optimizer.learning-rate 1e-3)."""

    config: Annotated[tyro.conf.Positional[Path], Alias(metavar="RUN.yaml")]
    """Such as configs/train/demo.yaml. Over several nodes: the flags --nnodes ... of `jaxtp generate --help`."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()

    def run(self) -> None:
        """Trains; exit code 75 after SIGTERM (saved, start again), 76 where the run diverged."""
        from jaxtp import compilation_cache, train, use_virtual_devices

        prog = f"jaxtp train {self.config}"
        start, overrides = parse_known(_Start, self.overrides, prog=prog, add_help=False)
        if start.no_compilation_cache:
            compilation_cache.switch_off()
        config = parse(train.TrainConfig, overrides, prog=prog, default=train.load(self.config))
        if config.parallel.virtual_devices:
            use_virtual_devices(config.parallel.virtual_devices)
        code = 0
        with start.launch.join() as nodes:
            try:
                train.train(config)
            except (train.Preempted, train.Diverged) as stopped:  # on all nodes alike
                if nodes is None or nodes.index == 0:
                    print(f"jaxtp: {stopped}", file=sys.stderr)
                code = train.PREEMPTED if isinstance(stopped, train.Preempted) else train.NON_FINITE
        if code:
            raise SystemExit(code)


@dataclass(frozen=True)
class Export:
    """Write a run's last checkpoint as a Hugging Face folder, with its tokenizer."""

    run_folder: Annotated[tyro.conf.Positional[Path], Alias(metavar="RUN")]
    """The folder of the run."""
    folder: Annotated[tyro.conf.Positional[Path], Alias(metavar="FOLDER")]
    """Where to write."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights written; default the one that the run computed in."""
    step: int | None = None
    """The checkpoint of this step; default the last one."""
    best: Flag = False
    """The checkpoint with the lowest validation loss."""
    adapter: Flag = False
    """Of a LoRA run the adapter alone, in PEFT's format, in place of the model that it is merged into."""
    overwrite: Flag = False
    """Replace the checkpoint that stands in the folder."""

    def run(self) -> None:
        """Exports."""
        from jaxtp import train

        train.export(
            self.run_folder,
            self.folder,
            dtype=self.dtype,
            step=self.step,
            best=self.best,
            adapter=self.adapter,
            overwrite=self.overwrite,
        )


@dataclass(frozen=True)
class Quantize:
    """Write a checkpoint's weights in few bits, for vLLM, transformers and jaxtp."""

    model: Annotated[tyro.conf.Positional[str], Alias(metavar="MODEL")]
    """Checkpoint folder or hub id, of 16 or 32 bits."""
    folder: Annotated[tyro.conf.Positional[Path], Alias(metavar="FOLDER")]
    """Where to write."""
    scheme: Literal["w4a16", "w8a16", "fp8"] = "w4a16"
    """w4a16: int4 in groups of 128 inputs; w8a16: int8, a scale for each output; fp8: e4m3, the same."""
    format: Literal["compressed-tensors"] = "compressed-tensors"
    """How files hold it."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    def run(self) -> None:
        """Quantizes."""
        from jaxtp.checkpoint.compress import quantize

        quantize(self.model, self.folder, scheme=self.scheme, revision=self.revision)


def _same_everywhere(asked: Any) -> None:
    """Raises ValueError where the processes of a job were not asked the same."""
    import numpy as np
    from jax.experimental import multihost_utils

    mine = zlib.crc32(json.dumps(asked, default=str).encode())
    if len(set(multihost_utils.process_allgather(np.uint32(mine)).tolist())) > 1:
        raise ValueError("the nodes were given different prompts or sampling flags; all of them must be given the same")


def _said(text: str) -> str:
    """A prompt of the command line. Raises ValueError for bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"--prompt {text!r} is not UTF-8 text") from None
    return text


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
