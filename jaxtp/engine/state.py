"""What a step leaves on the devices for the next one: how it begins, and how it changes its form. Letters as in `step`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxtp.engine.plan import Shape
from jaxtp.model import Cache, Llama
from jaxtp.ops.sampling import Counts
from jaxtp.parallel import circulate
from jaxtp.sharding import reshard, spec_of, zeros


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What stays on the devices from step to step.

    token, done [G, M]: the newest token of each row, not yet in the cache, and whether it was the last. counts [G, M, V']: what
    penalties need; None until a row asks for them. between [P, G, T, D]: what is on its way from stage to stage.
    """

    cache: Cache
    token: jax.Array
    done: jax.Array
    counts: Counts | None = None
    between: jax.Array | None = None


def begin(model: Llama, *, pages: int, size: int, rows: int) -> State:
    """An empty cache of `pages` pages in all, of `size` slots, and rows of which each group has `rows`."""
    return zeros(abstract_state(model, pages=pages, size=size, rows=rows))


def abstract_state(model: Llama, *, pages: int, size: int, rows: int) -> State:
    """The same as shapes and shardings, to compile ahead of time."""
    layout = model.layout

    def array(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((layout.parts("batch"), rows), dtype, sharding=layout.sharding("batch", None))

    return State(model.empty_cache(pages, size), array(jnp.int32), array(jnp.bool_))


def nothing(model: Llama, *, shape: Shape) -> jax.Array:
    """Nothing on its way from stage to stage yet."""
    return zeros(circulate.between(model, shape.tokens))


def moved(model: Llama, between: jax.Array, *, old: Shape, new: Shape) -> jax.Array:
    """What is on its way from stage to stage, in the lanes of another shape."""
    x = reshard(between, jax.P(*spec_of(between)[:2]), model.layout.mesh)
    into = circulate.between(model, new.tokens)
    out = jnp.zeros(into.shape, into.dtype, out_sharding=NamedSharding(into.sharding.mesh.abstract_mesh, spec_of(x)))
    rows, chunks = min(old.rows, new.rows), min(old.chunks, new.chunks) * new.chunk
    out = out.at[:, :, :rows].set(x[:, :, :rows])
    out = out.at[:, :, new.rows : new.rows + chunks].set(x[:, :, old.rows : old.rows + chunks])
    return reshard(out, into.sharding.spec, model.layout.mesh)
