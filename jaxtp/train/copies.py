"""KV heads that stand several times, where tp exceeds them: the copies of one are one head, and learn as one.

In the fused kernels [L, K, G+2, ...] of a stack the last `kv` rows of dim 2 belong to a KV head; the others are its queries.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxtp.model.stacked import Params, Spec


def tie(grads: Params, specs: Mapping[str, Spec], copies: int) -> Params:
    """Copies of a KV head get the sum of their gradients, and so stay equal."""
    if copies == 1:
        return grads

    def tied(g: jax.Array, kv: int) -> jax.Array:
        groups = g.reshape(g.shape[0], -1, copies, *g.shape[2:])
        total = jnp.broadcast_to(groups.sum(axis=2, keepdims=True), groups.shape).reshape(g.shape)
        return jnp.concatenate([g[:, :, :-kv], total[:, :, -kv:]], axis=2)

    def one(g: jax.Array, kv: int) -> jax.Array:
        inside = functools.partial(tied, kv=kv)
        return jax.sharding.auto_axes(inside, out_sharding=jax.typeof(g).sharding)(g) if kv else g

    return {path: one(g, specs[path].kv) for path, g in grads.items()}


def square(g: jax.Array, kv: int, copies: int) -> jax.Array:
    """The sum of squares of a gradient, copies counted once."""
    if copies == 1 or not kv:
        return jnp.sum(g * g)
    return jnp.sum(g[:, :, :-kv] ** 2) + jnp.sum(g[:, :, -kv:] ** 2) / copies
