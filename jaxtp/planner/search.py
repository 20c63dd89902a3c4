"""`plan`: every legal way to split a model over given GPUs, what each takes and costs, and which is best."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from rich.progress import track

from jaxtp.buckets import MAX_NUM_SEQS
from jaxtp.checkpoint import hf
from jaxtp.config import ModelConfig
from jaxtp.config.quantization import Quantization
from jaxtp.log import console, interactive
from jaxtp.ops.coded import CacheDtype
from jaxtp.planner import hardware
from jaxtp.planner.cluster import Cluster, cluster, load_links
from jaxtp.planner.prediction import Plan
from jaxtp.planner.report import Plans
from jaxtp.planner.work import Generation, Remat, Split, Task, Training, check_length, lengths, problem
from jaxtp.presets import PRESETS, preset

Objective = Literal["latency", "throughput", "memory"]
CHUNKS = (2, 4)  # of layers on a pipeline's rank, that are tried
LEAST_PART = 4096  # tokens of a row on each rank of cp: with fewer it is not tried
LONG = 5000  # splits from which a bar shows how far a search is
MOST_GPUS = 4096  # up to which it is tried how many would do


def plan(
    model: str | Path | ModelConfig,
    gpus: str | Cluster,
    *,
    task: Literal["generate", "train"] = "generate",
    batch: int | None = None,
    prompt_len: int | None = None,
    output_len: int | None = None,
    seq_len: int | None = None,
    max_model_len: int | None = None,
    dtype: str = "bfloat16",
    quantization: Quantization | None = None,
    kv_cache_dtype: CacheDtype = "auto",
    objective: Objective | None = None,
    utilization: float | None = None,
    interconnect: str | None = None,
    network: str = "infiniband",
    gpu_file: str | Path | None = None,
    tp_across_nodes: bool = False,
) -> Plans:
    """Every way to run a model on GPUs, the best first, and behind them those that cannot be, with the reason.

    model: the name of a preset, a checkpoint folder (its config.json), or a `ModelConfig`. gpus: "8xH100", "2x8xH100" (nodes x
    GPUs of each). task: "generate" completes `batch` prompts of `prompt_len` tokens (default 1024) by `output_len` (256) at
    once; batch None: 1, for throughput the largest power of two that fits, at most 256. "train" updates from `batch` rows
    (default 64) of `seq_len` tokens (4096). The defaults of lengths are less where the model's positions, or `max_model_len`,
    are fewer. objective: what is best, "latency" (generate's default: seconds until all is done), "throughput" (train's: tokens
    a second) or "memory" (the least on each GPU). interconnect, network: see `cluster`. gpu_file: YAML with more GPUs and
    links, see `hardware.load` and `cluster.load_links`.

    Raises ValueError for what it does not know, with near names, and where nothing fits, with the number of GPUs that would do.
    """
    objective = objective or ("throughput" if task == "train" else "latency")
    if objective not in get_args(Objective):
        raise ValueError(f"objective={objective!r} must be one of {', '.join(get_args(Objective))}")
    if task not in ("generate", "train"):
        raise ValueError(f'task={task!r} must be "generate" or "train"')
    if isinstance(gpus, Cluster):
        where = gpus
    else:
        more: dict[str, Any] = {"known": hardware.load(gpu_file), "links": load_links(gpu_file)} if gpu_file else {}
        where = cluster(gpus, interconnect=interconnect, network=network, **more)
    name, config = _model(model)
    config = config.quantized(quantization)
    share: dict[str, Any] = {} if utilization is None else {"utilization": utilization}
    most = config.context
    prompt_len, output_len = lengths(min(most, max_model_len or most), prompt_len, output_len)
    seq_len = min(4096, most) if seq_len is None else seq_len
    wanted: Task
    if task == "train":
        if config.schemes:
            raise ValueError(f'quantization={config.schemes.name!r} is for task="generate"; training keeps its dtype')
        wanted = Training(64 if batch is None else batch, seq_len, dtype, **share)
    else:
        shape = (1 if batch is None else batch, prompt_len, output_len, max_model_len, dtype)
        wanted = Generation(
            *shape, quantization=config.schemes.name if config.schemes else None, kv_cache_dtype=kv_cache_dtype, **share
        )
    check_length(config, wanted)
    per_node = None if tp_across_nodes else where.per_node
    fill = batch is None and task == "generate" and objective == "throughput"
    tried = list(splits(where.size, config, task=wanted))
    shown: dict[str, Any] = {"description": "planning", "console": console, "transient": True}
    bar = track(tried, disable=len(tried) < LONG or not interactive(), **shown)
    found = [_judged(name, config, where, split, wanted, per_node, fill=fill) for split in bar]
    plans = Plans(sorted(found, key=functools.partial(_rank, objective)), objective)
    if not plans.legal:
        raise ValueError(_nothing(plans, where, tp_across_nodes))
    return plans


def splits(devices: int, config: ModelConfig, *, task: Task) -> Iterator[Split]:
    """Every way to split work over that many devices, legal or not."""
    whole = _divisors(devices)
    for dp, pp, cp, ep, tp in itertools.product(whole, whole, whole, whole if config.experts else [1], whole):
        if dp * pp * cp * ep * tp != devices or not _worth(config, task, cp, tp):
            continue
        for parallel in (False, True) if tp > 1 else (False,):
            base = Split(dp=dp, pp=pp, cp=cp, ep=ep, tp=tp, sequence_parallel=parallel)
            if cp > 1 and isinstance(task, Generation):
                base = dataclasses.replace(base, over_cp="slots")
            if isinstance(task, Generation):
                if not parallel:  # the same bytes: for generation there is nothing to gain
                    yield base
                continue
            shapes: list[dict[str, Any]] = [{}]
            if pp > 1:
                shapes = [{"schedule": "1f1b"}, {"schedule": "gpipe"}]
                shapes += [{"schedule": "interleaved_1f1b", "chunks": v} for v in CHUNKS]
            zeros = (0, 1, 2, 3) if dp * cp * ep > 1 else (0,)
            for micro, zero, remat, shape in itertools.product(_divisors(task.batch), zeros, get_args(Remat), shapes):
                yield dataclasses.replace(base, microbatches=micro, zero=zero, remat=remat, **shape)


def _worth(config: ModelConfig, task: Task, cp: int, tp: int) -> bool:
    """Whether so much cp is tried: for long rows to train on, and to generate where tp has dealt out the KV heads."""
    if cp == 1:
        return True
    if isinstance(task, Training):
        return task.seq_len // cp >= LEAST_PART
    return tp == math.gcd(config.num_kv_heads, tp * cp)


def _judged(
    name: str, config: ModelConfig, where: Cluster, split: Split, task: Task, per_node: int | None, *, fill: bool
) -> Plan:
    plan = Plan(name, config, where, split, task)
    refused = problem(config, split, task, per_node=per_node)
    if refused:
        return dataclasses.replace(plan, refused=refused)
    if fill and isinstance(task, Generation):
        tried = (plan.of_rows(1 << i) for i in reversed(range(MAX_NUM_SEQS.bit_length())))
        plan = next((found for found in tried if found.holds), plan)
    if plan.holds:
        return plan
    part = max(dataclasses.asdict(plan.memory).items(), key=lambda item: item[1])
    refused = (
        f"needs {plan.memory.total / 2**30:.1f} GiB of the {plan.limit / 2**30:.1f} that may be used of each GPU "
        f"(most of it, {part[1] / 2**30:.1f}: {part[0]})"
    )
    if isinstance(task, Generation) and plan.most_rows:
        refused += f" for all rows at once; {plan.most_rows} fit, and LLM takes the others after them"
    return dataclasses.replace(plan, refused=refused, full=True)


def _rank(objective: Objective, plan: Plan) -> tuple[Any, ...]:
    """The key to sort by: what fits first; equals in the order of simplicity."""
    if plan.refused:
        return (1, plan.split.pp, plan.split.tp)
    first = {
        "latency": plan.seconds,
        "throughput": -plan.tokens_per_second,
        "memory": plan.memory.total,
    }[objective]
    split = plan.split
    return (0, float(f"{first:.4g}"), plan.memory.total, split.pp, split.ep, split.sequence_parallel, split.zero)


def _nothing(plans: Plans, where: Cluster, across: bool) -> str:
    """Why nothing fits, and how many GPUs would do."""
    sample, full = plans[0], [plan for plan in plans if plan.full]
    closest = min(full, key=lambda plan: plan.memory.total) if full else sample
    why = f"{closest.split.told()} {closest.refused}" if full else str(sample.refused)

    def enough(count: int) -> Cluster | None:
        """So many of them, if they would do."""
        more = where.of(count)
        if more is None or (full and count <= where.size):
            return None
        frugal = (
            s
            for s in splits(count, sample.config, task=sample.task)
            if isinstance(sample.task, Generation) or s.remat == "full"
        )
        per_node = None if across else more.per_node
        fits = any(_judged(sample.model, sample.config, more, s, sample.task, per_node, fill=False).fits for s in frugal)
        return more if fits else None

    least = next(filter(None, (enough(1 << i) for i in range(MOST_GPUS.bit_length()))), None)
    if least is None:
        return f"{sample.model} cannot be run so on {where}: {why}; nor would {MOST_GPUS} of them do"
    least = next(filter(None, map(enough, range(least.size // 2 + 1, least.size))), least)
    return f"{sample.model} cannot be run so on {where}: {why}; {least.size} of them would do ({least})"


def _model(model: str | Path | ModelConfig) -> tuple[str, ModelConfig]:
    if isinstance(model, ModelConfig):
        return model.model_type, model
    if str(model) in PRESETS:
        return str(model), preset(str(model))
    if str(model) == "demo" or (str(model) and Path(model).is_dir()):
        return str(model), hf.config_of(hf.resolve(model))
    near = difflib.get_close_matches(str(model).lower(), PRESETS, n=3, cutoff=0.4)
    hint = f"near: {', '.join(near)}; all" if near else "presets"
    raise ValueError(f"no model is named {str(model)!r}, and no folder is there; {hint}: {', '.join(PRESETS)}")


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
