"""Compiles programs from shapes alone: for the devices at hand, or for GPUs that are not there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from jaxtp import files
from jaxtp.buckets import power
from jaxtp.compilation_cache import not_cached
from jaxtp.config import ModelConfig
from jaxtp.config.quantization import Quantization
from jaxtp.engine import sampler, step
from jaxtp.engine.build import choose_read, chunk_tokens, page_tokens
from jaxtp.engine.plan import Shape
from jaxtp.engine.programs import Programs
from jaxtp.engine.state import abstract_state
from jaxtp.mesh import AXES
from jaxtp.model import Llama
from jaxtp.model.stacked import Stacked
from jaxtp.ops.coded import CacheDtype
from jaxtp.ops.pages import Read
from jaxtp.ops.sampling import Features
from jaxtp.parallel.circulate import between, staged
from jaxtp.parallel.experts import exchange
from jaxtp.parallel.pipeline import Pipeline
from jaxtp.planner import Split, hardware
from jaxtp.train.loss import Batch
from jaxtp.train.optim import Optimizer, transformation
from jaxtp.train.routers import Routers
from jaxtp.train.step import Trainer
from jaxtp.weights import variables

INSTALL = "pip install 'jaxtp[gpu-compiler]' and pip install --no-deps nvidia-cudnn-cu13"


def check_compiler() -> None:
    """Raises RuntimeError where XLA's compiler for GPUs is not installed."""
    plugins = importlib.util.find_spec("jax_plugins")
    if not plugins or not any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13)):
        raise RuntimeError(f"XLA's compiler for GPUs is not installed: {INSTALL}")


def gpu_mesh(target: str | Path | hardware.GPU, *, dp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1, tp: int = 1) -> Mesh:
    """A mesh of GPUs that need not be there; programs over it can be compiled and read, not run.

    target: a GPU, or the name of one ("H200"; see `planner.hardware.GPUS`), or the file that describes one (XLA's
    GpuTargetConfigProto as text). Needs the compiler for GPUs (the extra `gpu-compiler`); raises RuntimeError without it.
    """
    check_compiler()
    if isinstance(target, hardware.GPU):
        text = target.target()
    else:
        text = files.read_text(target) if Path(target).is_file() else hardware.gpu(str(target)).target()
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=text, topology=f"1x1x{dp * pp * cp * ep * tp}")
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise RuntimeError(
            f"cannot compile for GPUs here: {error}. The compiler must be that of jax {jax.__version__}: {INSTALL}"
        ) from error
    devices: Any = np.array(topology.devices).reshape(dp, pp, cp, ep, tp)
    return Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def compile_decode(
    model: Llama,
    *,
    batch: int,
    slots: int,
    features: Features = Features(),
    read: Read | None = None,
    reach: int | None = None,
    cache_tokens: int | None = None,
    loop: bool = True,
) -> Any:
    """The step in which `batch` rows make a token each (in stages: a tick, which has its share of them), compiled.

    The model may be abstract. slots: tokens that a row may have. read, reach: how the cache is read, and how far rows reach at
    most (see `ops.pages`; default: as the engine does on such devices, and all slots). cache_tokens: that the pages of all
    groups hold (default: all slots of these rows). loop: whether a call may have several such steps.
    """
    return _compiled(model, step.decode, batch, 0, slots, features, read, reach, cache_tokens, loop)


def compile_prefill(
    model: Llama,
    *,
    tokens: int,
    batch: int = 0,
    slots: int | None = None,
    features: Features = Features(),
    read: Read | None = None,
    reach: int | None = None,
    cache_tokens: int | None = None,
) -> Any:
    """The step that takes `tokens` tokens of prompts of each group along, beside `batch` rows that make a token, compiled.

    slots (default: tokens): that any row may have; see `compile_decode`.
    """
    return _compiled(model, step.mixed, batch, tokens, slots or tokens, features, read, reach, cache_tokens, False)


def _compiled(
    model: Llama,
    function: Callable[..., Any],
    batch: int,
    tokens: int,
    slots: int,
    features: Features,
    read: Read | None,
    reach: int | None,
    cache_tokens: int | None,
    loop: bool,
) -> Any:
    layout, read = model.layout, read or choose_read(model)
    groups, chunk, size = layout.parts("batch"), chunk_tokens(model), page_tokens(model, read, slots)
    rows, pages = -(-batch // groups), -(-slots // size)
    held = power(rows + -(-tokens // slots))
    pool = cache_tokens // groups // size if cache_tokens else held * pages
    shape = Shape(
        rows=power(-(-rows // model.stages)),
        chunks=-(-tokens // chunk),
        chunk=chunk,
        pages=pages,
        stops=4,
        biases=0,
        read=read,
        reach=reach or slots,
        loop=loop,
    )
    state = abstract_state(model, pages=groups * pool, size=size, rows=held)
    if features.penalties:
        state = replace(state, counts=sampler.abstract_counts(model, rows=held))
    if model.stacks:
        under_way: Any = between(model, shape.tokens)
        state = replace(state, between=under_way)
    plan = _abstract((model.stages, groups, shape.size), jnp.int32, layout.sharding(None, "batch", None))
    args = state, plan, jax.ShapeDtypeStruct((), jnp.int32)
    with not_cached():
        return Programs(model).compile(function, *args, donate=(0,), shape=shape, features=features)


def compile_step(trainer: Trainer, *, rows: int, tokens: int, accumulate: int = 1, xla_flags: bool = True) -> Any:
    """The training step for `accumulate` microbatches of `rows` rows of `tokens` tokens, compiled as `jaxtp train` does."""
    layout = trainer.stacked.layout
    place = layout.sharding(None, "batch", "tokens")
    ints, floats = (_abstract((accumulate, rows, tokens), dtype, place) for dtype in (jnp.int32, jnp.float32))
    with jax.set_mesh(layout.mesh), not_cached():
        step = trainer.jitted(options=xla_flags)
        return step.lower(trainer.abstract_state(), Batch(ints, ints, floats, ints), trainer.abstract_frozen()).compile()


def abstract_llama(
    config: ModelConfig,
    mesh: Mesh,
    split: Split,
    *,
    dtype: str,
    quantization: Quantization | None = None,
    bits: CacheDtype = "auto",
) -> Llama:
    """A model without weights, laid out as `split` says, to generate with."""
    rules = split.rules(config)
    layout: dict[str, Any] = staged(split.stages(config), rules=rules) if split.pp > 1 else {"rules": rules}
    layout |= {"mesh": mesh, "dtype": dtype, "quantization": quantization, "kv_cache_dtype": bits, "context": split.context}
    model = Llama(config, dispatch=exchange, **layout)
    for path, weight in variables(model):
        weight.set_value(model.kept(path, weight, weight.get_value()))
    return model


def abstract_trainer(config: ModelConfig, mesh: Mesh, split: Split, *, dtype: str) -> Trainer:
    """AdamW on a model without weights, laid out as `split` says."""
    rules, context = split.rules(config), split.context
    stacked = Stacked(Llama(config, mesh=mesh, rules=rules, dtype=dtype, dispatch=exchange, context=context))
    pipeline = Pipeline(mesh, split.stages(config), split.schedule) if split.pp > 1 else None
    optimizer = transformation(Optimizer(), 100, stacked.specs())
    routers = Routers(over="sequence" if pipeline else "batch")
    return Trainer(stacked, optimizer, None, pipeline, zero=split.zero, remat=split.remat, routers=routers)


def _abstract(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
