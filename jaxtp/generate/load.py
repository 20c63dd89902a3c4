"""What `LLM` is made of: a model on its mesh, its tokenizer, and the ids that end its texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtp.checkpoint import hf
from jaxtp.config import ModelConfig
from jaxtp.config.quantization import Quantization
from jaxtp.config.reader import token_ids
from jaxtp.files import read_object
from jaxtp.log import logger
from jaxtp.mesh import check_within_nodes, make_mesh
from jaxtp.model import Llama
from jaxtp.ops.attention import Kernel
from jaxtp.ops.coded import CacheDtype, check_cache_dtype
from jaxtp.ops.experts import Products
from jaxtp.parallel.circulate import staged
from jaxtp.parallel.compressed import Compression, check_compression, reducer
from jaxtp.parallel.context import Context
from jaxtp.parallel.experts import exchange
from jaxtp.parallel.stages import Stages
from jaxtp.planner import Split
from jaxtp.presets import PRESETS, preset
from jaxtp.sharding import ExpertDispatch, ExpertLayout, check_layout
from jaxtp.text import Tokenizer
from jaxtp.tp_plan import rules_from_plan


def load_model(
    model: str | Path,
    load_format: str,
    planned: Callable[[ModelConfig, str], Split],
    *,
    sizes: Sequence[int] | None,
    dtype: str | None,
    quantization: Quantization | None,
    kv_cache_dtype: CacheDtype,
    compress_all_reduce: Compression | None,
    lora: str | Path | None,
    tp_plan: str | Mapping[str, str],
    sequence_parallel: bool,
    expert_layout: ExpertLayout,
    expert_dispatch: ExpertDispatch,
    kernel: Kernel | None,
    expert_kernel: Products | None,
    across: bool,
    hf_overrides: Mapping[str, Any] | None,
    revision: str | None,
    progress: bool,
) -> Llama:
    """The model on its mesh. What is wrong with the config, or with tp, is said before any device is touched."""
    if lora is not None and load_format == "dummy":
        raise ValueError(f'lora={str(lora)!r} is merged into the weights of a checkpoint; load_format="dummy" reads none')
    named = load_format == "dummy" and str(model) in PRESETS
    try:
        folder = None if named else hf.resolve(model, revision=revision)
    except FileNotFoundError as error:
        if str(model) in PRESETS:
            raise FileNotFoundError(f'{error}; as a preset it needs load_format="dummy" (--load-format dummy)') from None
        if load_format == "dummy":
            raise FileNotFoundError(f"{error}; presets: {', '.join(PRESETS)}") from None
        raise
    if folder is None or load_format == "dummy":  # no weights are read
        source = preset(str(model)).to_hf() if folder is None else folder
        config = ModelConfig.from_hf(source, overrides=hf_overrides)
    else:
        config = hf.config_of(folder, overrides=hf_overrides)
    config = config.quantized(quantization)
    check_cache_dtype(kv_cache_dtype)
    check_compression(compress_all_reduce, sequence_parallel=sequence_parallel)
    dtype = config.dtype_of(dtype)
    split = planned(config, dtype)
    if split.cp > 1 and tp_plan != "auto":
        raise ValueError(
            f'cp={split.cp} (context_parallel_size, or a plan\'s) lays out weights over tp and cp; it goes with tp_plan="auto"'
        )
    rules = rules_from_plan(tp_plan, config, sequence_parallel=sequence_parallel)
    if split.cp > 1:
        split, rules = _once(config, split), rules.cache_parallel()
    experts: dict[str, Any] = {"layout": expert_layout, "dispatch": expert_dispatch}
    rules = rules.expert_parallel(config, ep=split.ep, tp=split.tp, cp=split.cp, **experts)
    check_layout(config, split.tp, rules, cp=split.cp)
    stages = Stages.split(config.num_layers, ranks=split.pp, sizes=sizes)
    layout: dict[str, Any] = staged(stages, rules=rules) if split.pp > 1 else {"rules": rules}
    mesh = make_mesh(dp=split.dp, pp=split.pp, cp=split.cp, ep=split.ep, tp=split.tp, tp_across_nodes=across)
    if split.cp > 1 and not across:
        check_within_nodes(mesh, "cp", "tp")
    if compress_all_reduce:
        layout["reduce"] = reducer(layout.get("region"))
    layout |= {
        "dispatch": exchange,
        "mesh": mesh,
        "dtype": dtype,
        "kernel": kernel,
        "expert_kernel": expert_kernel,
        "quantization": quantization,
        "kv_cache_dtype": kv_cache_dtype,
        "context": Context(split.cp) if split.cp > 1 else None,
    }
    if load_format == "dummy":
        made = Llama.random(config, **layout)
        made.source = str(folder) if folder else None
        return made
    assert folder is not None
    return Llama(config, **layout).load(folder, lora=lora, progress=progress)


def _once(config: ModelConfig, split: Split) -> Split:
    """With cp in the place of what tp has beyond the KV heads: no device holds one that another has as well."""
    copies = split.tp // config.num_kv_heads
    if copies < 2 or split.tp % config.num_kv_heads:
        return split
    laid = replace(split, tp=config.num_kv_heads, cp=split.cp * copies)
    logger.info(
        "the %d KV heads are not held %d times for tp=%d: laid out as tp=%d × cp=%d, with 1/%d of a cache on each device",
        config.num_kv_heads,
        copies,
        split.tp,
        laid.tp,
        laid.cp,
        laid.tp * laid.cp,
    )
    return laid


def tokenizer_of(source: str | Path | None, *, asked: bool) -> Tokenizer | None:
    """That of a folder or hub id, or None where it holds none. Raises FileNotFoundError for one that was asked for."""
    if source is None:
        return None
    folder = hf.resolve(source)
    if any(folder.glob("tokenizer*")):
        return Tokenizer(folder)
    if asked:
        raise FileNotFoundError(f"{folder} holds no tokenizer (tokenizer.json, tokenizer.model)")
    return None


def eos_of(
    config: ModelConfig, source: str | None, overrides: Mapping[str, Any], tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """The ids that end a text: as overridden, else those of generation_config.json where it has any, else the config's, else
    the tokenizer's (as in vLLM; transformers' generate goes on).
    """
    if "eos_token_id" in overrides:
        return config.eos_token_ids
    path = Path(source, "generation_config.json") if source else None
    found = read_object(path).get("eos_token_id") if path and path.exists() else None
    if found is not None:
        try:
            return token_ids("eos_token_id", found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    own = tokenizer.eos_id if tokenizer else None
    if config.eos_token_ids or own is None or own >= config.vocab_size:
        return config.eos_token_ids
    logger.info("neither config.json nor generation_config.json has an eos_token_id: texts end at the tokenizer's, %d", own)
    return (own,)
