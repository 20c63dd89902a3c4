"""The model in three, as a pipeline runs it: embedding, a stage of blocks, head and loss."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxtp.model import Llama
from jaxtp.model.stacked import Params, Stacked
from jaxtp.parallel.experts import everywhere, exchange
from jaxtp.parallel.regions import behind, mapped
from jaxtp.parallel.stages import Stages
from jaxtp.parallel.ticks import Parts
from jaxtp.sharding import Axis, Layout, joined, names
from jaxtp.train.lora import Adapters
from jaxtp.train.loss import Batch, cross_entropy
from jaxtp.train.routers import Routers, load


def parts_of(
    stacked: Stacked, stages: Stages, *, adapters: Adapters | None, routers: Routers, remat: str, z_loss: float
) -> Parts:
    """The parts of `stacked` for these stages; a stage tells what its routers cost and how its experts are loaded. The settings
    are `train.step.Trainer`'s.
    """
    layout = stacked.layout
    kernel = stacked.model.layers[0].attention.kernel
    rules, sizes = layout.rules, layout.mesh.shape

    def within(dim: str) -> Axis:
        return joined(*(axis for axis in names(rules.axis(dim)) if axis not in layout.data))

    region = functools.partial(mapped, along=[(axis, sizes[axis]) for axis in ("cp", "ep")])
    inner = Stacked(
        Llama(
            stacked.config,
            mesh=layout.mesh,
            # groups are mapped over
            rules=rules.using(batch=None, routed=None, tokens=None, sequence=within("sequence"), experts=within("experts")),
            dtype=layout.dtype.name,
            kernel=kernel,
            region=region,
            dispatch=exchange if "ep" in names(rules.axis("routed")) else everywhere,
            context=stacked.model.context,
        )
    )
    kinds = stages.alike(stacked.config.kinds)

    def stage(weights: Params, filled: jax.Array, x: jax.Array, needed: Any) -> tuple[jax.Array, Any]:
        positions, rows, counted = needed
        x, routing = inner.blocks(
            weights,
            x,
            replace(inner.model.step(positions, rows), counted=counted, capacity=routers.capacity),
            kinds=kinds,
            filled=None if stages.even else filled,
            remat=remat,
            bring=adapters.beside if adapters else lambda layer: layer,
        )
        if routing is None:
            return x, None
        cp, own, experts = sizes["cp"], routing.counts, stacked.config.experts
        if cp > 1:  # a group has a part of each row, and its losses are parts of those of whole rows
            assert experts
            args = jax.lax.stop_gradient((own, x))
            counts = region(lambda own, y: jax.lax.psum(behind(own, y), "cp"), args, lambda own, _: own)
            routing = replace(routing, counts=counts, tokens=counts.sum(axis=-1) / experts.per_token)
        told = load(routing, routers, share=len(routing.tokens) / sum(stacked.config.sparse))
        return x, (cp * told.cost(routers), replace(told, counts=own.sum(axis=1)))

    def leave(tables: Params, x: jax.Array, micro: Batch) -> tuple[jax.Array, jax.Array]:
        x = stacked.whole(tables).norm(x)
        return cross_entropy(stacked, tables, x, micro, z_loss=z_loss)

    return Parts(
        enter=lambda tables, micro: stacked.whole(tables).embedded(micro.tokens),
        stage=stage,
        leave=leave,
        needed=lambda batch: (batch.positions, _whole_rows(batch.segment_ids, layout), _counted(batch)),
    )


def _whole_rows(segment_ids: jax.Array | None, layout: Layout) -> jax.Array | None:
    """[M, B, T], every group with all tokens of its rows."""
    return None if segment_ids is None else layout.place(segment_ids, None, "batch", None)


def _counted(batch: Batch) -> jax.Array:
    """[M, B, T] float32: which tokens are none that fill a row up."""
    if batch.segment_ids is None:
        return jnp.ones_like(batch.positions, jnp.float32)
    return (batch.segment_ids != 0).astype(jnp.float32)
