"""What fits: weights, and a KV cache in the memory that they leave."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtp.buckets import PAGE
from jaxtp.config import ModelConfig
from jaxtp.mesh import platform
from jaxtp.model import Llama
from jaxtp.weights import weights


@dataclass(frozen=True)
class Budget:
    """Bytes on each device, and what they hold.

    weight_bytes: all weights. read_bytes: those that a decode step reads, in stages each of its ticks (all but the rows of the
    embedding not looked up). cache_bytes: what the KV cache may take. slot_bytes: one token's keys and values on
    one device that has them. groups: of data parallelism. ranks: devices over which a row's slots are spread (cp).
    cache_tokens: tokens that the caches of all of these hold together.
    """

    weight_bytes: int
    read_bytes: int
    cache_bytes: int
    slot_bytes: int
    groups: int
    ranks: int = 1

    @property
    def cache_tokens(self) -> int:
        """Tokens that fit in the KV cache."""
        return self.cache_bytes // self.slot_bytes * self.groups * self.ranks


POOL = "XLA_CLIENT_MEM_FRACTION"  # of each GPU: what JAX takes at its start and shares out itself
WORKSPACE = 0.05  # of each GPU: left to what programs need while they run


def reserve(utilization: float) -> None:
    """Lets JAX's pool take `utilization` of each GPU and the workspace, unless the environment says otherwise.

    Without effect once a device was touched: JAX's own default is 0.75.
    """
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its older name; both at once are an error
        os.environ.setdefault(POOL, f"{min(utilization + WORKSPACE, 0.97):.2f}")


# bytes of the cache where the device is a CPU, whose memory others need, too: at least, and at most for FEW whole requests
CPU_CACHE, CPU_CACHE_MOST, FEW = 1 << 28, 1 << 30, 4


def budget(model: Llama, *, utilization: float, cache_bytes: int | None = None) -> Budget:
    """What the devices of a model leave for its cache.

    `utilization` is the share of a GPU that weights and cache may take, as far as JAX's pool reaches (see `reserve`); on
    CPUs the share of the memory that is free now, over the devices that it is shared by. cache_bytes: what the cache is to
    take, if that is said.
    """
    found = {weight.path: weight.device_bytes for weight in weights(model)}
    total = sum(found.values())
    groups, ranks = model.layout.parts("batch"), model.layout.parts("cached")
    cache = model.empty_cache(groups, ranks)
    slot = sum(a.dtype.itemsize * _local(a) for a in jax.tree.leaves(cache.layers))
    free = _free(model, total, utilization)
    if jax.process_count() > 1:  # all run the same program: what the tightest holds
        free = int(multihost_utils.process_allgather(np.int32(free >> 20)).min()) << 20
    if free < slot:
        raise ValueError(
            f"the weights take {total / 2**30:.2f} GiB on each device and leave no room for a KV cache; "
            "use more devices (tensor_parallel_size), a smaller dtype, quantization, or a higher gpu_memory_utilization"
        )
    if cache_bytes is not None and not slot <= cache_bytes <= free:
        raise ValueError(f"kv_cache_memory_bytes={cache_bytes} must be in [{slot}, {free}]: one token, and what is free")
    free = free if cache_bytes is None else cache_bytes
    embedding = 0 if model.head is None else found["embed"]
    return Budget(total, total - embedding, free, slot, groups, ranks)


def context(config: ModelConfig, budget: Budget, wanted: int | None) -> int:
    """`max_model_len`: as wanted, else the model's own (as in vLLM what RoPE scaling makes of it), cut to what the cache holds.

    Raises ValueError where `wanted` exceeds either.
    """
    holds = budget.cache_tokens // budget.groups
    if wanted is None:
        return min(config.context, holds)
    config.check_length("max_model_len", wanted, way=longer(config, wanted))
    if wanted > holds or wanted < 2:
        raise ValueError(f"max_model_len={wanted} must be in [2, {holds}], the tokens that the KV cache holds")
    return wanted


def pool_tokens(model: Llama, budget: Budget, max_model_len: int, *, asked: bool) -> int:
    """Tokens of the engine's cache: all that fit; on CPUs, unless that was `asked` for, what a few requests need."""
    if asked or platform(model.layout.mesh) != "cpu":
        return budget.cache_tokens
    each_slot = budget.slot_bytes / budget.ranks
    few = min(FEW * max_model_len, int(CPU_CACHE_MOST / each_slot))
    each = max(int(CPU_CACHE / each_slot), few, max_model_len + PAGE * budget.ranks)
    return min(budget.cache_tokens, each * budget.groups)


def longer(config: ModelConfig, tokens: int) -> str:
    """What lets a sequence of so many tokens in, in words."""
    trained, kind = config.max_position_embeddings, config.rope.kind
    if tokens <= config.context or kind == "dynamic":
        return f"LLM(..., max_model_len={tokens}) is possible"
    way = f'hf_overrides={{"max_position_embeddings": {tokens}}} where it was trained so'
    if kind == "default":
        factor = float(-(-tokens // trained))
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}
        way += f', or RoPE scaling, such as hf_overrides={{"rope_scaling": {json.dumps(scaling)}}}'
    return f"for more: {way}"


def pool() -> float:
    """The share of each GPU that JAX takes at its start."""
    return float(os.environ.get(POOL) or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or 0.75)


def available() -> int:
    """Bytes of the host's memory that are free now."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free(model: Llama, used: int, utilization: float) -> int:
    if platform(model.layout.mesh) == "gpu":
        stats = [device.memory_stats() for device in model.layout.mesh.local_devices]
        share = min(utilization / pool(), 1 - WORKSPACE)
        return min(int(s["bytes_limit"] * share) - s["bytes_in_use"] for s in stats)
    return int(available() * utilization) // len(model.layout.mesh.local_devices)


def _local(a: jax.ShapeDtypeStruct) -> int:
    size = 1
    for n in a.sharding.shard_shape(a.shape):
        size *= n
    return size
