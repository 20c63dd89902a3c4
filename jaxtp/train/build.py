"""From a run's config to its parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtp.checkpoint import hf
from jaxtp.config import FAMILIES, ModelConfig
from jaxtp.model import Llama
from jaxtp.model.stacked import Params, Stacked
from jaxtp.parallel.circulate import staged
from jaxtp.parallel.context import Context
from jaxtp.parallel.experts import exchange
from jaxtp.parallel.pipeline import Pipeline
from jaxtp.parallel.stages import Stages
from jaxtp.sharding import Rules, check_layout
from jaxtp.train.config import Parallel, TrainConfig
from jaxtp.train.lora import Adapters, every_target
from jaxtp.train.optim import transformation
from jaxtp.train.step import Trainer


def rules_of(split: Parallel, config: ModelConfig) -> Rules:
    """The layout of a run's weights and activations. Raises ValueError where this model cannot be laid out so."""
    rules = Rules().sequence_parallel() if split.sequence_parallel else Rules()
    rules = rules.context_parallel() if split.cp > 1 else rules
    rules = rules.pipeline_parallel() if split.pp > 1 else rules
    rules = rules.expert_parallel(config, ep=split.ep, tp=split.tp, layout=split.expert_layout, dispatch=split.expert_dispatch)
    check_layout(config, split.tp, rules)
    return rules


def generating_rules(split: Parallel, config: ModelConfig, trained: Rules) -> Rules:
    """The layout of a run's weights to generate with: over cp lie caches, not tokens. Tables stay as they are padded. Raises
    ValueError where this model cannot be laid out so.
    """
    if split.cp == 1:
        return trained
    rules = Rules().sequence_parallel() if split.sequence_parallel else Rules()
    rules = rules.cache_parallel().using(
        vocab=trained.axis("vocab"), logits=trained.axis("logits"), layers=trained.axis("layers")
    )
    experts: dict[str, Any] = {"layout": split.expert_layout, "dispatch": split.expert_dispatch}
    rules = rules.expert_parallel(config, ep=split.ep, tp=split.tp, cp=split.cp, **experts)
    check_layout(config, split.tp, rules, cp=split.cp)
    return rules


def context_of(split: Parallel) -> Context | None:
    """How attention goes over cp. Raises ValueError for a strategy without it."""
    if split.cp == 1 and split.context_strategy != "auto":
        raise ValueError(f"parallel.context_strategy={split.context_strategy!r} is over cp, which is 1 here; set parallel.cp")
    return Context(split.cp, None if split.context_strategy == "auto" else split.context_strategy) if split.cp > 1 else None


def trainer_of(config: TrainConfig, stacked: Stacked) -> Trainer:
    """The step of a run, on the mesh of `stacked`. Raises ValueError for what does not go together."""
    lora = config.lora.lora
    if lora and config.lora.targets is None and not FAMILIES[stacked.config.model_type].fused:
        lora = replace(lora, targets=every_target(stacked))
    adapters = Adapters(stacked, lora) if lora else None
    pipeline, mesh, split = None, stacked.layout.mesh, config.parallel
    if mesh.shape["pp"] > 1:
        layers, sizes = stacked.config.num_layers, split.layers_per_stage
        stages = Stages.split(layers, ranks=mesh.shape["pp"], chunks=split.chunks, sizes=sizes)
        if config.optimizer.name == "adafactor" and not stages.even:
            raise ValueError(f"adafactor clips by the RMS of whole stacks, in which {stages.told()}; use adamw or muon")
        pipeline = Pipeline(mesh, stages, split.schedule)
    return Trainer(
        stacked,
        transformation(config.optimizer, config.steps, (adapters or stacked).specs()),
        adapters,
        pipeline,
        zero=config.parallel.zero,
        remat=config.parallel.remat,
        clip_norm=config.optimizer.clip_norm,
        z_loss=config.z_loss,
        routers=config.routers,
    )


def weights_of(
    trainer: Trainer,
    start: Path | None,
    *,
    dtype: str,
    seed: int = 0,
    lora: str | Path | None = None,
    progress: bool = True,
) -> Params:
    """The weights of a checkpoint folder (of a quantized one what they stand for) with an adapter merged into them, or random
    ones. Each rank of a pipeline reads, or makes, its own layers.
    """
    stacked, pipeline = trainer.stacked, trainer.pipeline
    layout = staged(pipeline.stages, rules=stacked.layout.rules) if pipeline else {"rules": stacked.layout.rules}
    place: dict[str, Any] = {"mesh": stacked.layout.mesh, "dtype": dtype, "dispatch": exchange, **layout}
    place["context"] = stacked.model.context
    if start:
        schemes = hf.config_of(start).schemes
        return stacked.stack(Llama(stacked.config, **place).load(start, lora=lora, schemes=schemes, progress=progress))
    return stacked.stack(Llama.random(stacked.config, **place, seed=seed))
