"""Flags and verbs of other programs (vLLM's first of all) that people bring: what to use instead here, or why there is none."""

from __future__ import annotations

_SERVER = "is a server's: `jaxtp serve MODEL` has it"
_PROXY = "is not there: what stands before a server (nginx, Caddy, an ingress) does that"
_CALLS = "is of tools that a model calls, and of its thoughts apart: not there yet"
_LOGS = "is not needed: requests are not logged (--access-log does it); --log-seconds says how often the state is"
_PAGES = "is not there: pages of the KV cache stay on the devices, as many as fit or as --kv-cache-memory-bytes says"
_SCHEDULER = "is not needed: prompts go along in chunks; --max-num-seqs and --max-num-batched-tokens say what runs together"
_COMPILED = "is not needed: every program is compiled, once for its shapes (--no-compilation-cache does not keep them)"
_PROCESSES = "is not needed: one process drives all devices of a node, and --nnodes joins nodes"
_CONFIG = "goes by config.json here: --hf-overrides '{\"rope_scaling\": {...}}' lays keys over it"
_TEXT_ONLY = "is of images and sound; the models here take text alone"
_TOKENIZER = "is not needed: --tokenizer names a folder or hub id, and its own files say the rest"

_GROUPS = {
    _SERVER: "host port api-key served-model-name allowed-origins trust-request-chat-template access-log",
    _PROXY: "root-path ssl-keyfile ssl-certfile ssl-ca-certs allow-credentials disable-fastapi-docs",
    _CALLS: "enable-auto-tool-choice tool-call-parser tool-parser-plugin reasoning-parser",
    _LOGS: "uvicorn-log-level disable-log-requests enable-log-requests disable-log-stats max-log-len "
    "disable-uvicorn-access-log",
    _PAGES: "swap-space block-size num-gpu-blocks-override cpu-offload-gb "
    "prefix-caching-hash-algo calculate-kv-scales use-v2-block-manager",
    _SCHEDULER: "enable-chunked-prefill num-scheduler-steps scheduler-delay-factor preemption-mode "
    "async-scheduling max-num-partial-prefills long-prefill-token-threshold disable-async-output-proc",
    _COMPILED: "enforce-eager compilation-config max-seq-len-to-capture cuda-graph-sizes optimization-level",
    _PROCESSES: "distributed-executor-backend worker-use-ray ray-workers-use-nsight disable-custom-all-reduce worker-cls "
    "api-server-count "
    "max-parallel-loading-workers data-parallel-backend",
    _CONFIG: "rope-scaling rope-theta",
    _TEXT_ONLY: "limit-mm-per-prompt mm-processor-kwargs mm-processor-cache-gb",
    _TOKENIZER: "tokenizer-mode tokenizer-revision skip-tokenizer-init tokenizer-pool-size use-fast",
}
_WHY = {
    **{flag: why for why, flags in _GROUPS.items() for flag in flags.split()},
    "trust-remote-code": "is not needed: no code of a checkpoint is ever run; leave it out",
    "device": "is not needed: JAX takes the GPUs that it sees; --virtual-devices N takes the CPU instead, as N devices",
    "download-dir": "is the variable HF_HOME here, as everywhere with Hugging Face's hub",
    "hf-token": "is the variable HF_TOKEN here, as everywhere with Hugging Face's hub",
    "attention-backend": "is --kernel here: reference, xla or cudnn",
    "enable-expert-parallel": "is --expert-parallel-size N here, over more devices; over tp experts are whole by default",
    "speculative-config": "is not there: every token is the model's own",
    "do-sample": "is --temperature here: 0 takes the likeliest token, above 0 draws",
    "greedy": "is --temperature 0 here, which is the default",
    "num-beams": "is not there: --n draws several completions",
    "load-in-8bit": "is --quantization int8 here",
    "load-in-4bit": "is --quantization int4 here",
    "device-map": "is not needed: --tensor-parallel-size and its fellows lay the model out, or --plan auto",
    "chat-template": "is not there: the template is the tokenizer's own; --tokenizer names another folder",
}
_RENAMED = {
    "max-new-tokens": "max-tokens",
    "max-length": "max-tokens",
    "input-file": "prompts-file",
    "output-file": "output",
    "prompt-file": "prompts-file",
    "model-name-or-path": "model",
    "torch-dtype": "dtype",
    "stop-sequences": "stop",
    "system-prompt": "system",
    "num-return-sequences": "n",
    "adapter": "lora",
    "enable-lora": "lora",
    "lora-modules": "lora",
    "base-url": "url",
    "max-concurrency": "concurrency",
    "random-input-len": "prompt-tokens",
    "input-len": "prompt-tokens",
    "random-output-len": "output-tokens",
    "output-len": "output-tokens",
    "num-warmups": "warmups",
    "dataset-path": "dataset",
    "rate": "request-rate",
    "num-requests": "num-prompts",
}
_VERBS = {
    "run-batch": "it is `jaxtp generate MODEL --prompts-file FILE --output FILE` here",
    "complete": "it is `jaxtp generate` here",
    "run": "it is `jaxtp generate` here",
    "finetune": "it is `jaxtp train` here",
    "collect-env": "it is `jaxtp doctor` here",
}


def why_not(flag: str) -> str | None:
    """What to say of a flag (--flag, --no-flag) that has no meaning here, after its name; None for one that nobody has."""
    return _WHY.get(_bare(flag))


def renamed(flag: str) -> str | None:
    """What such a flag is called here, if a verb has it."""
    name = _RENAMED.get(_bare(flag))
    return f"--{name}" if name else None


def verb(name: str) -> str | None:
    """What to say of another program's verb."""
    return _VERBS.get(name)


def _bare(flag: str) -> str:
    return flag.lstrip("-").removeprefix("no-")
