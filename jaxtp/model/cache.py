"""The KV cache: for each layer one array of keys and one of values, [B, K, S, H], sharded over rows (dp) and heads (tp).

B batch, K KV heads (as held: at least tp), S slots, H head_dim.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxtp.sharding import Layout

LayerCache = tuple[jax.Array, jax.Array]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "lengths"], meta_fields=["fresh"])
@dataclass(frozen=True)
class Cache:
    """Keys and values of all layers.

    lengths [B] int32: tokens of each row that are known (a prompt counts whole from the start of its prefill).
    fresh: nothing is written yet, so the first tokens attend among themselves only and never read it.
    """

    layers: tuple[LayerCache, ...]
    lengths: jax.Array
    fresh: bool = field(default=False)

    @property
    def slots(self) -> int:
        """Tokens that fit in each row."""
        return self.layers[0][0].shape[2]

    @staticmethod
    def abstract(
        layout: Layout, *, dtype: jnp.dtype, layers: int, kv_heads: int, head_dim: int, batch: int, slots: int
    ) -> Cache:
        """Shapes and shardings, no arrays."""
        sharding = layout.sharding("batch", "heads", "cached", "head_dim")
        array: Any = jax.ShapeDtypeStruct((batch, kv_heads, slots, head_dim), dtype, sharding=sharding)
        lengths: Any = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=layout.sharding("batch"))
        return Cache(layers=((array, array),) * layers, lengths=lengths, fresh=True)

    def zeros(self) -> Cache:
        """The arrays that an abstract cache describes; inside a program over its mesh."""

        def array(a: jax.ShapeDtypeStruct) -> jax.Array:
            return jnp.zeros(a.shape, a.dtype, out_sharding=NamedSharding(a.sharding.mesh.abstract_mesh, a.sharding.spec))

        return jax.tree.map(array, self)

    def grown(self, slots: int) -> Cache:
        """This cache with more slots. Each array is copied once and freed, layer by layer, so little is held twice."""
        return replace(self, layers=tuple((_grow(k, slots), _grow(v, slots)) for k, v in self.layers))


def _grow(array: jax.Array, slots: int) -> jax.Array:
    grown = _padded(array, slots)
    array.delete()
    return grown


@functools.partial(jax.jit, static_argnums=1)
def _padded(array: jax.Array, slots: int) -> jax.Array:
    return jnp.pad(array, ((0, 0), (0, 0), (0, slots - array.shape[2]), (0, 0)))
