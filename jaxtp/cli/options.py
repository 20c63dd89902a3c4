"""Flags that several verbs share. They are vLLM's where it has them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxtp import files
from jaxtp.buckets import MAX_NUM_SEQS
from jaxtp.config.quantization import Quantization

if TYPE_CHECKING:  # the verbs import what they need: `--help` answers at once
    from jaxtp import LLM, SamplingParams

Alias = tyro.conf.arg
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]  # --flag alone, no --no-flag
Model = Annotated[tyro.conf.Positional[str | None], Alias(metavar="MODEL")]
ModelFlag = Annotated[str | None, Alias(name="model", metavar="MODEL")]  # vLLM's way to say it


def one_model(positional: str | None, flag: str | None, *, verb: str, default: str | None = None) -> str:
    """MODEL or --model MODEL. Raises ValueError where two are given that differ, and where none is and there is no default."""
    if positional is None and flag is None:
        if default is not None:
            return default
        raise ValueError(f"which model? jaxtp {verb} MODEL, a checkpoint folder or a hub id (jaxtp {verb} --help)")
    if None not in (positional, flag) and positional != flag:
        raise ValueError(f"two models were given, {positional} and --model {flag}; give one")
    return str(flag if positional is None else positional)


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
    expert_parallel_size: Annotated[int, Alias(aliases=["-ep"])] = 1
    """Groups of devices that hold different experts, and share the batch."""
    context_parallel_size: Annotated[int, Alias(aliases=["-cp"])] = 1
    """Devices over which the KV cache of each row is spread, beside tp."""
    layers_per_stage: tuple[int, ...] | None = None
    """The sizes of the stages; default balanced."""
    plan: Literal["auto"] | None = None
    """auto: all devices at hand, in the layout that `jaxtp plan` holds best for one request."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the checkpoint's."""
    quantization: Quantization | None = None
    """int8, fp8, int4: round the weights of the layers at load; else the checkpoint's own, which may be named."""
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = "auto"
    """int8, fp8: keep keys and values in 8 bits, with a scale for each token and head."""
    compress_all_reduce: Literal["int8"] | None = None
    """int8: send what tp sums in 8 bits, for slow links such as PCIe."""
    lora: str | None = None
    """Adapter in PEFT's format (folder or hub id), merged into the weights as they are loaded."""
    max_model_len: int | None = None
    """Tokens of prompt and completion together; default the model's own."""
    gpu_memory_utilization: float = 0.9
    """Share of each device's memory for weights and KV cache."""
    kv_cache_memory_bytes: int | None = None
    """What the KV cache takes of each device; default what the weights leave of that share (on CPUs 1 GiB)."""
    max_num_seqs: int = MAX_NUM_SEQS
    """Rows that run together."""
    max_num_batched_tokens: int | None = None
    """Tokens of one step; default as many as it can have before it takes longer."""
    enable_prefix_caching: bool = True
    """Prompts that begin alike share what was computed for them."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """priority: requests with a lower priority number go first."""
    max_num_queued: int | None = None
    """Completions that may wait; default any number."""
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    """dummy: random weights; MODEL may then be a preset such as llama-3.1-8b."""
    tp_plan: str = "auto"
    """auto, or a JSON file of globs to styles (colwise, rowwise, ...)."""
    sequence_parallel: Flag = False
    """Shard the residual stream over tokens."""
    kernel: Literal["reference", "xla", "cudnn"] | None = None
    """Attention kernel; default chosen by device and shapes."""
    expert_layout: Literal["auto", "whole", "width"] = "auto"
    """How experts are cut over tp: whole ones, or each one's width; auto: whole where their number allows it."""
    expert_dispatch: Literal["gather", "ragged"] = "gather"
    """How tokens come to experts on ep: all to all of its devices, or each to those that it chose."""
    expert_kernel: Literal["reference", "chosen", "pairs", "every", "blocks", "runs", "batched", "grouped"] | None = None
    """How experts multiply; default chosen by device and shapes."""
    tp_across_nodes: Flag = False
    """Let tensor and context parallelism go over the network."""
    hf_overrides: str | None = None
    """JSON object laid over config.json; null removes a key."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    seed: int = 0
    """Of requests that have none."""
    virtual_devices: int | None = None
    """Run on this many virtual CPU devices."""
    no_compilation_cache: Flag = False
    """Keep no compiled programs for the next start (as JAXTP_COMPILATION_CACHE=0)."""

    def see_devices(self) -> None:
        """Before anything touches one."""
        from jaxtp import compilation_cache, use_virtual_devices
        from jaxtp.generate import memory

        if self.no_compilation_cache:
            compilation_cache.switch_off()
        memory.reserve(self.gpu_memory_utilization)
        if self.virtual_devices is not None:
            use_virtual_devices(self.virtual_devices)

    def llm(self, model: str) -> LLM:
        """The LLM that these arguments describe."""
        from jaxtp import LLM

        self.see_devices()
        of_the_process = ("virtual_devices", "no_compilation_cache")
        arguments = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in of_the_process}
        arguments["tp_plan"] = self.tp_plan if self.tp_plan == "auto" else files.read_object(self.tp_plan)
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
        with joined as nodes, mistakes() if nodes else contextlib.nullcontext():  # so that the exit code is known in there
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


@contextlib.contextmanager
def mistakes() -> Iterator[None]:
    """One line, and the exit code, for what a user got wrong."""
    try:
        yield
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        told = _told(error)
        if told is None or os.environ.get("JAXTP_DEBUG"):
            raise
        print("jaxtp:", "; ".join(line.strip() for line in told.splitlines() if line.strip()), file=sys.stderr)
        raise SystemExit(2) from error


_SERVES = "serving needs more libraries: pip install 'jaxtp[serve]'"
EXTRAS = {
    "matplotlib": "pictures need matplotlib: pip install 'jaxtp[notebook]'",
    "aiohttp": "load on a server needs aiohttp: pip install 'jaxtp[bench]'",
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "prometheus_client"), _SERVES),
}


def _told(error: Exception) -> str | None:
    """What to say of an error; None for one that is no user's."""
    if isinstance(error, ModuleNotFoundError):
        return EXTRAS.get(str(error.name))
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    templates = sys.modules.get("jinja2")  # a chat template refuses, or is none
    if templates and isinstance(error, templates.TemplateError):
        return f"the chat template says: {error}"
    return str(error) if isinstance(error, ValueError | TypeError | OSError | RuntimeError) else None


def writable(flag: str, path: Path | None) -> None:
    """Raises FileNotFoundError or ValueError, before any work, where a file could not be written."""
    if path is None:
        return
    folder = files.local(path).absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{flag}: there is no folder {folder}")
    if path.is_dir():
        raise ValueError(f"{flag}: {path} is a folder, not a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"{flag}: {path} cannot be written")


def _object(text: str, flag: str) -> dict[str, Any]:
    found = files.parsed(text, flag)
    if not isinstance(found, dict):
        raise ValueError(f"{flag} must be a JSON object, not {text}")
    return found
