"""The layout for the devices at hand: what `LLM(plan="auto")` takes."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

from jaxtp.config import ModelConfig
from jaxtp.config.quantization import Quantization
from jaxtp.generate import memory
from jaxtp.log import logger
from jaxtp.model import Llama
from jaxtp.ops.coded import CacheDtype
from jaxtp.planner import Cluster, Generation, Machine, Plan, Split, hardware, plan
from jaxtp.planner.cluster import cluster

Choice = Literal["auto"] | Plan


def at_hand() -> Cluster:
    """The devices that JAX sees, as the planner knows them. Raises ValueError for GPUs that it does not."""
    device, count = jax.devices()[0], jax.device_count()
    if device.platform == "cpu":
        return _of(count, hardware.cpu(memory.available() / jax.local_device_count()))
    gpu = hardware.of_device(device.device_kind)
    if gpu is None:
        raise ValueError(f'plan="auto" knows no {device.device_kind}; say tensor_parallel_size and the like, or give a Plan')
    return _of(count, gpu)


def _of(devices: int, gpu: hardware.GPU) -> Cluster:
    """So many of them, over the processes of this job."""
    nodes = jax.process_count()
    return cluster(f"{nodes}x{devices // nodes}x{gpu.name}", known={gpu.name: gpu})


def machine_of(model: Llama, split: Split | None = None) -> Machine | None:
    """How the planner sees a model on the devices that it is on; None where these are no GPUs that it knows, or some of its
    layers have experts and others none.

    split: what the mesh does not say; of training.
    """
    mesh = model.layout.mesh
    gpu = hardware.of_device(mesh.devices.flat[0].device_kind)
    if gpu is None or 0 < sum(model.config.sparse) < model.config.num_layers:
        return None
    rules = model.layout.rules
    split = split or Split(
        **mesh.shape,
        over_cp="slots" if rules.axis("cached") else "tokens",
        expert_layout="width" if rules.axis("expert_mlp") else "whole",
    )
    return Machine(model.config, split, _of(mesh.size, gpu), str(model.layout.dtype), model.quantization, model.kv_cache_dtype)


def split_of(
    choice: Choice,
    config: ModelConfig,
    *,
    dtype: str,
    quantization: Quantization | None,
    kv_cache_dtype: CacheDtype,
    utilization: float,
    max_model_len: int | None,
) -> Split:
    """The split of a plan, or of the best one (for the time of a single request) on the devices at hand."""
    if isinstance(choice, Plan):
        if choice.refused:
            raise ValueError(f"this plan cannot be: {choice.refused}")
        if not isinstance(choice.task, Generation):
            raise ValueError('this plan is of training; jaxtp.plan(..., task="generate") makes those for LLM')
        if choice.task.kv_cache_dtype != kv_cache_dtype:
            raise ValueError(f"this plan is with kv_cache_dtype={choice.task.kv_cache_dtype!r}; asked for: {kv_cache_dtype!r}")
        if choice.task.quantization != quantization:
            raise ValueError(f"this plan is with quantization={choice.task.quantization!r}; asked for: {quantization!r}")
        said = {"dtype": None, "bos_token_id": None, "eos_token_ids": (), "schemes": None}
        mine, its = (dataclasses.replace(c, **said) for c in (config, choice.config))  # type: ignore[arg-type]
        if mine != its:
            raise ValueError(f"this plan is of {choice.model}, which has another shape than this model")
        return choice.split
    if choice != "auto":
        raise ValueError(f'plan={choice!r} must be "auto" or a Plan, such as jaxtp.plan(...).best')
    plans = plan(
        config,
        at_hand(),
        max_model_len=max_model_len and min(max_model_len, config.context),
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        utilization=utilization,
    )
    best = plans.best
    logger.info("plan: %s, predicted %.2f ms a token", best.split.told(), 1e3 * best.step.total)
    return best.split
