"""The `jaxtp` command: each verb a few lines that call the library. Flags are vLLM's where it has them."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:  # the verbs import what they need: `--help` answers at once
    from jaxtp import LLM, RequestOutput, SamplingParams

Alias = tyro.conf.arg
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]  # --flag alone, no --no-flag


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How the model is loaded and laid out: the arguments of `jaxtp.LLM`."""

    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, where it is not the model's."""
    tensor_parallel_size: Annotated[int, Alias(aliases=["-tp"])] = 1
    """Devices that share each layer."""
    data_parallel_size: Annotated[int, Alias(aliases=["-dp"])] = 1
    """Groups of devices that share the batch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the checkpoint's."""
    max_model_len: int | None = None
    """Tokens of prompt and completion together; default the model's own."""
    gpu_memory_utilization: float = 0.9
    """Share of each device's memory for weights and KV cache."""
    max_num_seqs: int = 256
    """Rows that run together."""
    max_num_batched_tokens: int = 8192
    """Prompt tokens that one prefill call takes."""
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    """dummy: random weights; MODEL may then be a preset such as llama-3.1-8b."""
    tp_plan: str = "auto"
    """auto, or a JSON file of globs to styles (colwise, rowwise, ...)."""
    sequence_parallel: Flag = False
    """Shard the residual stream over tokens."""
    kernel: Literal["reference", "xla", "cudnn"] | None = None
    """Attention kernel; default chosen by device and shapes."""
    hf_overrides: str | None = None
    """JSON object laid over config.json; null removes a key."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    seed: int = 0
    """Of requests that have none."""
    virtual_devices: int | None = None
    """Run on this many virtual CPU devices."""

    def llm(self, model: str) -> LLM:
        """The LLM that these arguments describe."""
        import jax

        from jaxtp import LLM, use_virtual_devices

        if self.virtual_devices:
            use_virtual_devices(self.virtual_devices)
        if jax.config.values.get("jax_compilation_cache_dir") is None:  # a second start compiles nothing
            jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/jaxtp/compiled").expanduser()))
        arguments = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "virtual_devices"}
        arguments["tp_plan"] = self.tp_plan if self.tp_plan == "auto" else json.loads(Path(self.tp_plan).read_text())
        arguments["hf_overrides"] = json.loads(self.hf_overrides) if self.hf_overrides else None
        return LLM(model, **arguments)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen: the arguments of `jaxtp.SamplingParams`."""

    n: int = 1
    """Completions of each prompt."""
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Keep the likeliest tokens that hold this share of the probability."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0: all."""
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1: discourage tokens of the prompt and the text."""
    presence_penalty: float = 0.0
    """Above 0: discourage tokens of the text."""
    frequency_penalty: float = 0.0
    """Above 0: discourage tokens by how often the text has them."""
    max_tokens: int = 128
    """The longest completion."""
    min_tokens: int = 0
    """No end before that many."""
    stop: tuple[str, ...] = ()
    """Strings that end the text."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the text."""
    ignore_eos: Flag = False
    """Go on after the end-of-sequence token."""
    logprobs: int | None = None
    """Report the log-probabilities of this many alternatives."""
    request_seed: Annotated[int | None, Alias(name="sampling-seed")] = None
    """Fixes the tokens of every request."""

    def params(self) -> SamplingParams:
        """The SamplingParams that these arguments describe."""
        from jaxtp import SamplingParams

        arguments = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "request_seed"}
        return SamplingParams(**arguments, seed=self.request_seed)


@dataclass(frozen=True)
class Generate:
    """Complete prompts."""

    model: tyro.conf.Positional[str]
    """Checkpoint folder or hub id."""
    prompt: Annotated[tuple[str, ...], Alias(metavar="TEXT [TEXT ...]")] = ()
    """Prompts, given here; the completions are printed."""
    prompts_file: Path | None = None
    """Prompts from a file: one a line, or JSONL with a "prompt" in each; "-" is standard input."""
    output: Path | None = None
    """Where to write JSONL; default standard output."""
    stream: Flag = False
    """Print the text as it comes."""
    engine: tyro.conf.OmitArgPrefixes[Engine] = field(default_factory=Engine)
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=Sampling)

    def run(self) -> None:
        """Generates and prints."""
        if not self.prompt and self.prompts_file is None:
            raise ValueError("give --prompt TEXT or --prompts-file FILE")
        prompts: list[str | list[int]] = [*self.prompt] or [*_read_prompts(self.prompts_file)]
        params = self.sampling.params()
        llm = self.engine.llm(self.model)
        if self.stream:
            _print_stream(llm.stream(prompts, params))
            return
        requests = llm.generate(prompts, params)
        if self.prompts_file is None and self.output is None:
            print("\n\n".join(f"{request.prompt}{output.text}" for request in requests for output in request.outputs))
            return
        lines = "".join(json.dumps(_record(request), ensure_ascii=False) + "\n" for request in requests)
        if self.output:
            self.output.write_text(lines)
        else:
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


def main() -> None:
    """The command line. Mistakes of the user end with one line and exit code 2."""
    warnings.simplefilter("default")
    command = tyro.extras.subcommand_cli_from_dict(
        {"generate": Generate, "chat": Chat}, prog="jaxtp", description="A Llama on more than one GPU, in JAX."
    )
    try:
        command.run()
    except (ValueError, TypeError, FileNotFoundError) as error:
        print(f"jaxtp: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _read_prompts(path: Path | None) -> Iterator[str | list[int]]:
    """Prompts of a file: a line is a text, or a JSON object with "prompt" (text) or "prompt_token_ids"."""
    assert path is not None
    text = sys.stdin.read() if str(path) == "-" else path.read_text()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield line
            continue
        try:
            record = json.loads(line)
            yield record["prompt"] if "prompt" in record else record["prompt_token_ids"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path}:{number} is not a JSON object with "prompt" or "prompt_token_ids"') from error


def _record(request: RequestOutput) -> dict:
    return {
        "prompt": request.prompt,
        "prompt_token_ids": request.prompt_token_ids,
        "outputs": [dataclasses.asdict(output) for output in request.outputs],
    }


def _print_stream(stream: Iterator[RequestOutput]) -> str:
    """Prints the first completion of each prompt as it grows; several prompts follow one another."""
    done = ""
    texts: dict[int, str] = {}
    for request in stream:
        output = request.outputs[0]
        if request.request_id not in texts and isinstance(request.prompt, str):
            sys.stdout.write(request.prompt)
        sys.stdout.write(output.text[len(texts.get(request.request_id, "")) :])
        sys.stdout.flush()
        texts[request.request_id] = done = output.text
    sys.stdout.write("\n")
    return done


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
