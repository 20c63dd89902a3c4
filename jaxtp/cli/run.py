"""Verbs that run a model: generate, chat, train, export."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import signal
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxtp.cli.options import Alias, Engine, Flag, Launch, Sampling, writable

if TYPE_CHECKING:
    from jaxtp import LLM, RequestOutput, SamplingParams


@dataclass(frozen=True)
class Generate:
    """Complete prompts."""

    model: tyro.conf.Positional[str] = "demo"
    """Checkpoint folder, hub id, or "demo": a small model that ships with jaxtp and writes like Shakespeare."""
    prompt: Annotated[tuple[str, ...], Alias(metavar="TEXT [TEXT ...]")] = ()
    """Prompts, given here; the completions are printed."""
    prompts_file: Path | None = None
    """Prompts from a file: one a line, or JSONL with "prompt" or "prompt_token_ids"; "-" is standard input, of either kind."""
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
        if self.stream and (self.output or self.sampling.n > 1):
            raise ValueError("--stream prints one completion of each prompt; it goes with neither --output nor --n")
        if self.prompt and not self.output and self.sampling.logprobs is not None:
            raise ValueError("--logprobs are not part of the text that is printed; --output FILE has them")
        writable("--output", self.output)
        prompts: list[str | list[int]] = [*self.prompt] or [*_read_prompts(self.prompts_file)]
        params = self.sampling.params()
        self.engine.see_devices()
        with self.launch.join() as nodes:
            speaks = nodes is None or nodes.index == 0
            if nodes:
                _same_everywhere([prompts, dataclasses.asdict(params)])
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX keeps it for training, which saves first
            with contextlib.nullcontext() if speaks else contextlib.redirect_stdout(io.StringIO()):
                self._generate(self.engine.llm(self.model), prompts, params, writes=speaks)

    def _generate(self, llm: LLM, prompts: list[str | list[int]], params: SamplingParams, *, writes: bool) -> None:
        if self.stream:
            for prompt in prompts:  # one after another: they would interleave
                _print_stream(llm.stream(prompt, params))
            return
        requests = llm.generate(prompts, params)
        if self.prompts_file is None and self.output is None:
            print("\n\n".join(f"{request.prompt}{output.text}" for request in requests for output in request.outputs))
            return
        lines = "".join(json.dumps(_record(request), ensure_ascii=False) + "\n" for request in requests)
        if self.output and writes:
            self.output.write_text(lines)
        elif not self.output:
            sys.stdout.write(lines)


@dataclass(frozen=True)
class Chat:
    """Talk with a model that has a chat template. An empty line or end of input ends it."""

    model: tyro.conf.Positional[str]
    """Checkpoint folder or hub id."""
    system: str | None = None
    """The system message."""
    engine: tyro.conf.OmitArgPrefixes[Engine] = field(default_factory=Engine)
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=lambda: Sampling(max_tokens=1024))

    def run(self) -> None:
        """Reads, answers, and remembers."""
        params = self.sampling.params()
        llm = self.engine.llm(self.model)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        llm.chat_prompts([[*messages, {"role": "user", "content": ""}]])  # no template: say it before asking
        while question := _ask():
            messages.append({"role": "user", "content": question})
            answer = _print_stream(llm.stream(llm.chat_prompts(messages), params))
            messages.append({"role": "assistant", "content": answer})


@dataclass(frozen=True)
class Train:
    """Train or fine-tune as a YAML file says; flags after it change single settings (--optimizer.learning-rate 1e-3)."""

    config: tyro.conf.Positional[Path]
    """YAML file, such as configs/train/demo.yaml. Over several nodes: the flags --nnodes ... of `jaxtp generate --help`."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()

    def run(self) -> None:
        """Trains; exit code 75 after SIGTERM (saved, start again), 76 where the run diverged."""
        from jaxtp import train, use_virtual_devices

        launch, overrides = tyro.cli(Launch, args=self.overrides, return_unknown_args=True, add_help=False)
        config = train.load(self.config, overrides, prog=f"jaxtp train {self.config}")
        if config.parallel.virtual_devices:
            use_virtual_devices(config.parallel.virtual_devices)
        code = 0
        with launch.join() as nodes:
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

    run_folder: tyro.conf.Positional[Path]
    """The folder of the run."""
    folder: tyro.conf.Positional[Path]
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
        from jaxtp.log import show

        show()
        train.export(
            self.run_folder,
            self.folder,
            dtype=self.dtype,
            step=self.step,
            best=self.best,
            adapter=self.adapter,
            overwrite=self.overwrite,
        )


def _same_everywhere(asked: Any) -> None:
    """Raises ValueError where the processes of a job were not asked the same."""
    import numpy as np
    from jax.experimental import multihost_utils

    mine = zlib.crc32(json.dumps(asked, default=str).encode())
    if len(set(multihost_utils.process_allgather(np.uint32(mine)).tolist())) > 1:
        raise ValueError("the nodes were given different prompts or sampling flags; all of them must be given the same")


def _read_prompts(path: Path | None) -> Iterator[str | list[int]]:
    """Prompts of a file: a line is a text, or a JSON object with "prompt" (text) or "prompt_token_ids"."""
    assert path is not None
    text = sys.stdin.read() if str(path) == "-" else path.read_text()
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    jsonl = path.suffix == ".jsonl" or (str(path) == "-" and all(line.startswith('{"') for _, line in lines))
    for number, line in lines:
        if not jsonl:
            yield line
            continue
        try:
            record = json.loads(line)
            prompt = record["prompt"] if "prompt" in record else record["prompt_token_ids"]
            if not isinstance(prompt, str | list):
                raise TypeError
            yield prompt
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path}:{number} is not a JSON object with "prompt" or "prompt_token_ids"') from error


def _record(request: RequestOutput) -> dict:
    return {
        "prompt": request.prompt,
        "prompt_token_ids": request.prompt_token_ids,
        "outputs": [dataclasses.asdict(output) for output in request.outputs],
    }


def _print_stream(stream: Iterator[RequestOutput]) -> str:
    """Prints the completion of one prompt as it grows, and returns it."""
    shown, text = 0, ""
    for request in stream:
        text = request.outputs[0].text
        whole = f"{request.prompt or ''}{text}"
        sys.stdout.write(whole[shown:])
        sys.stdout.flush()
        shown = len(whole)
    sys.stdout.write("\n")
    return text


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
