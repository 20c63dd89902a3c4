"""Rows of tokens [B, T], as `Llama.__call__` takes them, brought to where the mesh wants them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxtp.model.cache import Cache, Lanes
from jaxtp.model.layers import Context
from jaxtp.sharding import Layout

Array = jax.Array | np.ndarray


def spread(
    context: Context, tokens: Array, positions: Array, segment_ids: Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None, np.ndarray]:
    """Rows [B, T] as they lie in parts, filled up at their end, where no token sees it; and the token at each place."""
    T = tokens.shape[1]
    order = context.order(context.padded(T))

    def lay(x: Array) -> jax.Array:
        return jnp.pad(jnp.asarray(x, jnp.int32), ((0, 0), (0, len(order) - T)))[:, order]

    return lay(tokens), lay(positions), None if segment_ids is None else lay(segment_ids), order


def flat(layout: Layout, x: Array) -> jax.Array:
    """[B, T] of all rows: [groups, tokens of a group]."""
    x = layout.place(jnp.asarray(x, jnp.int32), "batch", None)
    return x.reshape(layout.parts("batch"), -1, out_sharding=layout.sharding("batch", None))


def a_page_each(layout: Layout, positions: jax.Array, cache: Cache) -> Lanes:
    """Row i has page i of the cache for itself."""
    groups, (B, T) = layout.parts("batch"), positions.shape
    each, S = B // groups, cache.slots
    pages = jnp.arange(each, dtype=jnp.int32)
    row = jnp.broadcast_to(pages[:, None], (each, T)).reshape(-1)
    at = flat(layout, positions)
    slots = jnp.where(at < S, row * S + at, each * S)
    tables = layout.place(jnp.broadcast_to(pages[:, None], (groups, each, 1)), "batch")
    lengths = flat(layout, positions.max(axis=1, keepdims=True)) + 1
    return Lanes(slots, tables, lengths, rows=each if T == 1 else 0, chunk=T, read="slab", reach=S)
