"""The KV cache: for each layer a pool of pages of keys and one of values, [P, K, S, H], sharded over pages (dp) and heads (tp);
or in 8 bits, with scales [P, K, S] beside them. A page's slots may be shared out over cp.

Where blocks are stacks, one layer for each rank of pp, its pools are too: [ranks, P, K, S, H], sharded over pp.

P pages, K KV heads (as held: at least tp), S slots of a page, H head_dim; B groups of dp, T tokens of each, R rows with one new
token, C tokens of a chunk, N pages of a table.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxtp.ops.attention import Kernel
from jaxtp.ops.coded import DTYPES, CacheDtype, Coded, Held
from jaxtp.ops.pages import Read, Share, attend_pages, write_pages
from jaxtp.sharding import Layout, zeros

LayerCache = tuple[Held, Held]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=[])
@dataclass(frozen=True)
class Cache:
    """Keys and values of all layers."""

    layers: tuple[LayerCache, ...]

    @property
    def slots(self) -> int:
        """Tokens that fit in a page."""
        return self.layers[0][0].shape[-2]

    @property
    def pages(self) -> int:
        """Pages of all groups together."""
        return self.layers[0][0].shape[-4]

    @staticmethod
    def abstract(
        layout: Layout,
        *,
        dtype: jnp.dtype,
        bits: CacheDtype = "auto",
        blocks: int,
        kv_heads: int,
        head_dim: int,
        pages: int,
        slots: int,
    ) -> Cache:
        """Shapes and shardings, no arrays. layout: of a block's keys and values; pages: of all groups together. dtype: of both,
        or where they are in 8 bits (bits) of their scales.
        """
        dims = {"batch": pages, "heads": kv_heads, "cached": slots, "head_dim": head_dim}
        dims = {"layers": len(layout.stack), **dims} if layout.stack else dims

        def array(dtype: jnp.dtype, dims: dict[str, int]) -> Any:
            return jax.ShapeDtypeStruct(tuple(dims.values()), dtype, sharding=layout.sharding(*dims))

        if bits == "auto":
            held: Held = array(dtype, dims)
        else:
            values = array(DTYPES[bits], dims)
            del dims["head_dim"]
            held = Coded(values, array(dtype, dims))
        return Cache(layers=((held, held),) * blocks)

    def zeros(self) -> Cache:
        """The arrays that an abstract cache describes; inside a program over its mesh."""
        return zeros(self)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["slots", "tables", "lengths"],
    meta_fields=["rows", "chunk", "read", "reach"],
)
@dataclass(frozen=True)
class Lanes:
    """Which tokens of a step belong together, and where their keys and values lie. Of a group's T tokens the first R are of a
    row each; C at a time, the others are chunks of prompts.

    slots [B, T]: where each token goes, page · S + place in it (P · S and above: nowhere). tables [B, R + chunks, N]: the pages
    of each row or chunk. lengths [B, R + chunks]: how far what its tokens see reaches; 0: an idle one. rows: R; chunk: C; read,
    reach: see `ops.pages`. Pages count within a group.
    """

    slots: jax.Array
    tables: jax.Array
    lengths: jax.Array
    rows: int
    chunk: int
    read: Read
    reach: int

    def apart(self, q: jax.Array, positions: jax.Array) -> Iterator[tuple[jax.Array, ...]]:
        """For each form of lane, in one group: its queries of q [1, T, ...] as [lanes, C, ...], and their tables [lanes, N],
        positions [lanes, C] and lengths [lanes].
        """
        table, lengths = self.tables[0], self.lengths[0]
        for mine in (slice(0, self.rows), slice(self.rows, None)):  # of lanes, and of tokens
            if count := len(lengths[mine]):
                asked, places = (a[0, mine].reshape(count, -1, *a.shape[2:]) for a in (q, positions))
                yield asked, table[mine], places, lengths[mine]


def written(
    cache: LayerCache, k: jax.Array, v: jax.Array, lanes: Lanes, scales: jax.Array | None, share: Share | None = None
) -> LayerCache:
    """The cache of one group with keys and values [1, T, K, H] of its tokens in it. scales: see `attend_cached`."""
    of_keys, of_values = (None, None) if scales is None else (scales[0], scales[1])
    keys = write_pages(cache[0], k[0], lanes.slots[0], share=share, scale=of_keys)
    return keys, write_pages(cache[1], v[0], lanes.slots[0], share=share, scale=of_values)


def attend_cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    lanes: Lanes,
    cache: LayerCache,
    scales: jax.Array | None,
    *,
    kernel: Kernel,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[jax.Array, LayerCache]:
    """One group's attention, in a region: q [1, T, K, G, H], k and v [1, T, K, H] -> [1, T, K·G·H], and the cache with k and v
    in it. positions [1, T]; scales [2]: of keys and of values in 8 bits, where these are not each head's own; the others as of
    `attend_pages`.
    """
    keys, values = written(cache, k, v, lanes, scales)
    how: dict[str, Any] = {"kernel": kernel, "window": window, "scale": scale, "softcap": softcap}
    how |= {"read": lanes.read, "reach": lanes.reach}
    out = [
        attend_pages(asked, keys, values, *where, **how).reshape(1, -1, *q.shape[2:])
        for asked, *where in lanes.apart(q, positions)
    ]
    return jnp.concatenate(out, axis=1).reshape(*q.shape[:2], -1), (keys, values)
