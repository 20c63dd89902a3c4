"""The KV cache: for each layer one array of keys and one of values, [B, K, S, H], sharded over rows (dp) and heads (tp).

Where blocks are stacks, one layer for each of P ranks of pp, its arrays are too: [P, B, K, S, H], sharded over pp. Rows then go
through the stages in M groups, and there are M times as many arrays: all blocks' of one place, then of the next
(`parallel.schedules.Circulation.place`).

B batch (of a group), K KV heads (as held: at least tp), S slots, H head_dim.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxtp.sharding import Layout, zeros

LayerCache = tuple[jax.Array, jax.Array]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "lengths"], meta_fields=["fresh"])
@dataclass(frozen=True)
class Cache:
    """Keys and values of all layers.

    lengths [B] int32 ([M, B] for groups): tokens of each row that are known (a prompt counts whole from the start of its
    prefill).
    fresh: nothing is written yet, so the first tokens attend among themselves only and never read it.
    """

    layers: tuple[LayerCache, ...]
    lengths: jax.Array
    fresh: bool = field(default=False)

    @property
    def slots(self) -> int:
        """Tokens that fit in each row."""
        return self.layers[0][0].shape[-2]

    @staticmethod
    def abstract(
        layout: Layout, *, dtype: jnp.dtype, blocks: int, kv_heads: int, head_dim: int, batch: int, slots: int, groups: int
    ) -> Cache:
        """Shapes and shardings, no arrays. layout: of a block's keys and values; batch: rows of all groups together."""
        dims = {"batch": batch // groups, "heads": kv_heads, "cached": slots, "head_dim": head_dim}
        count = {}
        if layout.stack:
            dims, count = {"layers": len(layout.stack), **dims}, {None: groups}
        array: Any = jax.ShapeDtypeStruct(tuple(dims.values()), dtype, sharding=layout.sharding(*dims))
        shape, sharding = (*count.values(), batch // groups), layout.sharding(*count, "batch")
        lengths: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
        return Cache(layers=((array, array),) * (blocks * groups), lengths=lengths, fresh=True)

    def zeros(self) -> Cache:
        """The arrays that an abstract cache describes; inside a program over its mesh."""
        return zeros(self)

    def grown(self, slots: int) -> Cache:
        """This cache with more slots. Each array is copied once and freed, layer by layer, so little is held twice."""
        return replace(self, layers=tuple((_grow(k, slots), _grow(v, slots)) for k, v in self.layers))


def _grow(array: jax.Array, slots: int) -> jax.Array:
    grown = _padded(array, slots)
    array.delete()
    return grown


@functools.partial(jax.jit, static_argnums=1)
def _padded(array: jax.Array, slots: int) -> jax.Array:
    return jnp.pad(array, (*[(0, 0)] * (array.ndim - 2), (0, slots - array.shape[-2]), (0, 0)))
