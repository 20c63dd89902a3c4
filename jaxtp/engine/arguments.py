"""What `LLM` is given, looked at before anything is loaded, and requests before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from jaxtp import checks
from jaxtp.config import ModelConfig
from jaxtp.engine.params import SamplingParams
from jaxtp.engine.work import Policy
from jaxtp.model import Llama


def check_engine(
    model: Any,
    *,
    counts: Mapping[str, Any],
    layers_per_stage: Any,
    max_model_len: Any,
    gpu_memory_utilization: Any,
    load_format: Any,
    hf_overrides: Any,
    seed: Any,
    switches: Mapping[str, Any],
    policy: Any,
) -> None:
    """Raises TypeError for arguments of another type than they must be and ValueError for those out of bounds, by name."""
    if not isinstance(model, str | Path | Llama):
        raise TypeError(f"model={model!r} must be a checkpoint folder, a hub id, a preset's name, or a Llama")
    if load_format not in ("auto", "safetensors", "dummy"):
        raise ValueError(f'load_format={load_format!r} must be "auto", "safetensors" or "dummy"')
    for name, value in counts.items():
        checks.whole(name, value, least=1, most=checks.INT32)
    for size in () if layers_per_stage is None else _listed("layers_per_stage", layers_per_stage):
        checks.whole("layers_per_stage", size, least=1)
    if max_model_len is not None:
        checks.whole("max_model_len", max_model_len, least=1)
    if not checks.number(gpu_memory_utilization):
        raise TypeError(f"gpu_memory_utilization={gpu_memory_utilization!r} must be a number")
    if not 0 < gpu_memory_utilization <= 1:
        raise ValueError(f"gpu_memory_utilization={gpu_memory_utilization} must be in (0, 1]")
    if hf_overrides is not None and not isinstance(hf_overrides, Mapping):
        raise TypeError(f"hf_overrides={hf_overrides!r} must be a dict of keys of config.json")
    if policy not in get_args(Policy):
        raise ValueError(f"scheduling_policy={policy!r} is none of {', '.join(get_args(Policy))}")
    checks.seed("seed", seed)
    checks.flags(**switches)


def check_request(params: SamplingParams, config: ModelConfig, max_model_len: int) -> None:
    """Raises ValueError for what a model of that vocabulary and context cannot give."""
    size, bound = config.vocab_size, "the size of the vocabulary"
    if params.logprobs is not None:
        checks.whole("logprobs", params.logprobs, least=0, most=size, bound=bound)
    checks.whole("top_k", params.top_k, least=-1, most=size, bound=bound)
    checks.whole("min_tokens", params.min_tokens, least=0, most=max_model_len, bound="max_model_len")
    for name, ids in (("logit_bias", list(params.logit_bias)), ("stop_token_ids", params.stop_token_ids)):
        check_ids(name, ids, size)


def check_prompt(prompt: Sequence[int], config: ModelConfig, max_model_len: int) -> None:
    """Raises ValueError for token ids that such a model does not have, none, or too many."""
    if not prompt:
        raise ValueError("a prompt has no tokens")
    if len(prompt) >= max_model_len:
        raise ValueError(
            f"a prompt has {len(prompt)} tokens, but max_model_len is {max_model_len}, of which one is for the completion"
        )
    check_ids("a prompt", prompt, config.vocab_size)


def check_ids(where: str, ids: Sequence[int], size: int) -> None:
    """Raises ValueError for token ids outside of a vocabulary of that size."""
    wrong = [token for token in ids if not 0 <= token < size]
    if wrong:
        raise ValueError(f"{where} has token ids {wrong[:5]}, outside the vocabulary of {size}")


def _listed(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name}={value!r} must be a list of ints")
    return value
