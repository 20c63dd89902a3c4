"""The KV cache: for each layer a pool of pages of keys and one of values, [P, K, S, H], sharded over pages (dp) and heads (tp);
or in 8 bits, with scales [P, K, S] beside them.

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

from jaxtp.ops.coded import DTYPES, CacheDtype, Coded, Held
from jaxtp.ops.pages import Read
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

    def parts(self) -> Iterator[tuple[slice, jax.Array, jax.Array]]:
        """For each form of lane, in one group: its tokens, tables [lanes, N] and lengths [lanes]."""
        table, lengths = self.tables[0], self.lengths[0]
        if self.rows:
            yield slice(0, self.rows), table[: self.rows], lengths[: self.rows]
        if len(lengths) > self.rows:
            yield slice(self.rows, None), table[self.rows :], lengths[self.rows :]
