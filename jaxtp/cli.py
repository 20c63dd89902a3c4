"""The `jaxtp` command: each verb a few lines that call the library. Flags are vLLM's where it has them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    pipeline_parallel_size: Annotated[int, Alias(aliases=["-pp"])] = 1
    """Stages that the layers are split into, one behind another."""
    data_parallel_size: Annotated[int, Alias(aliases=["-dp"])] = 1
    """Groups of devices that share the batch."""
    layers_per_stage: tuple[int, ...] | None = None
    """The sizes of the stages; default balanced."""
    plan: Literal["auto"] | None = None
    """auto: all devices at hand, in the layout that `jaxtp plan` holds best for one request."""
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
    tp_across_nodes: Flag = False
    """Let tensor parallelism go over the network."""
    hf_overrides: str | None = None
    """JSON object laid over config.json; null removes a key."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    seed: int = 0
    """Of requests that have none."""
    virtual_devices: int | None = None
    """Run on this many virtual CPU devices."""

    def see_devices(self) -> None:
        """Before anything touches one."""
        from jaxtp import use_virtual_devices
        from jaxtp.generate import memory

        memory.reserve(self.gpu_memory_utilization)
        if self.virtual_devices is not None:
            use_virtual_devices(self.virtual_devices)

    def llm(self, model: str) -> LLM:
        """The LLM that these arguments describe."""
        import jax

        from jaxtp import LLM

        self.see_devices()
        if jax.config.values.get("jax_compilation_cache_dir") is None:  # a second start compiles nothing
            jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/jaxtp/compiled").expanduser()))
        arguments = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "virtual_devices"}
        arguments["tp_plan"] = self.tp_plan if self.tp_plan == "auto" else _object(Path(self.tp_plan).read_text(), "--tp-plan")
        arguments["hf_overrides"] = _object(self.hf_overrides, "--hf-overrides") if self.hf_overrides else None
        return LLM(model, **arguments)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Several processes, one a node. Slurm, Open MPI and Kubernetes tell by themselves; elsewhere these flags do."""

    nnodes: int | None = None
    """How many nodes there are."""
    node_rank: int | None = None
    """Which one this is, from 0."""
    master_addr: str | None = None
    """Where the first one is."""
    master_port: int | None = None
    """A port there, of which the next one is used as well; default 29500."""
    join_timeout: float = 300.0
    """Seconds for all to be there."""
    silence_timeout: float = 60.0
    """Seconds without a sign of life after which a node is given up, and all end."""

    @contextlib.contextmanager
    def join(self) -> Iterator[Any]:
        """All of them together, for the time of a `with` block."""
        from jaxtp.distributed import processes

        joined = processes(
            nnodes=self.nnodes,
            node_rank=self.node_rank,
            master_addr=self.master_addr,
            master_port=self.master_port,
            timeout=self.join_timeout,
            silence=self.silence_timeout,
        )
        with joined as nodes, _mistakes() if nodes else contextlib.nullcontext():  # so that the exit code is known in there
            yield nodes


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
        if self.output and not self.output.absolute().parent.is_dir():
            raise FileNotFoundError(f"--output: there is no folder {self.output.absolute().parent}")
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
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    step: int | None = None
    """The checkpoint of this step; default the last one."""

    def run(self) -> None:
        """Exports."""
        from jaxtp import train

        train.export(self.run_folder, self.folder, dtype=self.dtype, step=self.step)


@dataclass(frozen=True)
class PlanVerb:
    """Every way to run a model on given GPUs: what fits, what it costs, which is best and why. Needs no GPU."""

    model: tyro.conf.Positional[str]
    """Preset (llama-3.1-70b) or checkpoint folder, of which config.json is read."""
    gpus: str
    """Such as 8xH100, or 2x8xH100 for two nodes of eight."""
    task: Literal["generate", "train"] = "generate"
    objective: Literal["latency", "throughput", "memory"] | None = None
    """What is best; default latency to generate, throughput to train."""
    batch: int | None = None
    """Prompts at once (default 1; for throughput as many as fit), or rows of an update (default 64)."""
    prompt_len: int = 1024
    """Tokens of a prompt."""
    output_len: int = 256
    """Tokens of a completion."""
    seq_len: int = 4096
    """Tokens of a row to train on."""
    max_model_len: int | None = None
    """Tokens of a request at most, for the concurrency; default prompt and output."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    gpu_memory_utilization: float | None = None
    """Share of each GPU that may be used; default 0.9 to generate, 0.95 to train."""
    interconnect: Literal["nvlink", "pcie"] | None = None
    """What joins the GPUs of a node; default the best that they have."""
    network: Literal["infiniband", "infiniband-hdr", "ethernet-100"] = "infiniband"
    """What joins nodes."""
    gpu_file: Path | None = None
    """YAML with more GPUs, or other figures of known ones."""
    tp_across_nodes: Flag = False
    """Let tensor parallelism go over the network."""
    all: Flag = False
    """Show every layout, and every reason against one."""
    json: Flag = False
    """Print all of it as JSON."""
    plot: Path | None = None
    """Write a picture: latency against throughput, or where the time of a training step goes."""
    compile: Flag = False
    """Compile the best plan's programs for these GPUs, and show the predictions beside what the compiler says."""
    virtual: Flag = False
    """With --compile: for virtual CPU devices instead."""

    def run(self) -> None:
        """Plans and prints."""
        from jaxtp.planner import plan

        self._check()
        shown = {"model", "gpus", "gpu_memory_utilization", "all", "json", "plot", "compile", "virtual"}
        asked: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in shown}
        plans = plan(self.model, self.gpus, utilization=self.gpu_memory_utilization, **asked)
        if self.plot:
            plans.draw().savefig(self.plot, dpi=150)
        if self.json:
            print(json.dumps(plans.records(), indent=1))
        else:
            plans.print(every=self.all)
        if self.compile:
            self._compile(plans.best)

    def _check(self) -> None:
        """Raises ValueError for flags that contradict each other."""
        if self.virtual and not self.compile:
            raise ValueError("--virtual says what to --compile for")
        if self.json and self.compile:
            raise ValueError("--json and --compile exclude one another")
        if self.task == "train" and self.max_model_len:
            raise ValueError("--max-model-len is of generation; --task train has --seq-len")

    def _compile(self, best: Any) -> None:
        from jaxtp import use_virtual_devices

        if self.virtual:
            use_virtual_devices(best.split.size)
        from jaxtp.audit.check import check

        check(best, virtual=self.virtual).print()


VERBS: dict[str, Callable[..., Any]] = {
    "generate": Generate,
    "chat": Chat,
    "train": Train,
    "export": Export,
    "plan": PlanVerb,
}


def main() -> None:
    """The command line. Mistakes end with one line and exit code 2; with JAXTP_DEBUG=1, with the traceback."""
    warnings.simplefilter("default")
    arguments, rest = sys.argv[1:], []
    if arguments[:1] == ["train"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        arguments, rest = arguments[:2], arguments[2:]  # what follows the file are settings of the run
    command = tyro.extras.subcommand_cli_from_dict(
        VERBS, args=arguments, prog="jaxtp", description="A Llama on more than one GPU, in JAX."
    )
    try:
        with _mistakes():
            (dataclasses.replace(command, overrides=tuple(rest)) if rest else command).run()
    except BrokenPipeError:  # whoever read has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _mistakes() -> Iterator[None]:
    """One line, and the exit code, for what a user got wrong."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if os.environ.get("JAXTP_DEBUG"):
            raise
        print(f"jaxtp: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


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


def _object(text: str, flag: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{flag} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{flag} must be a JSON object, not {text}")
    return found


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
